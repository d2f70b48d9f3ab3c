"""Our k-means of numbers on a line beside scikit-learn's and faiss's: the sum of squared errors that each ends with.

Values are drawn anew for each seed, from distributions that weights have. The peers start three times (scikit-learn
from k-means++, faiss from values drawn), run at most 100 iterations each and keep the best; one that is not installed
is left out.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.progress import Progress
from rich.table import Table

from tersetorch.bench.reproduce.runs import How, Reproduction, over_seeds
from tersetorch.methods.quantize.kmeans_1d import cluster

Values = NDArray[np.float32]

STARTS = 3
ITERATIONS = 100
PACKAGES = {"scikit-learn": "sklearn.cluster", "faiss": "faiss"}


def _pruned(random: np.random.Generator, count: int) -> NDArray[np.float64]:
    values = random.standard_normal(12 * count)
    return values[np.abs(values) > 1.7][:count]


DISTRIBUTIONS: dict[str, Callable[[np.random.Generator, int], NDArray[np.float64]]] = {
    "normal": lambda random, count: random.standard_normal(count),
    "Student's t, 2 degrees": lambda random, count: random.standard_t(2, count),
    "two humps": lambda random, count: random.normal(random.choice([-1.0, 2.0], count), 0.3),
    "pruned normal": _pruned,
}


def run(how: How) -> dict[str, Any]:
    """Clusters every distribution to every number of values, once for each seed.

    Returns:
        JSON-able record, see over_seeds. A row's cases hold the distribution, the count of values, the clusters, and
        for each implementation its objective and seconds; "ratio <peer>" is the greatest of ours over the peer's.

    Raises:
        ValueError: there are no seeds, or no workers.
    """
    peers = {name: module for name, module in PACKAGES.items() if _installed(module)}
    plan = {
        "counts": [2000] if how.quick else [10_000, 120_000],
        "clusters": [4, 16] if how.quick else [2, 4, 16, 64, 256],
        "starts": STARTS,
        "iterations": ITERATIONS,
        "peers": {name: importlib.metadata.version({"faiss": "faiss-cpu"}.get(name, name)) for name in peers},
    }
    figures = {f"ratio {name}": "least" for name in peers}
    record: dict[str, Any] = over_seeds("kmeans_objective", partial(_one, plan), how, plan, {}, figures)
    return record


def table(record: dict[str, Any]) -> Table:
    """The peers' objectives over ours, the mean over distributions and seeds, and the least; and seconds."""
    peers = list(record["plan"]["peers"])
    columns = [f"{name} / ours, {kind}" for name in peers for kind in ("mean", "least")]
    names = ["ours", *peers]
    shown = Table("values", "clusters", *columns, *(f"seconds, {name}" for name in names), title="k-means on a line")
    for count in record["plan"]["counts"]:
        for clusters in record["plan"]["clusters"]:
            cases = [
                case
                for row in record["seeds"]
                for case in row["cases"]
                if (case["count"], case["clusters"]) == (count, clusters)
            ]
            cells = []
            for name in peers:
                ratios = [case[name]["objective"] / case["ours"]["objective"] for case in cases]
                cells += [f"{sum(ratios) / len(ratios):.4f}", f"{min(ratios):.6f}"]
            cells += [f"{sum(case[name]['seconds'] for case in cases) / len(cases):.2f}" for name in names]
            shown.add_row(f"{count:,}", str(clusters), *cells)
    return shown


def _installed(module: str) -> bool:
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


def _one(plan: Mapping[str, Any], seed: int, *, progress: Progress | None) -> dict[str, Any]:
    bar = Progress(disable=True) if progress is None else progress
    random = np.random.default_rng(seed)
    cases: list[dict[str, Any]] = []
    settings = [(name, count) for name in DISTRIBUTIONS for count in plan["counts"]]
    task = bar.add_task(f"k-means, seed {seed}", total=len(settings) * len(plan["clusters"]))
    for name, count in settings:
        values = DISTRIBUTIONS[name](random, count).astype(np.float32)
        for clusters in plan["clusters"]:
            case: dict[str, Any] = {"distribution": name, "count": count, "clusters": clusters}
            for implementation in ("ours", *plan["peers"]):
                started = time.monotonic()
                centroids = CENTROIDS[implementation](values, clusters, seed)
                case[implementation] = {
                    "seconds": time.monotonic() - started,
                    "objective": _objective(values, np.sort(np.asarray(centroids, np.float64).ravel())),
                }
            cases.append(case)
            bar.advance(task)
    return {"cases": cases} | {f"ratio {name}": _worst(cases, name) for name in plan["peers"]}


def _worst(cases: Sequence[Mapping[str, Any]], name: str) -> float:
    return max(float(case["ours"]["objective"]) / float(case[name]["objective"]) for case in cases)


def _objective(values: Values, centroids: NDArray[np.float64]) -> float:
    """The sum of squared distances to the nearest centroid, the same for everybody."""
    wide = values.astype(np.float64)
    nearest = np.searchsorted((centroids[1:] + centroids[:-1]) / 2, wide)
    return float(np.square(wide - centroids[nearest]).sum())


def _ours(values: Values, clusters: int, seed: int) -> NDArray[np.float64]:
    return cluster(values, clusters).centroids


def _scikit_learn(values: Values, clusters: int, seed: int) -> Any:
    peer = importlib.import_module("sklearn.cluster").KMeans(
        clusters, n_init=STARTS, max_iter=ITERATIONS, tol=0, random_state=seed
    )
    return peer.fit(values.astype(np.float64)[:, None]).cluster_centers_


def _faiss(values: Values, clusters: int, seed: int) -> Any:
    # Without the last, faiss would draw 256 values a cluster and cluster those alone.
    peer = importlib.import_module("faiss").Kmeans(
        1, clusters, niter=ITERATIONS, nredo=STARTS, seed=seed + 1, max_points_per_centroid=len(values)
    )
    peer.train(np.ascontiguousarray(values[:, None]))
    return peer.centroids


CENTROIDS: dict[str, Callable[[Values, int, int], Any]] = {
    "ours": _ours,
    "scikit-learn": _scikit_learn,
    "faiss": _faiss,
}
ROWS = [
    Reproduction("kmeans_objective", "k-means of numbers: the objective beside scikit-learn's and faiss's", run, table)
]
