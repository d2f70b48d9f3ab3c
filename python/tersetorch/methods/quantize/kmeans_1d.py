"""k-means of numbers on a line: clusters are runs of the sorted values, so sums over prefixes give every cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]
Init = Literal["exact", "linear", "density", "random"]

# More distinct values than this are put into bins before the exact search, whose time grows with them.
EXACT_VALUES = 100_000
BINS = 16_384


@dataclass(frozen=True)
class Clusters:
    """A partition of numbers into runs.

    Attributes:
        centroids: float64 [clusters], rising; the mean of each cluster's members.
        starts: float64 [clusters], the lowest member of each cluster.
    """

    centroids: Floats
    starts: Floats

    def codes(self, values: NDArray[np.floating]) -> Indices:
        """The cluster of each of the numbers that were clustered, int64 of their shape."""
        return np.searchsorted(self.starts[1:], values, side="right")

    def squared_error(self, values: NDArray[np.floating]) -> float:
        """The sum of (value - its centroid)^2, in float64."""
        return float(np.square(np.asarray(values, np.float64) - self.centroids[self.codes(values)]).sum())


def cluster(
    values: NDArray[np.floating], clusters: int, init: Init = "exact", *, iterations: int = 1000, seed: int = 0
) -> Clusters:
    """Parts values into at most `clusters` clusters with a small sum of squared distances to their means.

    Lloyd's iteration runs from the initial centroids until nothing moves or for `iterations` rounds. A value midway
    between two centroids goes to the lower one. A centroid without members stays where it is while the iteration
    runs, and is left out of the result. With no more distinct values than clusters, each is its own cluster.

    Initial centroids:
        exact: the least sum of squares there is, by dynamic programming. With more than 100,000 distinct values it is
            the least for the values in at most 16,384 bins, which the iteration then improves on all values.
        linear: equal steps over [min, max].
        density: equal steps of the cumulative distribution.
        random: distinct values, each as likely as it is frequent (Forgy).

    Args:
        values: finite numbers, any shape, any order; float64 sums.
        clusters: at least 1.
        init: as above.
        iterations: at least 1.
        seed: of "random".

    Source:
        Han et al., Deep Compression (2016), section 3.2, for the last three; Wang and Song, Ckmeans.1d.dp (2011), for
        the first, here with divide and conquer over monotone boundaries: O(clusters n log n) for n distinct values.
    """
    flat = np.asarray(values).ravel()
    distinct, counts = np.unique(flat, return_counts=True)
    points = distinct.astype(np.float64)
    if len(points) <= clusters:
        return Clusters(points, points)
    weights = counts.astype(np.float64)
    bounds = _lloyd(points, weights, INITIAL[init](points, weights, clusters, seed), iterations)
    starts = bounds[:-1][np.diff(bounds) > 0]
    # Measured from each cluster's lowest member, so that a cluster of one value is that value to the bit.
    lowest = points[starts]
    sizes = np.diff(np.append(starts, len(points)))
    excess = np.add.reduceat(weights * (points - np.repeat(lowest, sizes)), starts)
    return Clusters(lowest + excess / np.add.reduceat(weights, starts), lowest)


def _lloyd(points: Floats, weights: Floats, centroids: Floats, iterations: int) -> Indices:
    """The bounds [clusters + 1] of the clusters: points[bounds[c]:bounds[c + 1]] are the members of cluster c."""
    middle = points.mean()
    points = points - middle
    weight, moment, _ = _prefix_sums(points, weights)
    centroids = np.unique(centroids) - middle
    bounds = np.zeros(len(centroids) + 1, np.int64)
    for _ in range(iterations):
        before = bounds
        between = (centroids[:-1] + centroids[1:]) / 2
        bounds = np.concatenate(([0], np.searchsorted(points, between, side="right"), [len(points)]))
        if np.array_equal(bounds, before):
            break
        members = np.diff(weight[bounds])
        filled = members > 0
        centroids = np.where(filled, np.diff(moment[bounds]) / np.where(filled, members, 1), centroids)
    return bounds


def _linear(points: Floats, weights: Floats, clusters: int, seed: int) -> Floats:
    return np.linspace(points[0], points[-1], clusters)


def _density(points: Floats, weights: Floats, clusters: int, seed: int) -> Floats:
    below = np.cumsum(weights)
    places: Indices = np.searchsorted(below, below[-1] * (np.arange(clusters) + 0.5) / clusters)
    return points[places]


def _random(points: Floats, weights: Floats, clusters: int, seed: int) -> Floats:
    chances = weights / weights.sum()
    return np.random.default_rng(seed).choice(points, clusters, replace=False, p=chances)


def _exact(points: Floats, weights: Floats, clusters: int, seed: int) -> Floats:
    if len(points) > EXACT_VALUES:
        points, weights = _binned(points, weights)
    bounds = np.append(optimal_starts(points, weights, clusters), len(points))
    weight, moment, _ = _prefix_sums(points, weights)
    means: Floats = np.diff(moment[bounds]) / np.diff(weight[bounds])
    return means


INITIAL: dict[str, Callable[[Floats, Floats, int, int], Floats]] = {
    "exact": _exact,
    "linear": _linear,
    "density": _density,
    "random": _random,
}


def _binned(points: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """The mean and the weight of each bin; half of the edges are evenly spaced, half part the weight evenly.

    Evenly spaced edges alone would let one outlier fill a bin with all the rest; even weights alone would merge the
    outliers.
    """
    below = np.cumsum(weights)
    parts = np.arange(1, BINS // 2) / (BINS // 2)
    even = np.searchsorted(points, points[0] + (points[-1] - points[0]) * parts)
    equal = np.searchsorted(below, below[-1] * parts)
    starts = np.unique(np.concatenate(([0], even, equal)))
    total = np.add.reduceat(weights, starts)
    return np.add.reduceat(weights * points, starts) / total, total


def optimal_starts(points: Floats, weights: Floats, clusters: int) -> Indices:
    """Where each cluster begins, int64 [clusters], in the partition with the least weighted sum of squares.

    best_c[j] = min over i of best_{c-1}[i] + cost(i, j), with cost(i, j) the sum of squares of points[i:j] around their
    mean. The minimising i never falls as j grows, nor as c does, which bounds the search of each j by its neighbours'.

    Args:
        points: float64 [n], strictly rising.
        weights: float64 [n], positive.
        clusters: 1 <= clusters <= n.
    """
    count = len(points)
    weight, moment, square = _prefix_sums(points - points.mean(), weights)
    best = np.zeros(count + 1)
    best[1:] = square[1:] - np.square(moment[1:]) / weight[1:]
    choice = np.zeros(count + 1, np.int32)
    choices = []
    for used in range(2, clusters + 1):
        base = best - square
        following = np.full(count + 1, np.inf)
        chosen = choice.copy()
        rows = count + 1 - used  # j runs over [used, count]
        stride = 1 << max(rows.bit_length() - 1, 0)
        while stride:
            row = np.arange(stride - 1, rows, 2 * stride)
            j = row + used
            low = np.maximum(choice[j], used - 1)
            inner = row >= stride
            low[inner] = np.maximum(low[inner], chosen[j[inner] - stride])
            high = j - 1
            inner = row + stride < rows
            high[inner] = np.minimum(high[inner], chosen[j[inner] + stride])
            i, first, lengths = _ranges(low, np.maximum(low, high))
            spread = np.repeat(moment[j], lengths)
            spread -= moment[i]
            np.square(spread, out=spread)
            spread /= np.repeat(weight[j], lengths) - weight[i]
            cost = base[i]
            cost -= spread
            least = np.minimum.reduceat(cost, first)
            where = np.flatnonzero(cost == np.repeat(least, lengths))
            chosen[j] = i[where[np.searchsorted(where, first)]]
            following[j] = least + square[j]
            stride //= 2
        best, choice = following, chosen
        choices.append(chosen)
    starts = [count]
    for chosen in reversed(choices):
        starts.append(int(chosen[starts[-1]]))
    return np.array([0, *reversed(starts[1:])], np.int64)


def _ranges(low: Indices, high: Indices) -> tuple[Indices, Indices, Indices]:
    """The ranges low..high one after the other, where each begins, and their lengths."""
    lengths = high - low + 1
    first = np.cumsum(lengths) - lengths
    return np.arange(int(lengths.sum())) + np.repeat(low - first, lengths), first, lengths


def _prefix_sums(points: Floats, weights: Floats) -> tuple[Floats, Floats, Floats]:
    """Sums over points[:j] of weight, weight * point and weight * point^2, each float64 [n + 1]."""
    moments = weights * points
    zero = np.zeros(1)
    return (
        np.concatenate((zero, np.cumsum(weights))),
        np.concatenate((zero, np.cumsum(moments))),
        np.concatenate((zero, np.cumsum(moments * points))),
    )
