"""Clusters of equal size."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Labels = NDArray[np.int64]


def balanced_labels(costs: Floats) -> Labels:
    """A cluster for each of n samples, n / k in each of k, from costs [n, k] of being there.

    Each sample goes where it costs least; then from clusters that are over-full those samples move to one with room
    whose costs rise least by it, until none is.
    """
    samples, clusters = costs.shape
    size = samples // clusters
    labels: Labels = costs.argmin(1)
    rows = np.arange(samples)
    while True:
        counts = np.bincount(labels, minlength=clusters)
        if (counts <= size).all():
            return labels
        movable = rows[counts[labels] > size]
        # What is full is no place to go.
        open_costs = np.where(counts < size, costs[movable], np.inf)
        to = open_costs.argmin(1)
        regret = open_costs[np.arange(len(movable)), to] - costs[movable, labels[movable]]
        for place in np.argsort(regret, kind="stable"):
            sample, target = movable[place], to[place]
            if counts[labels[sample]] > size and counts[target] < size:
                counts[labels[sample]] -= 1
                counts[target] += 1
                labels[sample] = target


def balanced_kmeans(points: Floats, clusters: int, *, restarts: int, iterations: int, seed: int) -> Labels:
    """Labels of clusters of equal size of points [n, d] whose squared distances from their means sum to little.

    Lloyd's rounds with balanced_labels, from `clusters` points drawn as centres, until the sum no longer falls or
    after `iterations`; the best of `restarts`; then pairs of points change places as long as the sum falls by it.
    Clusters are numbered in the order of their first points.

    Source:
        Denton et al., Exploiting linear structure within convolutional networks (2014), section 3.3 and the authors'
        code, whose last step this is not.
    """
    samples = len(points)
    if clusters in (1, samples):
        return np.arange(samples, dtype=np.int64) * (clusters > 1)
    products = points @ points.T
    squares = products.diagonal()
    size = samples // clusters

    def spread(labels: Labels) -> tuple[float, Floats]:
        members = np.eye(clusters)[labels]
        sums = products @ members
        within = (members * sums).sum(0)
        return float(squares.sum() - within.sum() / size), squares[:, None] - 2 * sums / size + within / size**2

    def start(generator: np.random.Generator) -> Floats:
        chosen = generator.choice(samples, clusters, replace=False)
        distances: Floats = squares[:, None] - 2 * products[:, chosen] + squares[chosen]
        return distances

    labels = best_labels(start, spread, restarts=restarts, iterations=iterations, seed=seed)
    return in_order(_exchange(products, labels, clusters))


def best_labels(
    start: Callable[[np.random.Generator], Floats],
    spread: Callable[[Labels], tuple[float, Floats]],
    *,
    restarts: int,
    iterations: int,
    seed: int,
) -> Labels:
    """The labels of least error of Lloyd's rounds from several starts.

    Args:
        start: costs [n, k] from which a run begins.
        spread: the error of labels, and the costs of the centres that fit them best.
        restarts: at least 1.
        iterations: of a run, at least 1.
        seed: of what start draws.
    """
    generator = np.random.default_rng(seed)
    best: Labels | None = None
    least = np.inf
    for _ in range(restarts):
        costs, before = start(generator), np.inf
        for _ in range(iterations):
            labels = balanced_labels(costs)
            error, costs = spread(labels)
            if best is None or error < least:
                best, least = labels, error
            if error >= before * (1 - 1e-12):
                break
            before = error
    assert best is not None
    return best


def _exchange(products: Floats, labels: Labels, clusters: int) -> Labels:
    """The same labels with pairs of samples swapped, each time the pair that lowers the sum of squares most."""
    labels = labels.copy()
    squares = products.diagonal()
    apart = 2 * (squares[:, None] + squares - 2 * products)
    for _ in range(10 * len(labels)):
        sums = products @ np.eye(clusters)[labels]
        moved = sums[:, labels] - sums[np.arange(len(labels)), labels][:, None]
        gain = np.where(labels[:, None] == labels, -np.inf, 2 * (moved + moved.T) + apart)
        place = int(gain.argmax())
        if gain.flat[place] <= 1e-12 * max(1e-300, float(squares.sum())):
            break
        one, other = divmod(place, len(labels))
        labels[one], labels[other] = labels[other], labels[one]
    return labels


def in_order(labels: Labels) -> Labels:
    """The same clusters, numbered in the order of their first samples."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    rank: Labels = np.argsort(np.argsort(first)).astype(np.int64)
    return rank[inverse]
