"""How shared weights begin, and how many values they get: Deep Compression's figure 8, on LeNet-300-100.

The network is pruned as in the row of Deep Compression, by a shorter plan. Each point shares its weights by one
initialisation at one number of bits, zero being one of the 2^bits values, and then trains the values. Errors are read
on 5,000 held-out training images, which the seed draws; nothing is chosen, and the test images are not read.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

from rich.progress import Progress
from rich.table import Table
from torch import nn

from tersetorch.bench.reproduce.runs import How, Reproduction, over_seeds
from tersetorch.methods import finalize, prune, quantize
from tersetorch.methods.quantize.kmeans_1d import Init
from tersetorch.methods.selection import select
from tersetorch.recipes.deep_compression import DeepCompressionRecipe, PruneStage, Training
from tersetorch.recipes.lenet import LeNetPlan, compress_lenet, full_plan, quick_plan, train_lenet
from tersetorch.reports.figure import figure_class
from tersetorch.zoo import Dataset, error_rate, fit
from tersetorch.zoo import load as load_data

# Han, Mao, Dally, Deep Compression (2016), figure 8: AlexNet at 2 to 8 bits.
PAPER = {"ordering": "linear is the best of linear, density and random at every number of bits but 3"}
INITS: tuple[Init, ...] = get_args(Init)
KINDS = ("", ", values trained")
BITS: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)


def run(how: How) -> dict[str, Any]:
    """Shares a pruned network's weights in every way, once for each seed.

    Returns:
        JSON-able record, see over_seeds. A row holds the errors in percent of the dense and the pruned network and, for
        each initialisation, lists over the bits: "error" as shared, "trained" after the values' training, and
        "distortion", the squared error of all weights over their sum of squares.

    Raises:
        ValueError: there are no seeds, or no workers.
        FileNotFoundError: MNIST is not in the folder that TERSETORCH_DATA names.
    """
    bits: tuple[int, ...]
    if how.quick:
        plan, bits, epochs = _shorter(quick_plan(load_data("mnist", seed=0)), dense=1, prune=2, ramp=1), (2, 5), 1
    else:
        plan = replace(_shorter(full_plan(), dense=12, prune=14, ramp=8), batch_size=256)
        bits, epochs = BITS, 1
    training = Training(epochs=epochs, lr=5e-4, optimizer="adam")
    described = {
        "batch_size": plan.batch_size,
        "dropout": plan.dropout,
        "dense": plan.dense.model_dump(),
        "recipe": plan.recipe.model_dump(exclude_none=True),
        "bits": list(bits),
        "values": training.model_dump(),
    }
    record: dict[str, Any] = over_seeds(
        "initialisation",
        partial(_one, plan, bits, training),
        how,
        described,
        PAPER,
        {"dense": "least", "pruned": "least"},
    )
    return record


def table(record: dict[str, Any]) -> Table:
    """The mean rise of the held-out error over the pruned network's: as shared, and after training the values."""
    shown = Table("bits", *(f"{init}{kind}" for kind in KINDS for init in INITS), title="LeNet-300-100, pruned: points")
    for index, bits in enumerate(record["plan"]["bits"]):
        cells = [f"{_rises(record, init, kind)[index]:+.2f}" for kind in ("error", "trained") for init in INITS]
        shown.add_row(str(bits), *cells)
    return shown


def draw(record: dict[str, Any], path: Path) -> None:
    """Draws the curves as an SVG or PNG file: left as shared, right with trained values.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    figure = figure_class("initialisation")(figsize=(9, 4), layout="constrained")
    titles = {"error": "as shared", "trained": "values trained"}
    for axes, (kind, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        for init, marker in zip(INITS, "osv^", strict=True):
            axes.plot(
                record["plan"]["bits"], _rises(record, init, kind), marker=marker, markersize=4, label=init, alpha=0.8
            )
        axes.axhline(0, color="0.6", linewidth=1, linestyle="--")
        axes.set(title=title, xlabel="bits", ylabel="rise of the held-out error, points")
    axes.legend(fontsize="small")
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _rises(record: dict[str, Any], init: str, kind: str) -> list[float]:
    """The mean over the seeds at each number of bits."""
    rises = [[error - row["pruned"] for error in row["curves"][init][kind]] for row in record["seeds"]]
    return [statistics.mean(at) for at in zip(*rises, strict=True)]


def _shorter(plan: LeNetPlan, *, dense: int, prune: int, ramp: int) -> LeNetPlan:
    """The plan with these epochs, up to pruning."""
    stage = plan.recipe.prune
    assert stage is not None and stage.train is not None
    train = stage.train.model_copy(update={"epochs": prune})
    pruned = PruneStage(sparsity=stage.sparsity, ramp_epochs=ramp, train=train)
    return replace(
        plan, dense=plan.dense.model_copy(update={"epochs": dense}), recipe=DeepCompressionRecipe(prune=pruned)
    )


def _one(
    plan: LeNetPlan, bits: Sequence[int], training: Training, seed: int, *, progress: Progress | None
) -> dict[str, Any]:
    data = load_data("mnist", seed=seed)
    dense = train_lenet(data, plan, seed=seed, progress=progress)
    row: dict[str, Any] = {"dense": _error(dense, data)}
    pruned = finalize(compress_lenet(dense, data, plan, seed=seed, progress=progress))
    row["pruned"] = _error(pruned, data)
    before = [target.weight.double() for target in select("initialisation", pruned, None, None)]
    total = sum(float(weight.square().sum()) for weight in before)
    curves: dict[str, dict[str, list[float]]] = {}
    for init in INITS:
        curves[init] = {"error": [], "trained": [], "distortion": []}
        for width in bits:
            # The mask keeps what is pruned at zero while the values train.
            shared = quantize.kmeans(prune.magnitude(copy.deepcopy(pruned), 0.0), width, init=init, seed=seed)
            after = [target.weight.double() for target in select("initialisation", shared, None, None)]
            lost = sum(float((new - old).square().sum()) for new, old in zip(after, before, strict=True))
            curves[init]["distortion"].append(lost / total)
            curves[init]["error"].append(_error(shared, data))
            fit(
                shared,
                data.train_images,
                data.train_labels,
                **dict(training),
                batch_size=plan.batch_size,
                seed=seed + 1,
                progress=progress,
                description=f"train the values: {init}, {width} bits",
            )
            curves[init]["trained"].append(_error(shared, data))
    return row | {"curves": curves}


def _error(model: nn.Module, data: Dataset) -> float:
    error: float = error_rate(model, data.validation_images, data.validation_labels)
    return 100 * error


ROWS = [
    Reproduction(
        "initialisation",
        "Deep Compression 2016, figure 8: initialisations of shared values at 2 to 8 bits",
        run,
        table,
        draw,
    )
]
