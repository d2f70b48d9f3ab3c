"""Dynamic Network Surgery's two LeNet rows on MNIST: how few non-zeros are left, and at what error.

All choices were made on 5,000 held-out training images, which the seed draws; the test images are read once for each
seed, at the end, for the dense network and for the pruned one. Where we differ from the paper: layers are cut more than
once, each time from what the last surgery left; magnitude pruning then trims them to a number of weights, which the
thresholds alone do not decide; and the network trains on at fixed masks.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

from rich.progress import Progress
from rich.table import Table
from torch import nn

from tersetorch.bench.reproduce.han import DROPOUT, FIGURES, TITLES, beside_paper, measured, train_dense
from tersetorch.bench.reproduce.runs import How, Reproduction, over_seeds
from tersetorch.methods import finalize, prune
from tersetorch.recipes.deep_compression import Training
from tersetorch.zoo import Dataset, fit, steps_per_epoch
from tersetorch.zoo import load as load_data

# Guo, Yao, Chen, Dynamic Network Surgery (2016), table 1: errors in percent, and how many times fewer parameters.
# The non-zeros of each layer's weight and bias are counted in the models that the authors published.
PAPER: dict[str, dict[str, Any]] = {
    "lenet_300_100": {
        "error_dense": 2.28,
        "error_pruned": 1.99,
        "ratio": 56,
        "parameters": 266_610,
        "nonzeros": 4_988,
        "layers": {"fc1": [4_351, 30], "fc2": [552, 6], "fc3": [49, 0]},
    },
    "lenet_5": {
        "error_dense": 0.91,
        "error_pruned": 0.91,
        "ratio": 108,
        "parameters": 431_080,
        "nonzeros": 3_993,
        "layers": {"conv1": [72, 2], "conv2": [770, 9], "fc1": [2_920, 3], "fc2": [215, 2]},
    },
}
# The masks rest in the last part of each surgery's training.
REST = 0.2


@dataclass(frozen=True)
class Cut:
    """One surgery, and the training in which it happens.

    Attributes:
        c_rate: as DynamicSurgery takes it, for each layer that it cuts; the others train on as they are.
        train: the training.
    """

    c_rate: dict[str, float]
    train: Training


@dataclass(frozen=True)
class Plan:
    """How a network is trained and cut.

    Attributes:
        batch_size: images a step, in every training.
        dense: the training of the dense network.
        gamma: as DynamicSurgery takes it.
        cuts: the surgeries, in turn.
        kept: weights of each layer that are left at most, after them.
        last: the training at fixed masks after that.
    """

    batch_size: int
    dense: Training
    gamma: float
    cuts: tuple[Cut, ...]
    kept: dict[str, int]
    last: Training


def full_plan(network: str) -> Plan:
    """The plan behind the reproduction: from trials on held-out training images of MNIST."""
    if network == "lenet_300_100":
        surgery = Training(epochs=16, lr=0.1, weight_decay=3e-4, input_dropout=0.05)
        return Plan(
            batch_size=128,
            dense=Training(epochs=30, lr=0.1, weight_decay=5e-5, input_dropout=0.1),
            gamma=1e-4,
            cuts=(
                Cut({"fc1": 3.0, "fc2": 3.0, "fc3": 2.0}, surgery),
                Cut({"fc1": 0.3, "fc2": 0.3}, surgery),
            ),
            kept={"fc1": 3_800, "fc2": 720, "fc3": 140},
            last=Training(epochs=70, lr=0.1, weight_decay=3e-4, input_dropout=0.1),
        )
    surgery = Training(epochs=6, lr=0.05, weight_decay=3e-4)
    return Plan(
        batch_size=128,
        dense=Training(epochs=20, lr=0.05, weight_decay=5e-4),
        gamma=1e-4,
        cuts=(
            Cut({"conv1": 0.7, "conv2": 1.5}, surgery),
            Cut({"fc1": 4.5, "fc2": 1.5}, surgery),
            Cut({"conv1": 0.0, "conv2": 0.3, "fc1": 0.5, "fc2": 0.2}, surgery),
            Cut({"conv2": 0.1, "fc1": 0.5, "fc2": 0.1}, surgery),
        ),
        kept={"conv1": 76, "conv2": 800, "fc1": 2_760, "fc2": 225},
        last=Training(epochs=20, lr=0.05, weight_decay=1e-4),
    )


def quick_plan(network: str) -> Plan:
    """The full plan with one epoch where it has more, and each layer's first surgery alone."""
    plan = full_plan(network)
    seen: set[str] = set()
    cuts = []
    for cut in plan.cuts:
        if not seen >= set(cut.c_rate):
            cuts.append(Cut(cut.c_rate, cut.train.model_copy(update={"epochs": 1})))
            seen |= set(cut.c_rate)
    dense, last = (each.model_copy(update={"epochs": 1}) for each in (plan.dense, plan.last))
    return Plan(plan.batch_size, dense, plan.gamma, tuple(cuts), plan.kept, last)


def run(network: str, how: How) -> dict[str, Any]:
    """Trains and cuts a network once for each seed.

    Args:
        network: "lenet_300_100" or "lenet_5".
        how: seeds, workers and the like.

    Returns:
        JSON-able record, see over_seeds. A row holds errors in percent on held-out and test images, parameters that are
        not zero, the dense network's ratio to them, and for each layer those of its weight and of its bias.

    Raises:
        ValueError: there are no seeds, or no workers.
        FileNotFoundError: MNIST is not in the folder that TERSETORCH_DATA names.
    """
    plan = quick_plan(network) if how.quick else full_plan(network)
    described = {
        "network": network,
        "batch_size": plan.batch_size,
        "dropout": DROPOUT[network],
        "dense": plan.dense.model_dump(),
        "gamma": plan.gamma,
        "rest": REST,
        "cuts": [{"c_rate": cut.c_rate, "train": cut.train.model_dump()} for cut in plan.cuts],
        "kept": plan.kept,
        "last": plan.last.model_dump(),
    }
    record: dict[str, Any] = over_seeds(
        f"dns_{network}", partial(_one, network, plan), how, described, PAPER[network], FIGURES
    )
    return record


def table(record: dict[str, Any]) -> Table:
    """The record beside the paper's row; what is left of each layer, in the layers' order."""
    shown: Table = beside_paper(record, ("weights left", "biases left"), "{:,}")
    return shown


def _one(network: str, plan: Plan, seed: int, *, progress: Progress | None) -> dict[str, Any]:
    data = load_data("mnist", seed=seed)
    dense = train_dense(network, plan.dense, plan.batch_size, data, seed, progress)
    pruned = finalize(operate(copy.deepcopy(dense), plan, data, seed, progress))
    layers = {
        name: [int(tensor.count_nonzero()) for tensor in layer.parameters()]
        for name, layer in pruned.named_children()
        if name in PAPER[network]["layers"]
    }
    row: dict[str, Any] = measured(dense, pruned, data)
    return row | {"layers": layers}


def operate(pruned: nn.Module, plan: Plan, data: Dataset, seed: int, progress: Progress | None) -> nn.Module:
    """Cuts a dense network by plan, in place; returns it with its parametrizations live."""
    for index, cut in enumerate(plan.cuts, 1):
        steps = cut.train.epochs * steps_per_epoch(len(data.train_images), plan.batch_size)
        surgery = prune.DynamicSurgery(
            pruned,
            dict(cut.c_rate),
            gamma=plan.gamma,
            iter_stop=max(1, round((1 - REST) * steps)),
            biases=True,
            seed=seed,
        )
        prune.rescale_dropout(pruned)
        words = f"surgery {index} of {len(plan.cuts)}: {', '.join(cut.c_rate)}"
        _train(pruned, cut.train, plan, data, seed + index, progress, words, surgery)
    sizes = {name: layer.total for name, layer in prune.density(pruned).items()}
    prune.magnitude(pruned, {name: 1 - kept / sizes[name] for name, kept in plan.kept.items()})
    prune.rescale_dropout(pruned)
    _train(pruned, plan.last, plan, data, seed + len(plan.cuts) + 1, progress, "train at fixed masks")
    return pruned


def _train(
    model: nn.Module,
    training: Training,
    plan: Plan,
    data: Dataset,
    seed: int,
    progress: Progress | None,
    words: str,
    surgery: prune.DynamicSurgery | None = None,
) -> None:
    fit(
        model,
        data.train_images,
        data.train_labels,
        **dict(training),
        batch_size=plan.batch_size,
        seed=seed,
        after_step=None if surgery is None else surgery.step,
        progress=progress,
        description=words,
    )


ROWS = [
    Reproduction(
        f"dns_{network}",
        f"Dynamic Network Surgery 2016: {TITLES[network]} with {PAPER[network]['ratio']} times fewer parameters",
        partial(run, network),
        table,
    )
    for network in PAPER
]
