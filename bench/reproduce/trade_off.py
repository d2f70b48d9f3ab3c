"""Han et al.'s trade-off curves: what L1, L2, retraining and iteration each buy, on LeNet-300-100 and MNIST.

The paper draws them for AlexNet. Every point is read on 5,000 held-out training images, which the seed draws; the test
images are not read.
"""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

from rich.progress import Progress
from rich.table import Table
from torch import nn

from tersetorch.bench.reproduce.han import train, train_dense
from tersetorch.bench.reproduce.runs import How, Reproduction, over_seeds
from tersetorch.methods import prune
from tersetorch.recipes.deep_compression import Training
from tersetorch.reports.figure import figure_class
from tersetorch.zoo import Dataset, error_rate
from tersetorch.zoo import load as load_data

# Han, Pool, Tran, Dally, Learning both weights and connections (2015), figure 5 and the text beside it.
PAPER = {
    "ordering": [
        "L1 without retraining loses less than L2 without",
        "L2 with retraining loses less than L1 with",
        "L2 pruned iteratively loses least",
    ],
    "free": {"without retraining": 0.5, "with retraining": 0.9},
}
CURVES = ("L2", "L1", "L1 retrained", "L2 retrained", "L2 iterative")
SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99)
BATCH = 128
PENALTIES: dict[str, dict[str, float]] = {"L2": {"weight_decay": 2e-4}, "L1": {"l1_penalty": 1e-5}}


def run(how: How) -> dict[str, Any]:
    """Draws the five curves once for each seed.

    Returns:
        JSON-able record, see over_seeds. A row holds the dense networks' errors by penalty and, for each curve, [part
        of the weights pruned, error in percent] at each point, in order.

    Raises:
        ValueError: there are no seeds, or no workers.
        FileNotFoundError: MNIST is not in the folder that TERSETORCH_DATA names.
    """
    epochs, again = (1, 1) if how.quick else (20, 6)
    sparsities = (0.5, 0.9) if how.quick else SPARSITIES
    plan = {"epochs": epochs, "retrain_epochs": again, "sparsities": list(sparsities), "penalties": PENALTIES}
    one = partial(_one, epochs, again, sparsities)
    record: dict[str, Any] = over_seeds("trade_off", one, how, plan, PAPER, {"L1 dense": "least", "L2 dense": "least"})
    return record


def table(record: dict[str, Any]) -> Table:
    """The mean rise of the error over the dense network's, for each curve and sparsity."""
    shown = Table("pruned", *CURVES, title="LeNet-300-100: rise of the held-out error, mean of the seeds, points")
    for index, sparsity in enumerate(record["plan"]["sparsities"]):
        shown.add_row(f"{100 * sparsity:g} %", *(f"{_rise(record, curve, index):+.2f}" for curve in CURVES))
    return shown


def draw(record: dict[str, Any], path: Path) -> None:
    """Draws the curves as an SVG or PNG file.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    figure = figure_class("trade_off")(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    pruned = [100 * sparsity for sparsity in record["plan"]["sparsities"]]
    for curve, style in zip(CURVES, ("o--", "s--", "s-", "o-", "^-"), strict=True):
        axes.plot(pruned, [_rise(record, curve, at) for at in range(len(pruned))], style, markersize=4, label=curve)
    axes.axhline(0, color="0.6", linewidth=1)
    axes.set(xlabel="weights pruned, %", ylabel="rise of the held-out error, points", ylim=(-0.5, 5))
    axes.legend(fontsize="small")
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _rise(record: dict[str, Any], curve: str, index: int) -> float:
    rises: list[float] = [row["curves"][curve][index][1] - row[f"{curve[:2]} dense"] for row in record["seeds"]]
    return sum(rises) / len(rises)


def _one(
    epochs: int, again: int, sparsities: tuple[float, ...], seed: int, *, progress: Progress | None
) -> dict[str, Any]:
    data = load_data("mnist", seed=seed)
    row: dict[str, Any] = {}
    curves: dict[str, list[list[float]]] = {}
    for penalty, factors in PENALTIES.items():
        dense = train_dense(
            "lenet_300_100",
            Training.model_validate({"epochs": epochs, "lr": 0.1, **factors}),
            BATCH,
            data,
            seed,
            progress,
        )
        row[f"{penalty} dense"] = _error(dense, data)
        curves[penalty], curves[f"{penalty} retrained"] = [], []
        retrain = partial(
            _retrain, Training.model_validate({"epochs": again, "lr": 0.05, **factors}), data, seed, progress
        )
        for sparsity in sparsities:
            pruned = prune.magnitude(copy.deepcopy(dense), sparsity, scope="global")
            curves[penalty].append([sparsity, _error(pruned, data)])
            retrain(pruned, f"{penalty}, {sparsity:g} pruned")
            curves[f"{penalty} retrained"].append([sparsity, _error(pruned, data)])
        if penalty == "L2":
            curves["L2 iterative"] = []
            for sparsity in sparsities:
                prune.magnitude(dense, sparsity, scope="global")
                retrain(dense, f"iteratively, {sparsity:g} pruned")
                curves["L2 iterative"].append([sparsity, _error(dense, data)])
    return row | {"curves": curves}


def _retrain(
    training: Training, data: Dataset, seed: int, progress: Progress | None, model: nn.Module, words: str
) -> None:
    prune.rescale_dropout(model)
    train(model, training, data, BATCH, seed + 1, progress, words)


def _error(model: nn.Module, data: Dataset) -> float:
    error: float = error_rate(model, data.validation_images, data.validation_labels)
    return 100 * error


ROWS = [Reproduction("trade_off", "Han et al. 2015, figure 5: L1, L2, retraining, iteration", run, table, draw)]
