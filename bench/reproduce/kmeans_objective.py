"""Our k-means, of numbers on a line and of short vectors, beside scikit-learn's and faiss's: the objective of each.

Points are drawn anew for each seed, from distributions that weights have, and a few that try a search harder. The peers
start three times (scikit-learn from k-means++, faiss from points drawn), run at most 100 iterations each and keep the
best; one that is not installed is left out.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import Progress
from rich.table import Table

from tersetorch.bench.reproduce.runs import How, Reproduction, over_seeds
from tersetorch.methods.quantize import kmeans_1d, kmeans_nd

Values = NDArray[np.float32]

STARTS = 3
ITERATIONS = 100
PACKAGES = {"scikit-learn": "sklearn.cluster", "faiss": "faiss"}


def _pruned(random: np.random.Generator, count: int) -> NDArray[np.float64]:
    values = random.standard_normal(12 * count)
    return values[np.abs(values) > 1.7][:count]


Draw = Callable[[np.random.Generator, int], NDArray[np.float64]]


def _grouped(groups: int, width: int, spread: float) -> Draw:
    def draw(random: np.random.Generator, count: int) -> NDArray[np.float64]:
        middles = 5 * random.standard_normal((groups, width))
        return middles[random.integers(groups, size=count)] + spread * random.standard_normal((count, width))

    return draw


@dataclass(frozen=True)
class Study:
    """What is clustered, into how many.

    Attributes:
        title: of the table.
        distributions: of points [count] or [count, width].
        clusters: how many, for each count of points of every distribution; where it is to be quick, the first two for
            a fifth of the first count.
    """

    title: str
    distributions: Mapping[str, Draw]
    clusters: Mapping[int, Sequence[int]]


STUDIES = {
    "kmeans_objective": Study(
        "k-means on a line",
        {
            "normal": lambda random, count: random.standard_normal(count),
            "Student's t, 2 degrees": lambda random, count: random.standard_t(2, count),
            "two humps": lambda random, count: random.normal(random.choice([-1.0, 2.0], count), 0.3),
            "pruned normal": _pruned,
        },
        {10_000: (4, 16, 2, 64, 256), 120_000: (4, 16, 64)},
    ),
    "kmeans_vectors": Study(
        "k-means of short vectors",
        {
            "4 numbers, normal": lambda random, count: random.standard_normal((count, 4)),
            "8 numbers, normal": lambda random, count: random.standard_normal((count, 8)),
            "8 numbers, Student's t, 1.5 degrees": lambda random, count: random.standard_t(1.5, (count, 8)),
            "4 numbers, 40 groups": _grouped(40, 4, 0.1),
            "3 numbers, 500 points many times each": _grouped(500, 3, 0.0),
            "4 numbers, most of them 0": lambda random, count: (
                random.standard_normal((count, 4)) * (random.random((count, 4)) < 0.3)
            ),
        },
        {4096: (4, 16, 64, 256)},
    ),
}


def run(name: str, how: How) -> dict[str, Any]:
    """Clusters every distribution of a study to every number of clusters, once for each seed.

    Returns:
        JSON-able record, see over_seeds. A row's cases hold the distribution, the count of points, the clusters, and
        for each implementation its objective and seconds; "ratio <peer>" is the greatest of ours over the peer's.

    Raises:
        ValueError: there are no seeds, or no workers.
    """
    study = STUDIES[name]
    first, most = next(iter(study.clusters.items()))
    clusters = {first // 5: most[:2]} if how.quick else study.clusters
    peers = {peer: module for peer, module in PACKAGES.items() if _installed(module)}
    plan = {
        "study": name,
        "clusters": {str(count): sorted(each) for count, each in clusters.items()},
        "starts": STARTS,
        "iterations": ITERATIONS,
        "peers": {peer: importlib.metadata.version({"faiss": "faiss-cpu"}.get(peer, peer)) for peer in peers},
    }
    figures = {f"ratio {peer}": "least" for peer in peers}
    record: dict[str, Any] = over_seeds(name, partial(_one, plan), how, plan, {}, figures)
    return record


def table(record: dict[str, Any]) -> Table:
    """The peers' objectives over ours, the mean over distributions and seeds, and the least; and seconds."""
    peers = list(record["plan"]["peers"])
    columns = [f"{name} / ours, {kind}" for name in peers for kind in ("mean", "least")]
    names = ["ours", *peers]
    title = STUDIES[record["plan"]["study"]].title
    shown = Table("points", "clusters", *columns, *(f"seconds, {name}" for name in names), title=title)
    for count, each in record["plan"]["clusters"].items():
        for clusters in each:
            cases = [
                case
                for row in record["seeds"]
                for case in row["cases"]
                if (case["count"], case["clusters"]) == (int(count), clusters)
            ]
            cells = []
            for name in peers:
                ratios = [case[name]["objective"] / case["ours"]["objective"] for case in cases]
                cells += [f"{sum(ratios) / len(ratios):.4f}", f"{min(ratios):.6f}"]
            cells += [f"{sum(case[name]['seconds'] for case in cases) / len(cases):.2f}" for name in names]
            shown.add_row(f"{int(count):,}", str(clusters), *cells)
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
    study = STUDIES[plan["study"]]
    settings = [(name, int(count), each) for name in study.distributions for count, each in plan["clusters"].items()]
    task = bar.add_task(f"k-means, seed {seed}", total=sum(len(each) for *_, each in settings))
    for name, count, each in settings:
        values = study.distributions[name](random, count).astype(np.float32)
        for clusters in each:
            case: dict[str, Any] = {"distribution": name, "count": count, "clusters": clusters}
            for implementation in ("ours", *plan["peers"]):
                started = time.monotonic()
                centroids = CENTROIDS[implementation](values, clusters, seed)
                case[implementation] = {
                    "seconds": time.monotonic() - started,
                    "objective": _objective(values, np.asarray(centroids, np.float64)),
                }
            cases.append(case)
            bar.advance(task)
    return {"cases": cases} | {f"ratio {name}": _worst(cases, name) for name in plan["peers"]}


def _worst(cases: Sequence[Mapping[str, Any]], name: str) -> float:
    return max(float(case["ours"]["objective"]) / float(case[name]["objective"]) for case in cases)


def _objective(values: Values, centroids: NDArray[np.float64]) -> float:
    """The sum of squared distances to the nearest centroid, the same for everybody."""
    wide = values.astype(np.float64)
    if values.ndim == 1:
        centroids = np.sort(centroids.ravel())
        nearest = np.searchsorted((centroids[1:] + centroids[:-1]) / 2, wide)
        return float(np.square(wide - centroids[nearest]).sum())
    parts = np.array_split(wide, -(-len(wide) // 256))
    return float(sum(np.square(part[:, None] - centroids).sum(-1).min(1).sum() for part in parts))


def _ours(values: Values, clusters: int, seed: int) -> Any:
    if values.ndim == 1:
        return kmeans_1d.cluster(values, clusters).centroids
    return kmeans_nd.cluster(torch.from_numpy(values)[None], clusters, seed=seed).centres[0].numpy()


def _scikit_learn(values: Values, clusters: int, seed: int) -> Any:
    peer = importlib.import_module("sklearn.cluster").KMeans(
        clusters, n_init=STARTS, max_iter=ITERATIONS, tol=0, random_state=seed
    )
    return peer.fit(values.astype(np.float64).reshape(len(values), -1)).cluster_centers_


def _faiss(values: Values, clusters: int, seed: int) -> Any:
    points = np.ascontiguousarray(values.reshape(len(values), -1))
    # Without the last, faiss would draw 256 points a cluster and cluster those alone.
    peer = importlib.import_module("faiss").Kmeans(
        points.shape[1], clusters, niter=ITERATIONS, nredo=STARTS, seed=seed + 1, max_points_per_centroid=len(values)
    )
    peer.train(points)
    return peer.centroids


CENTROIDS: dict[str, Callable[[Values, int, int], Any]] = {
    "ours": _ours,
    "scikit-learn": _scikit_learn,
    "faiss": _faiss,
}
ROWS = [
    Reproduction(name, f"{study.title}: the objective beside scikit-learn's and faiss's", partial(run, name), table)
    for name, study in STUDIES.items()
]
