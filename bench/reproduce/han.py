"""Han et al.'s two LeNet rows on MNIST: twelve times fewer parameters at no more error, by pruning and retraining.

All choices were made on 5,000 held-out training images, which the seed draws; the test images are read once for each
seed, at the end, for the dense network and for the pruned one.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

from tersetorch.bench.reproduce.runs import How, Reproduction, over_seeds
from tersetorch.costs import activation_density
from tersetorch.methods import finalize, prune
from tersetorch.recipes.deep_compression import Training
from tersetorch.zoo import Dataset, LeNet5, LeNet300100, error_rate, fit
from tersetorch.zoo import load as load_data

# Han, Pool, Tran, Dally, Learning both weights and connections (2015), tables 1, 3 and 4: errors in percent, parameters
# in thousands, and for each layer the percentages of activations that are not zero, weights kept and operations left.
PAPER: dict[str, dict[str, Any]] = {
    "lenet_300_100": {
        "error_dense": 1.64,
        "error_pruned": 1.59,
        "parameters": 267_000,
        "nonzeros": 22_000,
        "ratio": 12,
        "layers": {"fc1": [38, 8, 8], "fc2": [65, 9, 4], "fc3": [100, 26, 17]},
    },
    "lenet_5": {
        "error_dense": 0.80,
        "error_pruned": 0.77,
        "parameters": 431_000,
        "nonzeros": 36_000,
        "ratio": 12,
        "layers": {"conv1": [82, 66, 66], "conv2": [72, 12, 10], "fc1": [55, 8, 6], "fc2": [100, 19, 10]},
    },
}
FIGURES = {
    "error_dense": "least",
    "error_pruned": "least",
    "error_rise": "least",
    "nonzeros": "least",
    "ratio": "most",
}
# Rates after hidden layers of the dense network, where the papers' LeNet-5 has none.
DROPOUT = {"lenet_300_100": 0.3, "lenet_5": 0.5}
TITLES = {"lenet_300_100": "LeNet-300-100", "lenet_5": "LeNet-5"}


@dataclass(frozen=True)
class Plan:
    """How a network is trained and pruned.

    Attributes:
        batch_size: images a step, in every training.
        dense: the training of the dense network.
        kept: part of each layer's weights that is left.
        rounds: prunings, with retraining after each; after round r of R, (1 - r / R)^3 of what goes is still there.
        retrain: the training after each round.
        last: the training after the last round.
    """

    batch_size: int
    dense: Training
    kept: dict[str, float]
    rounds: int
    retrain: Training
    last: Training


def full_plan(network: str) -> Plan:
    """The plan behind the reproduction: chosen on held-out training images of MNIST."""
    if network == "lenet_300_100":
        return Plan(
            batch_size=128,
            dense=Training(epochs=30, lr=0.1, weight_decay=5e-5, input_dropout=0.1),
            kept={"fc1": 0.075, "fc2": 0.09, "fc3": 0.26},
            rounds=5,
            retrain=Training(epochs=5, lr=0.1, weight_decay=1e-4, input_dropout=0.2),
            last=Training(epochs=35, lr=0.1, weight_decay=1e-4, input_dropout=0.2),
        )
    return Plan(
        batch_size=128,
        dense=Training(epochs=20, lr=0.05, weight_decay=5e-4),
        kept={"conv1": 0.66, "conv2": 0.12, "fc1": 0.075, "fc2": 0.19},
        rounds=3,
        retrain=Training(epochs=2, lr=0.03, weight_decay=5e-4),
        last=Training(epochs=20, lr=0.05, weight_decay=5e-4),
    )


def quick_plan(network: str) -> Plan:
    """The full plan with one epoch where it has more, and a single round."""
    plan = full_plan(network)
    dense, last = (each.model_copy(update={"epochs": 1}) for each in (plan.dense, plan.last))
    return Plan(plan.batch_size, dense, plan.kept, 1, last, last)


def run(network: str, how: How) -> dict[str, Any]:
    """Trains and prunes a network once for each seed.

    Args:
        network: "lenet_300_100" or "lenet_5".
        how: seeds, workers and the like.

    Returns:
        JSON-able record, see over_seeds. A row holds errors in percent on held-out and test images, parameters left,
        their ratio to the dense network's, and the paper's columns for each layer, activations counted on held-out
        images.

    Raises:
        ValueError: there are no seeds, or no workers.
        FileNotFoundError: MNIST is not in the folder that TERSETORCH_DATA names.
    """
    plan = quick_plan(network) if how.quick else full_plan(network)
    described = {
        "network": network,
        "batch_size": plan.batch_size,
        "dropout": DROPOUT[network],
        "kept": plan.kept,
        "rounds": plan.rounds,
        **{name: getattr(plan, name).model_dump() for name in ("dense", "retrain", "last")},
    }
    record: dict[str, Any] = over_seeds(
        f"han_{network}", partial(_one, network, plan), how, described, PAPER[network], FIGURES
    )
    return record


def table(record: dict[str, Any]) -> Table:
    """The record beside the paper's row; percentages of each layer, in the layers' order."""
    return beside_paper(record, ("activations not 0", "weights kept", "operations left"), "{:.0f}")


def beside_paper(record: dict[str, Any], of_layers: Sequence[str], shown_as: str) -> Table:
    """Errors and sizes of a record beside the paper's row, and what its layers say under the names of_layers."""
    shown = Table(
        "",
        "error dense",
        "error pruned",
        "parameters left",
        "smaller",
        *of_layers,
        title=TITLES[record["plan"]["network"]],
    )
    rows = [("paper", record["paper"])]
    rows += [(f"seed {row['seed']}", row) for row in record["seeds"]]
    rows += [(name, record[name]) for name in ("mean", "worst")]
    for name, row in rows:
        layers = zip(*row["layers"].values(), strict=True) if "layers" in row else [()] * len(of_layers)
        shown.add_row(
            name,
            f"{row['error_dense']:.2f} %",
            f"{row['error_pruned']:.2f} %",
            f"{row['nonzeros']:,.0f}",
            f"{row['ratio']:.1f}x",
            *(" / ".join(map(shown_as.format, layer)) for layer in layers),
        )
    return shown


def _one(network: str, plan: Plan, seed: int, *, progress: Progress | None) -> dict[str, Any]:
    data = load_data("mnist", seed=seed)
    dense = train_dense(network, plan.dense, plan.batch_size, data, seed, progress)
    pruned = copy.deepcopy(dense)

    def retrain(model: nn.Module, index: int) -> None:
        prune.rescale_dropout(model)
        training = plan.last if index == plan.rounds else plan.retrain
        words = f"retrain, round {index} of {plan.rounds}"
        train(model, training, data, plan.batch_size, seed + index, progress, words)

    parts = [1 - (1 - index / plan.rounds) ** 3 for index in range(1, plan.rounds + 1)]
    sparsities = [{name: part * (1 - kept) for name, kept in plan.kept.items()} for part in parts]
    prune.iterative(pruned, sparsities, retrain)
    finalize(pruned)
    return measured(dense, pruned, data)


def train_dense(
    network: str, training: Training, batch_size: int, data: Dataset, seed: int, progress: Progress | None
) -> nn.Module:
    """The dense network of that name."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        rate = DROPOUT[network]
        dense: nn.Module = (
            LeNet300100(data.in_features, data.classes, rate) if network == "lenet_300_100" else LeNet5(dropout=rate)
        )
    # An epoch of LeNet-5 takes two thirds of the time so.
    dense.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    train(dense, training, data, batch_size, seed, progress, "train the dense network")
    return dense


def train(
    model: nn.Module,
    training: Training,
    data: Dataset,
    batch_size: int,
    seed: int,
    progress: Progress | None,
    words: str,
) -> None:
    """Fit with the words of a Training."""
    fit(
        model,
        data.train_images,
        data.train_labels,
        **dict(training),
        batch_size=batch_size,
        seed=seed,
        progress=progress,
        description=words,
    )


def measured(dense: nn.Module, pruned: nn.Module, data: Dataset) -> dict[str, Any]:
    """What a seed's row says of a dense network and the pruned one."""

    def errors(images: Tensor, labels: Tensor) -> dict[str, float]:
        return {name: 100 * error_rate(model, images, labels) for name, model in (("dense", dense), ("pruned", pruned))}

    validation, test = (
        errors(data.validation_images, data.validation_labels),
        errors(data.test_images, data.test_labels),
    )
    total = sum(parameter.numel() for parameter in pruned.parameters())
    nonzeros = sum(int(parameter.count_nonzero()) for parameter in pruned.parameters())
    handed = activation_density(pruned, list(data.validation_images.split(1000)))
    names = list(handed)
    layers = {}
    for index, (name, layer) in enumerate(prune.density(pruned).items()):
        leaves = handed[names[index + 1]].density if index + 1 < len(names) else 1.0
        layers[name] = [100 * leaves, 100 * layer.density, 100 * layer.density * handed[name].density]
    return {
        "validation": validation,
        "error_dense": test["dense"],
        "error_pruned": test["pruned"],
        "error_rise": test["pruned"] - test["dense"],
        "nonzeros": nonzeros,
        "ratio": total / nonzeros,
        "layers": layers,
    }


ROWS = [
    Reproduction(
        f"han_{network}",
        f"Han et al. 2015: {TITLES[network]} with 12 times fewer parameters",
        partial(run, network),
        table,
    )
    for network in PAPER
]
