"""Optimal Brain Damage's deletion curves: random, by magnitude, by saliency; with and without retraining.

The network is the paper's, with its 2,578 free parameters, 2,520 of them weights: two convolutions of shared weights,
the second one partly connected, averaging with a trained coefficient after each, one layer of outputs, and
1.7159 tanh(2 a / 3) everywhere. It learns 9,300 digits by the squared error of ten outputs against +1 and -1. All
choices were made on 5,000 held-out training images; the test images are read once for each seed, at the end, for the
networks of the claims.

Without retraining, all is deleted at once by saliencies taken once, as in the paper's figure 1: the quadratic model
that they come from is trusted far beyond the small deletions it is made for, and the curve's right half shows it. With
retraining, saliencies are taken anew before each deletion of a tenth of the weights.
"""

from __future__ import annotations

import copy
import statistics
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

from tersetorch.bench.reproduce.runs import How, Reproduction, over_seeds
from tersetorch.methods import prune
from tersetorch.methods.prune.magnitude import apply_masks, choose, masks
from tersetorch.methods.prune.second_derivatives import Form
from tersetorch.reports.figure import figure_class
from tersetorch.zoo import load as load_data

# LeCun, Denker, Solla, Optimal Brain Damage (1990), figures 1 and 2 and the text beside them.
PAPER: dict[str, Any] = {
    "parameters": 2578,
    "training_images": 9300,
    "ordering": "the saliency curve lies below the magnitude curve; random deletion is off the chart",
    "prediction_holds_to": 0.30,
    "retraining_holds_to": 0.60,
}
METHODS = ("random", "magnitude", "saliency")
# Ratios, see _claims.
CLAIMS = (
    "rise over magnitude's at 30 %",
    "rise over random's at 30 %",
    "measured over predicted at 30 %",
    "retrained over dense at 60 %",
    "retrained over magnitude's at 60 %",
    "retrained over random's at 60 %",
)
CLASSES = 10
BATCH = 128
EVALUATION_BATCH = 1000
STEP = 0.05
# The last part of the weights to be deleted in the curves.
LAST = 0.95


class Net(nn.Module):
    """The network of 2,578 free parameters: [N, 1, 28, 28] to [N, 10].

    Of the second convolution's 12 maps 4 see one map each and 8 see two, 20 kernels in all, as the paper's count asks.

    Source:
        LeCun et al., Handwritten digit recognition with a back-propagation network (1990), whose
        network Optimal Brain Damage prunes. Which maps a map of the second convolution sees is ours to choose: the
        count alone is given there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 5)
        self.pool1 = Averaging(4)
        self.conv2_single = nn.Conv2d(4, 4, 5, groups=4)
        self.conv2_double = nn.Conv2d(4, 8, 5, groups=2)
        self.pool2 = Averaging(12)
        self.out = nn.Linear(12 * 4 * 4, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Ten outputs, +1 for the class of the image and -1 for the others."""
        x = self.pool1(squash(self.conv1(images)))
        x = self.pool2(squash(torch.cat([self.conv2_single(x), self.conv2_double(x)], 1)))
        return squash(self.out(x.flatten(1)))


class Averaging(nn.Module):
    """The mean of 2 x 2 values times a trained coefficient of the map, plus its bias, squashed."""

    def __init__(self, maps: int) -> None:
        super().__init__()
        self.coefficient = nn.Parameter(torch.ones(maps))
        self.bias = nn.Parameter(torch.zeros(maps))

    def forward(self, x: Tensor) -> Tensor:
        """Halves height and width."""
        return squash(functional.avg_pool2d(x, 2) * self.coefficient[:, None, None] + self.bias[:, None, None])


def squash(x: Tensor) -> Tensor:
    """The paper's units: 1.7159 tanh(2 a / 3)."""
    return 1.7159 * torch.tanh(x * (2 / 3))


def run(how: How) -> dict[str, Any]:
    """Trains the network once for each seed and deletes its weights in every way.

    Returns:
        JSON-able record, see over_seeds. A row holds the curves (parts deleted, squared error summed over the ten
        outputs, in training and held-out images), the errors of the networks of the claims in test images, and the
        claims as ratios that should be small.

    Raises:
        ValueError: there are no seeds, or no workers.
        FileNotFoundError: MNIST is not in the folder that TERSETORCH_DATA names.
    """
    plan = Plan(images=500, epochs=1, retraining_epochs=1) if how.quick else Plan()
    best = dict.fromkeys(CLAIMS, "least")
    record: dict[str, Any] = over_seeds("optimal_brain_damage", partial(_one, plan), how, asdict(plan), PAPER, best)
    return record


def table(record: dict[str, Any]) -> Table:
    """Squared errors by the part deleted, the mean of the seeds, then what the paper claims."""
    kinds = [(kind, method) for kind in ("without", "with") for method in METHODS]
    shown = Table(title="Optimal Brain Damage: squared error on training images, * after retraining")
    shown.add_column("deleted", no_wrap=True)
    for name in (*(f"{method}{'*' * (kind == 'with')}" for kind, method in kinds), "predicted"):
        shown.add_column(name, justify="right")
    rows = record["seeds"]

    def cell(part: float, kind: str, method: str, figure: str = "train_error") -> str:
        means = _means(record, kind, method, figure)
        return f"{means[part]:.3f}" if part in means else ""

    dense = f"{statistics.mean(row['dense']['train_error'] for row in rows):.3f}"
    shown.add_row("0 %", *[dense] * 7)
    for part in rows[0]["curves"]["without"]["random"]["deleted"]:
        cells = [cell(part, kind, method) for kind, method in kinds]
        shown.add_row(f"{100 * part:.0f} %", *cells, cell(part, "without", "saliency", "predicted_error"))
    for claim in CLAIMS:
        shown.add_row(claim, f"{record['mean'][claim]:.2f}", "worst", f"{record['worst'][claim]:.2f}", *[""] * 4)
    return shown


def draw(record: dict[str, Any], path: Path) -> None:
    """Draws the curves as an SVG or PNG file: left without retraining, right with it.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    figure = figure_class("optimal_brain_damage")(figsize=(9, 4), layout="constrained")
    titles = {"without": "not retrained", "with": "retrained"}
    for axes, (kind, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        curves = {method: _means(record, kind, method) for method in METHODS}
        if kind == "without":
            curves["predicted"] = _means(record, kind, "saliency", "predicted_error")
        for (name, curve), style in zip(curves.items(), ("^-", "s-", "o-", "k:"), strict=False):
            axes.plot([100 * part for part in curve], list(curve.values()), style, markersize=4, label=name)
        axes.set(title=title, xlabel="weights deleted, %", ylabel="squared error on training images", yscale="log")
        axes.legend(fontsize="small")
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _means(record: dict[str, Any], kind: str, method: str, figure: str = "train_error") -> dict[float, float]:
    """The mean over the seeds at each part deleted."""
    curves = [row["curves"][kind][method] for row in record["seeds"]]
    parts = zip(curves[0]["deleted"], *(curve[figure] for curve in curves), strict=True)
    return {part: statistics.mean(values) for part, *values in parts}


@dataclass(frozen=True)
class Plan:
    """What was chosen on the held-out images.

    Attributes:
        images: to learn from.
        epochs: of the first training.
        lr: its Adam's rate at the start; it falls to 0 along a cosine.
        retraining_step: part of the weights deleted before each retraining.
        retraining_epochs: of each retraining.
        retraining_lr: its rate at the start.
        form: of the second derivatives.
    """

    images: int = PAPER["training_images"]
    epochs: int = 30
    lr: float = 0.01
    retraining_step: float = 0.1
    retraining_epochs: int = 4
    retraining_lr: float = 0.003
    form: Form = "levenberg_marquardt"


@dataclass(frozen=True)
class Digits:
    """Images in the network's range, and targets +1 for the class and -1 for the others."""

    images: Tensor
    targets: Tensor

    @classmethod
    def of(cls, images: Tensor, labels: Tensor) -> Digits:
        """Background -0.1, strokes up to 1.175: about mean 0 and variance 1."""
        return cls(images * 1.275 - 0.1, functional.one_hot(labels, CLASSES).to(images.dtype) * 2 - 1)

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """All of them in order."""
        return list(zip(self.images.split(EVALUATION_BATCH), self.targets.split(EVALUATION_BATCH), strict=True))


def _one(plan: Plan, seed: int, *, progress: Progress | None) -> dict[str, Any]:
    data = load_data("mnist", seed=seed)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(data.train_images), generator=generator)[: plan.images]
    train = Digits.of(data.train_images[rows], data.train_labels[rows])
    held_out = Digits.of(data.validation_images, data.validation_labels)
    test = Digits.of(data.test_images, data.test_labels)
    parts = _parts(plan.retraining_step)
    task = None if progress is None else progress.add_task(f"seed {seed}", total=1 + len(METHODS) * len(parts))

    def trained(net: Net, epochs: int, lr: float, number: int) -> Net:
        _train(net, train, epochs, lr, 1000 * seed + number)
        if progress is not None and task is not None:
            progress.advance(task)
        return net

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        dense = Net()
    trained(dense, plan.epochs, plan.lr, 0)
    found = prune.saliencies(dense, train.batches(), "sse", form=plan.form)
    prediction = found.curve()
    without: dict[str, dict[str, list[float]]] = {}
    claimed: dict[str, Net] = {"dense": dense}
    for method in METHODS:
        scores = _scores(dense, method, found, generator)
        nets = {part: _delete(copy.deepcopy(dense), scores, part) for part in _parts(STEP)}
        without[method] = _curve(nets, train, held_out)
        if method == "saliency":
            without[method]["predicted_error"] = [
                found.loss + float(prediction[round(part * (len(prediction) - 1))]) for part in nets
            ]
            claimed["not_retrained"] = nets[PAPER["prediction_holds_to"]]
    retrained: dict[str, dict[str, list[float]]] = {}
    for method in METHODS:
        net = copy.deepcopy(dense)
        nets = {}
        for number, part in enumerate(parts, 1):
            latest = prune.saliencies(net, train.batches(), "sse", form=plan.form) if method == "saliency" else found
            _delete(net, _scores(net, method, latest, generator), part)
            nets[part] = copy.deepcopy(trained(net, plan.retraining_epochs, plan.retraining_lr, number))
        retrained[method] = _curve(nets, train, held_out)
        claimed[f"retrained_{method}"] = nets[PAPER["retraining_holds_to"]]
    curves = {"without": without, "with": retrained}
    return {
        **_claims(curves, found.loss),
        "curves": curves,
        "dense": {"train_error": _error(dense, train), "validation_error": _error(dense, held_out)},
        "test": {
            name: {"error": _error(net, test), "wrong_percent": 100 * _wrong(net, test)}
            for name, net in claimed.items()
        },
    }


def _claims(curves: dict[str, dict[str, dict[str, list[float]]]], dense: float) -> dict[str, float]:
    """Ratios that should be small: below 1 where ways of deletion are compared, near 1 for the other two."""

    def at(kind: str, method: str, part: float, name: str = "train_error") -> float:
        curve = curves[kind][method]
        return curve[name][curve["deleted"].index(part)]

    holds, kept = PAPER["prediction_holds_to"], PAPER["retraining_holds_to"]
    rises = {method: at("without", method, holds) - dense for method in METHODS}
    figures = (
        rises["saliency"] / rises["magnitude"],
        rises["saliency"] / rises["random"],
        at("without", "saliency", holds) / at("without", "saliency", holds, "predicted_error"),
        at("with", "saliency", kept) / dense,
        at("with", "saliency", kept) / at("with", "magnitude", kept),
        at("with", "saliency", kept) / at("with", "random", kept),
    )
    return dict(zip(CLAIMS, figures, strict=True))


def _parts(step: float) -> list[float]:
    return [round(step * count, 2) for count in range(1, int(LAST / step + 1e-9) + 1)]


def _scores(net: Net, method: str, found: prune.Saliencies, generator: torch.Generator) -> dict[str, Tensor]:
    """What each way of deletion ranks the weights by."""
    weights = {target.name: target.weight for target, _ in choose("reproduction", net, 0.0, "global", None, None)}
    if method == "random":
        return {name: torch.rand(weight.shape, generator=generator) for name, weight in weights.items()}
    if method == "magnitude":
        return {name: weight.abs() for name, weight in weights.items()}
    return {name: each.clamp(min=0) for name, each in found.saliency.items()}


def _delete(net: Net, scores: dict[str, Tensor], part: float) -> Net:
    """Deletes weights of least score, of all layers together, until part of them are deleted; deleted ones stay so."""
    chosen = choose("reproduction", net, part, "global", None, None)
    apply_masks(chosen, masks(chosen, [scores[target.name] for target, _ in chosen], "global", None))
    return net


def _train(net: Net, digits: Digits, epochs: int, lr: float, seed: int) -> None:
    optimizer = torch.optim.Adam(net.parameters(), lr)
    batches = max(1, len(digits.images) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(digits.images), generator=generator).split(BATCH)[:batches]:
            loss = (net(digits.images[rows]) - digits.targets[rows]).square().sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def _curve(nets: dict[float, Net], train: Digits, held_out: Digits) -> dict[str, list[float]]:
    return {
        "deleted": list(nets),
        "train_error": [_error(net, train) for net in nets.values()],
        "validation_error": [_error(net, held_out) for net in nets.values()],
    }


@torch.no_grad()
def _error(net: Net, digits: Digits) -> float:
    """The squared error summed over the outputs, the mean over the images."""
    total = sum(float((net(x) - wanted).double().square().sum()) for x, wanted in digits.batches())
    return total / len(digits.images)


@torch.no_grad()
def _wrong(net: Net, digits: Digits) -> float:
    wrong = sum(int((net(x).argmax(1) != wanted.argmax(1)).sum()) for x, wanted in digits.batches())
    return wrong / len(digits.images)


ROWS = [
    Reproduction(
        "optimal_brain_damage",
        "Optimal Brain Damage 1990, figures 1 and 2: which deletion costs least",
        run,
        table,
        draw,
    )
]
