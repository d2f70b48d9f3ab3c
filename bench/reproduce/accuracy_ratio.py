"""Deep Compression's figure of accuracy against ratio, on LeNet-300-100 and MNIST: pruning, sharing, SVD, and together.

The paper draws it for AlexNet. Every point is retrained; all are read on 5,000 held-out training images, which the seed
draws; the test images are not read. Without entropy coding, sizes are the paper's: a value and a 5-bit gap for each
weight that is kept and each filler, codes of fixed width, codebooks and biases of float32. With it, they are our files.
"""

from __future__ import annotations

import copy
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from rich.table import Table
from torch import nn

from tersetorch.bench.reproduce.accounting import fixed_bytes, gap_counts
from tersetorch.bench.reproduce.han import train, train_dense
from tersetorch.bench.reproduce.runs import How, Reproduction, over_seeds
from tersetorch.methods import finalize, prune, quantize
from tersetorch.recipes.deep_compression import Training
from tersetorch.reports.figure import figure_class
from tersetorch.storage import save
from tersetorch.zoo import Dataset, error_rate
from tersetorch.zoo import load as load_data

# Han, Mao, Dally, Deep Compression (2016), figure 6 and the text beside it: percent of the original size.
PAPER = {
    "ordering": "together, pruning and sharing hold where either alone or SVD breaks",
    "holds_down_to": {"prune and share": 3, "prune": 8, "share": 8},
}
CURVES = ("prune", "share", "SVD", "prune and share", "SVD and share")
BATCH = 256
GAP_BITS = 5
# Bits of what is pruned or factorised first.
BITS = 4
ENTRIES = 2**BITS


@dataclass(frozen=True)
class Plan:
    """Points and trainings of the curves.

    Attributes:
        dense: the dense network's training.
        kept: parts of all weights that pruning leaves, falling; each point starts from the one before.
        bits: of sharing alone.
        ranks: parts of fc1's and fc2's numbers that their factors hold; fc3 stays as it is.
        retrain: after pruning.
        factored: after factorising; a product of two layers wants smaller steps.
        share: of the shared values.
    """

    dense: Training
    kept: tuple[float, ...]
    bits: tuple[int, ...]
    ranks: tuple[float, ...]
    retrain: Training
    factored: Training
    share: Training


def full_plan() -> Plan:
    """The plan behind the reproduction."""
    return Plan(
        dense=Training(epochs=12, lr=0.1, weight_decay=1e-4),
        kept=(0.5, 0.2, 0.1, 0.08, 0.05, 0.03, 0.01),
        bits=(8, 4, 3, 2, 1),
        ranks=(0.5, 0.2, 0.1, 0.05),
        retrain=Training(epochs=3, lr=0.05, weight_decay=1e-4),
        factored=Training(epochs=3, lr=0.02, weight_decay=1e-4),
        share=Training(epochs=1, lr=5e-4, optimizer="adam"),
    )


def quick_plan() -> Plan:
    """Two points a curve, one epoch each."""
    plan = full_plan()
    short = [each.model_copy(update={"epochs": 1}) for each in (plan.dense, plan.retrain, plan.factored, plan.share)]
    return Plan(short[0], (0.5, 0.1), (4, 1), (0.5, 0.1), *short[1:])


def run(how: How) -> dict[str, Any]:
    """Draws the five curves once for each seed.

    Returns:
        JSON-able record, see over_seeds. A row holds the dense network's held-out error in percent and, for each curve
        and point, [setting, bytes without entropy coding, bytes of our file, error in percent], in order.

    Raises:
        ValueError: there are no seeds, or no workers.
        FileNotFoundError: MNIST is not in the folder that TERSETORCH_DATA names.
    """
    plan = quick_plan() if how.quick else full_plan()
    described = {
        **{name: list(getattr(plan, name)) for name in ("kept", "bits", "ranks")},
        **{name: getattr(plan, name).model_dump() for name in ("dense", "retrain", "factored", "share")},
        "bits_together": BITS,
    }
    record: dict[str, Any] = over_seeds(
        "accuracy_ratio", partial(_one, plan), how, described, PAPER, {"dense": "least"}
    )
    return record


def table(record: dict[str, Any]) -> Table:
    """Every point: how many times smaller, without and with entropy coding, and the mean rise of the error."""
    shown = Table(
        "", "setting", "smaller, fixed width", "smaller, entropy coded", "rise of the error", "worst seed",
        title="LeNet-300-100: held-out error over the dense network's, points",
    )  # fmt: skip
    for curve in CURVES:
        for setting, fixed, coded, rise, worst in _points(record, curve):
            shown.add_row(curve, f"{setting:g}", f"{fixed:.1f}x", f"{coded:.1f}x", f"{rise:+.2f}", f"{worst:+.2f}")
    return shown


def draw(record: dict[str, Any], path: Path) -> None:
    """Draws the curves as an SVG or PNG file.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    figure = figure_class("accuracy_ratio")(figsize=(8, 4.6), layout="constrained")
    axes = figure.subplots()
    for index, curve in enumerate(CURVES):
        points = _points(record, curve)
        rises = [rise for *_, rise, _ in points]
        axes.plot([100 / coded for _, _, coded, *_ in points], rises, f"C{index}o-", markersize=4, label=curve)
        axes.plot([100 / fixed for _, fixed, *_ in points], rises, f"C{index}o:", markersize=3, linewidth=1)
    axes.axhline(0, color="0.6", linewidth=1, linestyle="--")
    axes.set(
        title="LeNet-300-100 on MNIST, retrained; dotted: without entropy coding",
        xlabel="size, % of float32",
        ylabel="rise of the held-out error, points",
        xscale="log",
        ylim=(-0.3, 3),
    )
    axes.legend(fontsize="small")
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _points(record: dict[str, Any], curve: str) -> list[tuple[float, float, float, float, float]]:
    """Setting, ratio without and with entropy coding, mean and worst rise of the error, at each point of a curve."""
    rows = record["seeds"]
    points = []
    for same in zip(*(row["curves"][curve] for row in rows), strict=True):
        fixed, coded = (float(np.mean([rows[0]["bytes"] / point[at] for point in same])) for at in (1, 2))
        rises = [point[3] - row["dense"] for point, row in zip(same, rows, strict=True)]
        points.append((same[0][0], fixed, coded, float(np.mean(rises)), max(rises)))
    return points


def _one(plan: Plan, seed: int, *, progress: Progress | None) -> dict[str, Any]:
    data = load_data("mnist", seed=seed)
    dense = train_dense("lenet_300_100", plan.dense, BATCH, data, seed, progress)
    curves: dict[str, list[list[float]]] = {curve: [] for curve in CURVES}

    def retrain(model: nn.Module, training: Training, words: str) -> None:
        prune.rescale_dropout(model)
        train(model, training, data, BATCH, seed + 1, progress, words)

    def read(curve: str, setting: float, model: nn.Module, bits: int | None) -> None:
        finished = finalize(copy.deepcopy(model))
        curves[curve].append([setting, _fixed(finished, bits), _coded(finished), _error(finished, data)])

    def share(curve: str, setting: float, model: nn.Module, bits: int) -> None:
        shared = quantize.kmeans(copy.deepcopy(model), bits)
        retrain(shared, plan.share, f"{curve}, {setting:g}")
        read(curve, setting, shared, bits)

    for bits in plan.bits:
        share("share", bits, dense, bits)
    for part in plan.ranks:
        factored = _factored(copy.deepcopy(dense), part)
        retrain(factored, plan.factored, f"SVD, {part:g}")
        read("SVD", part, factored, None)
        share("SVD and share", part, factored, BITS)
    pruned = copy.deepcopy(dense)
    for kept in plan.kept:
        prune.magnitude(pruned, 1 - kept, scope="global")
        retrain(pruned, plan.retrain, f"prune, {kept:g}")
        read("prune", kept, pruned, None)
        share("prune and share", kept, pruned, BITS)
    numbers = sum(parameter.numel() for parameter in dense.parameters())
    return {"dense": _error(dense, data), "bytes": 4 * numbers, "curves": curves}


def _factored(model: nn.Module, part: float) -> nn.Module:
    """The model with fc1 and fc2 as two layers each, their product the nearest of its rank to the weight."""
    for name in ("fc1", "fc2"):
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        rows, columns = layer.weight.shape
        rank = max(1, int(part * rows * columns / (rows + columns)))
        left, values, right = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
        first, second = nn.Linear(columns, rank, bias=False), nn.Linear(rank, rows)
        root = values[:rank].sqrt()
        first.weight = nn.Parameter(root[:, None] * right[:rank])
        second.weight = nn.Parameter(left[:, :rank] * root)
        second.bias = layer.bias
        model.set_submodule(name, nn.Sequential(first, second))
    return model


def _fixed(model: nn.Module, bits: int | None) -> float:
    """Bytes without entropy coding, by the form each weight has: dense or sparse, of floats or of codes."""
    total = 0.0
    for parameter in model.parameters():
        weight = parameter.detach().flatten()
        if parameter.dim() < 2:
            total += 4 * weight.numel()
            continue
        entries = 0 if bits is None else len(weight.unique())
        value_bits = 32 if bits is None else bits
        _, fillers = gap_counts(weight.nonzero().flatten().numpy(), GAP_BITS)
        sparse = fixed_bytes(int(weight.count_nonzero()) + fillers, value_bits, GAP_BITS, entries)
        total += min(sparse, fixed_bytes(weight.numel(), value_bits, 0, entries))
    return total


def _coded(model: nn.Module) -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.terse"
        save(model, path)
        return path.stat().st_size


def _error(model: nn.Module, data: Dataset) -> float:
    error: float = error_rate(model, data.validation_images, data.validation_labels)
    return 100 * error


ROWS = [
    Reproduction(
        "accuracy_ratio",
        "Deep Compression 2016, figure 6: accuracy against ratio of pruning, sharing, SVD, and together",
        run,
        table,
        draw,
    )
]
