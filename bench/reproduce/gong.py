"""Vector quantisation of fully connected layers: the methods of Gong et al. at equal bytes, on networks for MNIST.

The paper compresses the three layers of a network for ImageNet, 9216x4096 and less. Here are LeNet-300-100, whose
codebooks weigh much beside its few rows, and one seven times as large. Both hidden layers are compressed and nothing is
trained again; the last layer, whose 10 rows no factors of equal bytes could stand in for, stays and is not counted.
Each method is tried at a grid of settings, one for both layers. For each budget, the layers' bytes over a ratio, the
setting with the least error on 5,000 held-out training images, which the seed draws, is chosen among those that fit;
the test images are read once for that choice. Bytes are those of the paper's formulas: log2(entries) bits a code,
float32 codebooks, factors and scales; biases are left out on both sides.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

from tersetorch.bench.reproduce.runs import How, Reproduction, over_seeds
from tersetorch.methods.factorize import truncated
from tersetorch.methods.quantize import binary, product_quantize, residual_quantize
from tersetorch.methods.quantize.binary import Scale
from tersetorch.methods.quantize.kmeans_1d import cluster
from tersetorch.methods.vector_codes import VectorCodes, decode
from tersetorch.recipes.deep_compression import Training
from tersetorch.reports.figure import figure_class
from tersetorch.zoo import error_rate, fit
from tersetorch.zoo import load as load_data

# Gong, Liu, Yang, Bourdev (2014), abstract and section 4, on the three layers of a network for ImageNet.
PAPER = {
    "claim": "16 to 24 times smaller at about a point more error; PQ and KM are best",
    "ratios": [16, 24],
    "rise": 1.0,
}
RATIOS = (8, 12, 16, 24, 32, 48)
# Bytes fit up to this part of what the ratio allows: codes of 2 bits and their codebook are nearly 16 times smaller.
FITS = 1.02
FLOAT = 32
# Units of the hidden layers, and epochs of the training.
NETWORKS = {"gong": ((300, 100), 15), "gong_wide": ((1024, 1024), 10)}
DROPOUT = 0.3
BATCH = 128


class Approximation(NamedTuple):
    """What stands in for a weight.

    Attributes:
        weight: [rows, columns].
        bits: what it takes, in bits.
    """

    weight: Tensor
    bits: float


Method = Callable[[Tensor, int], Approximation]


def run(name: str, how: How) -> dict[str, Any]:
    """Trains, approximates and measures, once for each seed.

    Args:
        name: of NETWORKS.
        how: seeds, workers and the like.

    Returns:
        JSON-able record, see over_seeds. A row holds the errors of the dense network in percent, "points" (method ->
        [[ratio, held-out error, setting], ...]) and "chosen" (method -> list over the ratios of [setting, its ratio,
        test error], or None where nothing fits).

    Raises:
        ValueError: there are no seeds, or no workers.
        FileNotFoundError: MNIST is not in the folder that TERSETORCH_DATA names.
    """
    hidden, epochs = NETWORKS[name]
    training = Training(epochs=1 if how.quick else epochs, lr=0.1, weight_decay=5e-5, input_dropout=0.1)
    described = {
        "hidden": list(hidden),
        "batch_size": BATCH,
        "dropout": DROPOUT,
        "dense": training.model_dump(),
        "ratios": list(RATIOS),
        "settings": {method: [words for words, _ in settings] for method, settings in methods(how.quick).items()},
    }
    figures = {"dense": "least", "dense_test": "least"}
    one = partial(_one, hidden, training, how.quick)
    record: dict[str, Any] = over_seeds(name, one, how, described, PAPER, figures)
    return record


def table(record: dict[str, Any]) -> Table:
    """The mean rise of the test error over the dense network's in points, and in brackets the worst seed's."""
    names = list(record["plan"]["settings"])
    title = f"{_words(record)}, not trained again: points of test error"
    shown = Table("ratio", *names, title=title)
    for index, ratio in enumerate(record["plan"]["ratios"]):
        rises = [_rises(record, name, index) for name in names]
        shown.add_row(
            f"{ratio}x", *(f"{statistics.mean(each):+.2f} ({max(each):+.2f})" if each else "-" for each in rises)
        )
    return shown


def draw(record: dict[str, Any], path: Path) -> None:
    """Draws the chosen settings' mean errors over the ratios as an SVG or PNG file.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    figure = figure_class("gong")(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, marker in zip(record["plan"]["settings"], "osv^Dx*", strict=False):
        rises = [_rises(record, name, index) for index in range(len(record["plan"]["ratios"]))]
        xs = [ratio for ratio, each in zip(record["plan"]["ratios"], rises, strict=True) if each]
        ys = [statistics.mean(each) for each in rises if each]
        axes.plot(xs, ys, marker=marker, markersize=4, label=name, alpha=0.8)
    axes.axhline(PAPER["rise"], color="0.6", linewidth=1, linestyle="--")
    axes.set(
        title=f"{_words(record)} on MNIST, not trained again",
        xlabel="dense bytes over compressed bytes",
        ylabel="rise of the test error, points",
        xscale="log",
    )
    axes.set_xticks(record["plan"]["ratios"], [f"{ratio}x" for ratio in record["plan"]["ratios"]], minor=False)
    axes.minorticks_off()
    axes.set_yscale("symlog", linthresh=0.5)
    axes.set_ylim(bottom=-0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _words(record: dict[str, Any]) -> str:
    return f"784-{'-'.join(map(str, record['plan']['hidden']))}-10"


def _rises(record: dict[str, Any], name: str, index: int) -> list[float]:
    """Each seed's rise of the test error in points; empty where no setting of the method is that small."""
    found = [(row["chosen"][name][index], row["dense_test"]) for row in record["seeds"]]
    return [] if any(chosen is None for chosen, _ in found) else [chosen[2] - dense for chosen, dense in found]


# ---- the paper's methods


def methods(quick: bool = False) -> dict[str, list[tuple[str, Method]]]:
    """Each method's settings: what is shown of it, and (weight, seed) -> its approximation.

    Those that are larger than every budget are left out.
    """
    widths, counts = ((4,), (16,)) if quick else ((2, 4, 8, 16), (4, 16, 64))
    ways = ((False, ""), (True, ", of inputs"))
    return {
        "KM": [(f"{bits} bits", partial(_scalars, bits)) for bits in ((2,) if quick else range(1, 5))],
        "PQ": [
            (f"{width} columns, {count} entries{words}", partial(_products, width, count, False, turned))
            for width in widths
            for count in counts
            if count <= 16 * width
            for turned, words in ways
        ],
        "PQ, one codebook": [
            (f"{width} columns, {count} entries", partial(_products, width, count, True, False))
            for width in widths[:3]
            for count in (16, 64, 256)
        ],
        "RQ": [
            (f"{stages} stages, {count} entries{words}", partial(_residuals, stages, count, turned))
            for stages in ((2,) if quick else (1, 2, 4, 8))
            for count in counts
            if stages * count <= 128
            for turned, words in ways
        ],
        "BIN": [(f"scale: {scale}", partial(_signs, scale)) for scale in get_args(Scale)],
        "MF": [(f"rank for {ratio}x", partial(_factors, ratio)) for ratio in (RATIOS[:1] if quick else RATIOS)],
    }


def _scalars(bits: int, weight: Tensor, seed: int) -> Approximation:
    """KM: k-means of all numbers."""
    numbers = weight.numpy()
    found = cluster(numbers, 2**bits, seed=seed)
    values = torch.from_numpy(found.centroids.astype(np.float32))
    shared = values[torch.from_numpy(found.codes(numbers)).long()]
    return Approximation(shared, weight.numel() * bits + FLOAT * len(values))


def _products(width: int, entries: int, shared: bool, turned: bool, weight: Tensor, seed: int) -> Approximation:
    """PQ: the rows, or turned the columns, cut into segments."""
    matrix = weight.T if turned else weight
    rows, columns = matrix.shape
    fits = min(entries, rows)
    found = product_quantize(matrix, fits, sub_vector=min(width, columns), shared=shared, seed=seed)
    return _vectors(found, columns, turned)


def _residuals(stages: int, entries: int, turned: bool, weight: Tensor, seed: int) -> Approximation:
    """RQ: the rows, or turned the columns."""
    matrix = weight.T if turned else weight
    found = residual_quantize(matrix, stages, min(entries, matrix.shape[0]), seed=seed)
    return _vectors(found, matrix.shape[1], turned)


def _vectors(found: VectorCodes, columns: int, turned: bool) -> Approximation:
    dense = decode(*found, columns)
    bits = found.codes.numel() * math.log2(max(2, found.codebooks.shape[3])) + FLOAT * found.codebooks.numel()
    return Approximation(dense.T if turned else dense, bits)


def _signs(scale: Scale, weight: Tensor, seed: int) -> Approximation:
    """BIN: signs, and the scale of least squared error of a layer or of each row."""
    scales = {"none": 0, "tensor": 1, "row": len(weight)}
    return Approximation(binary(weight, scale), weight.numel() + FLOAT * scales[scale])


def _factors(ratio: int, weight: Tensor, seed: int) -> Approximation:
    """MF: the nearest matrix of the rank that the ratio leaves, at least 1; k (m + n + 1) numbers."""
    rows, columns = weight.shape
    rank = max(1, int(weight.numel() / (ratio * (rows + columns + 1))))
    first, second = truncated(weight, rank)
    return Approximation(first @ second, FLOAT * rank * (rows + columns + 1))


# ---- one seed


def _one(
    hidden: Sequence[int], training: Training, quick: bool, seed: int, *, progress: Progress | None
) -> dict[str, Any]:
    data = load_data("mnist", seed=seed)
    dense = _network([data.in_features, *hidden, data.classes], seed)
    fit(
        dense,
        data.train_images,
        data.train_labels,
        **dict(training),
        batch_size=BATCH,
        seed=seed,
        progress=progress,
        description="train the dense network",
    ).eval()
    layers = _hidden(dense)
    weights = [layer.weight.detach().clone() for layer in layers]
    total = FLOAT * sum(weight.numel() for weight in weights)
    model = copy.deepcopy(dense)
    slots = _hidden(model)
    grid = methods(quick)
    bar = Progress(disable=True) if progress is None else progress
    task = bar.add_task("approximate the layers", total=sum(map(len, grid.values())))
    points: dict[str, list[list[Any]]] = {}
    chosen: dict[str, list[list[Any] | None]] = {}
    for name, settings in grid.items():
        points[name] = []
        kept = []
        for words, approximate in settings:
            found = [approximate(weight, seed) for weight in weights]
            ratio = total / sum(each.bits for each in found)
            error = _error(
                model, slots, [each.weight for each in found], data.validation_images, data.validation_labels
            )
            points[name].append([ratio, error, words])
            kept.append([each.weight for each in found])
            bar.advance(task)
        chosen[name] = []
        tested: dict[int, float] = {}
        for wanted in RATIOS:
            best = _best(points[name], wanted)
            if best is not None and best not in tested:
                tested[best] = _error(model, slots, kept[best], data.test_images, data.test_labels)
            chosen[name].append(None if best is None else [points[name][best][2], points[name][best][0], tested[best]])
    return {
        "dense": _error(model, slots, weights, data.validation_images, data.validation_labels),
        "dense_test": _error(model, slots, weights, data.test_images, data.test_labels),
        "points": points,
        "chosen": chosen,
    }


def _network(sizes: Sequence[int], seed: int) -> nn.Module:
    """Linear layers between these sizes; after each but the last a ReLU and dropout."""
    modules: list[nn.Module] = [nn.Flatten()]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for inputs, outputs in pairwise(sizes):
            modules += [nn.Linear(inputs, outputs), nn.ReLU(), nn.Dropout(DROPOUT)]
    return nn.Sequential(*modules[:-2])


def _hidden(model: nn.Module) -> list[nn.Linear]:
    """All linear layers but the last."""
    return [module for module in model.modules() if isinstance(module, nn.Linear)][:-1]


def _best(points: Sequence[Sequence[Any]], ratio: float) -> int | None:
    """The setting of the least held-out error among those that fit."""
    fitting = [index for index, point in enumerate(points) if FITS * point[0] >= ratio]
    return min(fitting, key=lambda index: points[index][1], default=None)


@torch.no_grad()
def _error(
    model: nn.Module, slots: Sequence[nn.Linear], weights: Sequence[Tensor], images: Tensor, labels: Tensor
) -> float:
    for layer, weight in zip(slots, weights, strict=True):
        layer.weight.copy_(weight)
    error: float = error_rate(model, images, labels)
    return 100 * error


ROWS = [
    Reproduction(
        name,
        "Gong et al. 2014: scalar, product and residual quantisation, signs and factors at equal bytes, "
        f"784-{'-'.join(map(str, hidden))}-10",
        partial(run, name),
        table,
        draw,
    )
    for name, (hidden, _) in NETWORKS.items()
]
