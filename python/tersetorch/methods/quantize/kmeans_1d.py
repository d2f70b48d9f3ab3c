"""k-means of numbers on a line: clusters are runs of the sorted values, so sums over prefixes give every cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tersetorch import _native

Floats = NDArray[np.float64]
Numbers = NDArray[np.floating]
Indices = NDArray[np.int64]
Init = Literal["exact", "linear", "density", "random"]
Rounding = Callable[[Floats], Floats]

# More distinct values than this are put into bins before the exact search, whose time grows with them.
EXACT_VALUES = 100_000
BINS = 65_536
# Sums over prefixes are kept for each so many values; what lies between is added when it is asked for.
BLOCK = 64


@dataclass(frozen=True)
class Clusters:
    """A partition of numbers into runs.

    Attributes:
        centroids: float64 [clusters], rising; the (weighted) mean of each cluster's members, or that rounded.
        starts: float64 [clusters], the lowest member of each cluster.
    """

    centroids: Floats
    starts: Floats

    def codes(self, values: Numbers) -> NDArray[np.uint8]:
        """The cluster of each of the numbers that were clustered, uint8 of their shape."""
        values = np.ascontiguousarray(values, np.float64 if values.dtype == np.float64 else np.float32)
        return _native.threshold_codes(values, self.starts[1:].astype(values.dtype)).reshape(values.shape)

    def squared_error(self, values: Numbers, weights: Numbers | None = None) -> float:
        """The sum of weight * (value - its centroid)^2, in float64; the weights are 1 where none are given."""
        squares = np.asarray(values, np.float64) - self.centroids[self.codes(values)]
        np.square(squares, out=squares)
        return float((squares if weights is None else squares * weights).sum())


def cluster(
    values: Numbers,
    clusters: int,
    init: Init = "exact",
    *,
    iterations: int = 1000,
    seed: int = 0,
    weights: Numbers | None = None,
    rounding: Rounding | None = None,
) -> Clusters:
    """Parts values into at most `clusters` clusters with a small sum of weight * (value - its cluster's centroid)^2.

    Lloyd's iteration runs from the initial centroids until nothing moves or for `iterations` rounds. A value midway
    between two centroids goes to the lower one. A centroid without members stays where it is while the iteration
    runs, and is left out of the result. With no more distinct values than clusters, each is its own cluster.

    Initial centroids:
        exact: the least sum there is, by dynamic programming. With more than 100,000 distinct values it is the least
            for the values in at most 65,536 bins, which the iteration then improves on all values.
        linear: equal steps over [min, max].
        density: equal steps of the cumulative distribution.
        random: distinct values, each as likely as it is frequent (Forgy).

    Args:
        values: finite numbers, float32 or float64, of any shape, in any order; at least one.
        clusters: 1 to 256.
        init: as above.
        iterations: at least 1.
        seed: of "random".
        weights: positive, one for each value; None for 1 each.
        rounding: what centroids must be rounded with, such as to bfloat16: the iteration goes on from the rounded ones
            and rounds each mean, which gives the best rounded centroid of the members; equal ones become one.

    Source:
        Han et al., Deep Compression (2016), section 3.2, for the last three; Wang and Song, Ckmeans.1d.dp (2011), for
        the first, here with divide and conquer over monotone boundaries: O(clusters n log n) for n distinct values.
    """
    line, distinct = _line(values.ravel(), None if weights is None else weights.ravel())
    if distinct <= clusters:
        centroids = line.points.astype(np.float64)
        if rounding is None:
            return Clusters(centroids, centroids)
    else:
        centroids = _lloyd(line, INITIAL[init](line, clusters, seed), iterations)[1]
    if rounding is not None:
        centroids = _lloyd(line, rounding(centroids), iterations, rounding)[1]
    bounds = line.bounds(centroids)
    starts = bounds[:-1][np.diff(bounds) > 0]
    lowest = line.points[starts].astype(np.float64)
    means = line.means(starts)
    return Clusters(means if rounding is None else rounding(means), lowest)


@dataclass(frozen=True)
class _Line:
    """Sorted numbers with weights.

    Attributes:
        points: [n], rising, float32 or float64; distinct where they are at most EXACT_VALUES.
        weights: float64 [n], or None for 1 each.
        middle: what sums of points are measured from, their median, so that they stay small.
        weight, moment: float64 [blocks + 1], sums of weight and weight * (point - middle) over the blocks from that of
            middle to before this one, negative where it comes earlier: one far outlier must not round all sums.
    """

    points: Numbers
    weights: Floats | None
    middle: float
    weight: Floats
    moment: Floats

    def bounds(self, centroids: Floats) -> Indices:
        """The bounds [clusters + 1] of the clusters: points[bounds[c]:bounds[c + 1]] are nearest to centroid c."""
        between = _no_higher((centroids[:-1] + centroids[1:]) / 2, self.points.dtype)
        return np.concatenate(([0], np.searchsorted(self.points, between, side="right"), [len(self.points)]))

    def sums(self, bounds: Indices) -> tuple[Floats, Floats]:
        """Sums of weight and of weight * (point - middle) up to each bound: their differences are sums between."""
        block = bounds // BLOCK
        index = block[:, None] * BLOCK + np.arange(BLOCK)
        weight = (index < bounds[:, None]).astype(np.float64)
        index = np.minimum(index, len(self.points) - 1)
        if self.weights is not None:
            weight *= self.weights[index]
        offset = self.points[index].astype(np.float64) - self.middle
        return self.weight[block] + weight.sum(1), self.moment[block] + (weight * offset).sum(1)

    def means(self, starts: Indices) -> Floats:
        """The mean of each run that begins at starts; a run of one value has that value to the bit."""
        ends = np.append(starts[1:], len(self.points))
        if self.weights is None:
            means = np.add.reduceat(self.points, starts, dtype=np.float64) / (ends - starts)
        else:
            means = np.add.reduceat(self.points * self.weights, starts) / np.add.reduceat(self.weights, starts)
        return np.clip(means, self.points[starts], self.points[ends - 1])


def _line(values: Numbers, weights: Numbers | None) -> tuple[_Line, int]:
    """The values in order, and how many distinct ones there are."""
    if weights is None:
        points, mass = np.sort(values), None
    else:
        order = np.argsort(values)
        points, mass = values[order], weights[order].astype(np.float64)
    first = np.flatnonzero(np.concatenate(([True], points[1:] != points[:-1])))
    if len(first) <= EXACT_VALUES:
        mass = np.diff(np.append(first, len(points))).astype(float) if mass is None else np.add.reduceat(mass, first)
        points = points[first]
    blocks = np.arange(0, len(points), BLOCK)
    if mass is None:
        weight = np.diff(np.append(blocks, len(points))).astype(np.float64)
        moment = np.add.reduceat(points, blocks, dtype=np.float64)
    else:
        weight, moment = np.add.reduceat(mass, blocks), np.add.reduceat(points * mass, blocks)
    place = len(points) // 2 if mass is None else _median(mass)
    middle, block = float(points[place]), place // BLOCK
    return _Line(points, mass, middle, _sums(weight, block), _sums(moment - middle * weight, block)), len(first)


def _lloyd(line: _Line, centroids: Floats, iterations: int, rounding: Rounding | None = None) -> tuple[Indices, Floats]:
    """The bounds and the centroids, also those without members, where Lloyd's iteration ends."""
    centroids = np.unique(centroids)
    bounds = np.zeros(0, np.int64)
    for _ in range(iterations):
        before, bounds = bounds, line.bounds(centroids)
        if np.array_equal(bounds, before):
            break
        weight, moment = line.sums(bounds)
        filled = np.diff(bounds) > 0
        means = np.diff(moment) / np.where(filled, np.diff(weight), 1) + line.middle
        centroids = np.where(filled, means if rounding is None else rounding(means), centroids)
    return bounds, centroids


def _linear(line: _Line, clusters: int, seed: int) -> Floats:
    return np.linspace(float(line.points[0]), float(line.points[-1]), clusters)


def _density(line: _Line, clusters: int, seed: int) -> Floats:
    return line.points[_quantiles(line, (np.arange(clusters) + 0.5) / clusters)].astype(np.float64)


def _random(line: _Line, clusters: int, seed: int) -> Floats:
    random = np.random.default_rng(seed)
    chances = None if line.weights is None else line.weights / line.weights.sum()
    drawn = random.choice(len(line.points), clusters, replace=False, p=chances)
    return line.points[drawn].astype(np.float64)


def _exact(line: _Line, clusters: int, seed: int) -> Floats:
    if line.weights is None or len(line.points) > EXACT_VALUES:
        points, weights = _binned(line)
    else:
        points, weights = line.points.astype(np.float64), line.weights
    starts = optimal_starts(points, weights, clusters)
    return np.add.reduceat(weights * points, starts) / np.add.reduceat(weights, starts)


INITIAL: dict[str, Callable[[_Line, int, int], Floats]] = {
    "exact": _exact,
    "linear": _linear,
    "density": _density,
    "random": _random,
}


def _binned(line: _Line) -> tuple[Floats, Floats]:
    """The mean and the weight of each bin.

    A quarter of the edges are evenly spaced, a quarter part the weight evenly, and half are as dense as good centroids
    are, whose number grows with the cube root of the density. Evenly spaced edges alone would let one outlier fill a
    bin with all the rest; even weights alone would merge the outliers.
    """
    parts = np.arange(1, BINS // 4) / (BINS // 4)
    low, high = float(line.points[0]), float(line.points[-1])
    even = np.searchsorted(line.points, (low + (high - low) * parts).astype(line.points.dtype))
    bounds = np.unique(np.concatenate(([0, len(line.points)], even, _quantiles(line, parts))))
    spread = line.points[bounds[1:] - 1].astype(np.float64) - line.points[bounds[:-1]]
    wanted = _from_zero(np.cbrt(np.diff(line.sums(bounds)[0]) * np.square(spread)))
    parts = np.arange(1, BINS // 2) / (BINS // 2)
    bounds = np.union1d(bounds, np.interp(parts * wanted[-1], wanted, bounds).astype(np.int64))
    return line.means(bounds[:-1]), np.diff(line.sums(bounds)[0])


def _quantiles(line: _Line, parts: Floats) -> Indices:
    """The first point up to which these parts of the weight lie."""
    if line.weights is None:
        return np.maximum(np.ceil(len(line.points) * parts).astype(np.int64) - 1, 0)
    below = np.cumsum(line.weights)
    found: Indices = np.searchsorted(below, below[-1] * parts)
    return found


def optimal_starts(points: Floats, weights: Floats, clusters: int) -> Indices:
    """Where each cluster begins, int64 [clusters], in the partition with the least weighted sum of squares.

    Args:
        points: float64 [n], strictly rising.
        weights: float64 [n], positive.
        clusters: 1 <= clusters <= n.
    """
    middle = _median(weights)
    offsets = points - points[middle]
    moments = weights * offsets
    sums = (_sums(weights, middle), _sums(moments, middle), _sums(moments * offsets, middle))
    return _native.optimal_runs(*sums, clusters)


def _median(weights: Floats) -> int:
    """The place of the weighted median."""
    below = np.cumsum(weights)
    return min(int(np.searchsorted(below, below[-1] / 2)), len(weights) - 1)


def _sums(items: Floats, start: int) -> Floats:
    """Sums over prefixes less that of items[:start], added up from there both ways."""
    return np.concatenate((-np.cumsum(items[:start][::-1])[::-1], np.zeros(1), np.cumsum(items[start:])))


def _from_zero(items: Floats) -> Floats:
    """Sums over prefixes, the empty one and the whole too."""
    return np.concatenate((np.zeros(1), np.cumsum(items)))


def _no_higher(numbers: Floats, dtype: np.dtype[np.floating]) -> Numbers:
    """The greatest numbers of dtype that are not above: `value <= number` says the same of both."""
    rounded = numbers.astype(dtype)
    return np.where(rounded > numbers, np.nextafter(rounded, dtype.type(-np.inf)), rounded)
