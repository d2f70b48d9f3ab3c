"""Gupta et al. (2015): networks that train in 16-bit fixed point, rounded to the nearest and at random, beside float.

Weights, biases, activations, gradients and updates are numbers of <16 - FL, FL>, for FL from 14 down to 8; the layers'
inputs and outputs of the CNNs have a format of their own, as in the paper. Every run is copied before its last epochs,
and the copy goes on with four more fractional bits everywhere, so 20 in all: the paper's late switch. The order of
images, the initial weights and the rates are the same for all runs of a seed; one or two rates were tried with the
float network on held-out images, and no other choice is made.

Momentum is kept in float, and what a step makes of a weight is rounded; losses are means over a batch.

What is shorter than in the paper stands in PLANS, and in each record.
"""

from __future__ import annotations

import copy
import json
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

from tersetorch.bench.reproduce.images import Images, cifar10
from tersetorch.bench.reproduce.runs import How, Reproduction, over_seeds
from tersetorch.formats import FixedFormat
from tersetorch.formats.fixed_format import as_fixed
from tersetorch.methods.quantize import fixed_point, switch_fixed_point
from tersetorch.ops import ROUNDINGS
from tersetorch.reports.figure import figure_class
from tersetorch.zoo import error_rate
from tersetorch.zoo import load as load_data

BITS, WIDE = 16, 20
FRACTION_BITS = (14, 12, 10, 8)
FLOAT = "float"
# What a run is called when it has gone on in 20 bits.
SWITCHED = "_switched"

# Test errors in percent, section 4: FL 14 and 12 at random; "fails" is the paper's word for the nearest.
PAPER: dict[str, dict[str, Any]] = {
    "mnist_dnn": {
        "float": 1.4,
        "claim": "to the nearest FL 14 comes close, and 10 and 8 fail; at random 14, 10 and 8 stay near float",
    },
    "mnist_cnn": {
        "float": 0.77,
        "stochastic_14": 0.83,
        "stochastic_12": 0.90,
        "claim": "to the nearest training fails",
    },
    "cifar_cnn": {
        "float": 24.6,
        "stochastic_14": 25.4,
        "stochastic_12": 28.8,
        "claim": "to the nearest training fails; a late switch to 20 bits makes up for the rest",
    },
}
TITLES = {
    "mnist_dnn": "MNIST, two hidden layers of ReLU",
    "mnist_cnn": "MNIST, a CNN",
    "cifar_cnn": "CIFAR-10, a CNN of three convolutions",
}


@dataclass(frozen=True)
class Plan:
    """How every network of a row is trained.

    Attributes:
        shortened: what is shorter than in the paper.
        width: hidden units of the DNN, filters of CIFAR-10's CNN.
        images: so many of the training images.
        epochs: passes over them, in the one format.
        switched_epochs: as many as the last of them are taken again in 20 bits.
        lr: the first epoch's rate.
        fall: each epoch's rate over the one before.
        momentum, weight_decay: of SGD.
        activations: the format of layers' inputs and outputs; the weights' when it is None.
        batch_size: images a step.
    """

    shortened: str
    width: int
    images: int
    epochs: int
    switched_epochs: int
    lr: float
    fall: float
    momentum: float = 0.9
    weight_decay: float = 5e-4
    activations: str | None = None
    batch_size: int = 100

    def described(self) -> dict[str, Any]:
        """As JSON can hold it."""
        found: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return found


PLANS = {
    "mnist_dnn": Plan(
        "5 epochs of 15,000 images", 1000, 15_000, 5, 1, lr=0.3, fall=0.8, momentum=0.0, weight_decay=0.0
    ),
    "mnist_cnn": Plan("5 epochs of 20,000 images", 16, 20_000, 5, 1, lr=0.02, fall=0.8, activations="<6,10>"),
    "cifar_cnn": Plan(
        "16 filters where the paper has 64; 5 epochs of 12,000 images, which went through lossy JPEG, so that only our "
        "own figures compare",
        16, 12_000, 5, 1, lr=0.04, fall=0.8, activations="<4,12>",
    ),
}  # fmt: skip


def quick_plan(data: str) -> Plan:
    """A narrow network, few images."""
    return replace(PLANS[data], width=8, images=1000, epochs=2)


# ---- the runs


def run(data: str, how: How) -> dict[str, Any]:
    """Trains a network in float and in every format, once for each seed.

    Args:
        data: a key of PLANS.
        how: seeds, workers and the like.

    Returns:
        JSON-able record, see over_seeds. A row holds each run's test error in percent: "float", "nearest_14" and so on,
        and "nearest_14_switched" for what has gone on in 20 bits; and "held_out": the same names' errors of held-out
        training images.

    Raises:
        ValueError: there are no seeds, or no workers.
        FileNotFoundError: the images are not in the folder that TERSETORCH_DATA names.
    """
    plan = quick_plan(data) if how.quick else PLANS[data]
    record: dict[str, Any] = over_seeds(
        f"fixed_{data}",
        partial(_one, data, plan),
        how,
        {"data": data, "fraction_bits": FRACTION_BITS, **plan.described()},
        PAPER[data],
        dict.fromkeys(names(), "least"),
    )
    return record


def names() -> list[str]:
    """The runs of a seed."""
    fixed = [f"{rounding}_{bits}" for rounding in ROUNDINGS for bits in FRACTION_BITS]
    return [FLOAT, *(name + switched for name in fixed for switched in ("", SWITCHED))]


def table(record: dict[str, Any]) -> Table:
    """Each format's error, and that after the switch, to the nearest and at random."""
    plan = record["plan"]
    headings = ["weights"] + [f"{rounding}{end}" for rounding in ROUNDINGS for end in ("", f", then {WIDE} bits")]
    shown = Table(
        *headings,
        "paper, stochastic",
        title=f"{TITLES[plan['data']]}: test error",
        caption=f"The paper: {record['paper']['claim']}. Shortened: {plan['shortened']}.",
    )
    shown.add_row(FLOAT, _cell(record, FLOAT), "", "", "", f"{FLOAT}: {record['paper'][FLOAT]} %")
    for bits in FRACTION_BITS:
        cells = [_cell(record, f"{rounding}_{bits}{end}") for rounding in ROUNDINGS for end in ("", SWITCHED)]
        published = record["paper"].get(f"stochastic_{bits}")
        shown.add_row(str(_format(bits)), *cells, "" if published is None else f"{published} %")
    return shown


def _cell(record: dict[str, Any], name: str) -> str:
    errors = [row[name] for row in record["seeds"]]
    spread = f" ± {statistics.stdev(errors):.2f}" if len(errors) > 1 else ""
    return f"{record['mean'][name]:.2f}{spread} %"


def draw(record: dict[str, Any], path: Path) -> None:
    """Draws the mean test errors over the fractional bits as an SVG or PNG file, float's as a line.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    figure = figure_class("fixed_point")(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for rounding, colour, marker in zip(ROUNDINGS, ("C3", "C0"), "so", strict=True):
        for end, words, line in (("", "", "-"), (SWITCHED, f", then {WIDE} bits", ":")):
            errors = [record["mean"][f"{rounding}_{bits}{end}"] for bits in FRACTION_BITS]
            axes.plot(FRACTION_BITS, errors, line, color=colour, marker=marker, markersize=4, label=rounding + words)
    axes.axhline(record["mean"][FLOAT], color="0.6", linewidth=1, linestyle="--", label=FLOAT)
    axes.set(xlabel=f"fractional bits of {BITS}", ylabel="test error, %", yscale="log", xticks=FRACTION_BITS)
    axes.legend(fontsize="small")
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


# ---- one seed


class Run:
    """A network and its optimizer, in float where no rounding is named."""

    def __init__(self, data: str, plan: Plan, seed: int, rounding: str | None = None, fraction_bits: int = 0) -> None:
        self._plan = plan
        self._seed = seed
        self._bits = fraction_bits
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = BUILD[data](plan.width)
        if rounding is not None:
            fixed_point(self.model, _format(fraction_bits), rounding=rounding, activations=plan.activations, seed=seed)
        self._optimizer = torch.optim.SGD(
            self.model.parameters(), plan.lr, plan.momentum, weight_decay=plan.weight_decay, foreach=True
        )

    def train(self, part: tuple[Tensor, Tensor], epochs: range, progress: Progress | None, words: str) -> None:
        """Takes these epochs; the order of an epoch's images depends on the seed and its number."""
        plan = self._plan
        images, labels = part
        steps = len(images) // plan.batch_size
        task = None if progress is None else progress.add_task(words, total=len(epochs) * steps)
        self.model.train()
        for epoch in epochs:
            for group in self._optimizer.param_groups:
                group["lr"] = plan.lr * plan.fall**epoch
            order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1000 * self._seed + epoch))
            for rows in order[: steps * plan.batch_size].split(plan.batch_size):
                loss = functional.cross_entropy(self.model(images[rows]), labels[rows])
                self._optimizer.zero_grad()
                loss.backward()
                self._optimizer.step()
                if progress is not None and task is not None:
                    progress.advance(task)

    def switched(self) -> Run:
        """A copy that goes on in 20 bits."""
        other = copy.deepcopy(self)
        activations = self._plan.activations
        wider = None if activations is None else _wider(as_fixed("fixed_point", "activations", activations))
        switch_fixed_point(other.model, _wider(_format(self._bits)), activations=wider)
        return other


def _one(data: str, plan: Plan, seed: int, *, progress: Progress | None) -> dict[str, Any]:
    images = IMAGES[data](seed, plan.images)
    train = images.train
    early, late = range(plan.epochs - plan.switched_epochs), range(plan.epochs - plan.switched_epochs, plan.epochs)
    runs = {FLOAT: Run(data, plan, seed)}
    runs[FLOAT].train(train, range(plan.epochs), progress, FLOAT)
    for rounding in ROUNDINGS:
        for bits in FRACTION_BITS:
            name = f"{rounding}_{bits}"
            one = runs[name] = Run(data, plan, seed, rounding, bits)
            one.train(train, early, progress, name)
            other = runs[name + SWITCHED] = one.switched()
            one.train(train, late, progress, name)
            other.train(train, late, progress, name + SWITCHED)
    return {
        **{name: 100 * error_rate(each.model, *images.test) for name, each in runs.items()},
        "held_out": {name: 100 * error_rate(each.model, *images.held_out) for name, each in runs.items()},
    }


def _format(fraction_bits: int) -> FixedFormat:
    return FixedFormat(BITS - fraction_bits, fraction_bits)


def _wider(format: FixedFormat) -> FixedFormat:
    return FixedFormat(format.integer_bits, format.fraction_bits + WIDE - BITS)


# ---- networks and images


def _dnn(width: int) -> nn.Module:
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.01 if parameter.dim() > 1 else 0.0)
    return model


def _mnist_cnn(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(256, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def _cifar_cnn(width: int) -> nn.Module:
    layers: list[nn.Module] = []
    for channels in (3, width, width):
        layers += [nn.Conv2d(channels, width, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    # A step takes two thirds of the time so.
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * width, 10))
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def _mnist(seed: int, count: int) -> Images:
    data = load_data("mnist", seed=seed)
    return Images(
        (data.train_images[:count], data.train_labels[:count]),
        (data.validation_images, data.validation_labels),
        (data.test_images, data.test_labels),
    )


def _cifar(seed: int, images: int) -> Images:
    return cifar10(seed, images, memory_format=torch.channels_last)


IMAGES: Mapping[str, Callable[[int, int], Images]] = {"mnist_dnn": _mnist, "mnist_cnn": _mnist, "cifar_cnn": _cifar}
BUILD: Mapping[str, Callable[[int], nn.Module]] = {
    "mnist_dnn": _dnn,
    "mnist_cnn": _mnist_cnn,
    "cifar_cnn": _cifar_cnn,
}

ROWS = [
    Reproduction(
        f"fixed_{data}",
        f"Gupta et al. 2015: {TITLES[data]}, in 16-bit fixed point and in float",
        partial(run, data),
        table,
        draw,
    )
    for data in PLANS
]
