"""Flattened convolutions beside dense ones: error, weights and time of the paper's network on MNIST and CIFAR-10.

Three 5x5 convolutions and two linear layers. Trained from scratch, once dense and once with its second and third
convolution as two stages of 1-D filters each. These begin as nn.FlattenedConv2d does, so that what a stage hands on has
the variance of what it takes; as nn.Conv2d does, uniform in +-1 / sqrt(numbers of a filter), which leaves a third of it
at each filter; or as the paper's code does, +-1 / sqrt(input maps) for filters along maps too, which after both layers
leaves 1e-8 of what tells images apart, below the rounding of biases: it cannot learn, at the paper's widths neither,
and is given one epoch.
Which beginning it is is chosen by the error on 5,000 held-out training images, which the seed draws; so is the least
rank at which the trained dense network's filters, decomposed and fine-tuned, are within a point of it. Optimizers,
rates and dropout were chosen on held-out images of seed 100, with fewer epochs. The test images are read once for the
dense network and for what is chosen.

Shorter than the paper: 32, 48 and 64 maps where it has 96, 128 and 256, few images, few epochs; CIFAR-10 images went
through lossy JPEG, so that published errors do not compare. Weights are counted and forward passes timed at the
paper's widths too, with fresh weights: times do not depend on the numbers. Filters of narrow networks are shorter and
save less: C * 25 numbers become (C + 10) + (F + 10).

Timed in turns, one process: the dense network as it is and in channels_last, the chain of torch's 1-D convolutions in
both, and ours, the fused kernel as convert(plan=...) builds it, in both. A ratio is the fastest dense over the fastest
of ours.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

from tersetorch.bench.reproduce.images import Images, cifar10
from tersetorch.bench.reproduce.runs import How, Reproduction, over_seeds
from tersetorch.bench.timing import interleave
from tersetorch.conversion import convert
from tersetorch.methods import factorize
from tersetorch.nn import FlattenedConv2d
from tersetorch.recipes.deep_compression import Training
from tersetorch.reports.figure import figure_class
from tersetorch.zoo import FlattenedCNN, error_rate, fit
from tersetorch.zoo import load as load_data

# Jin, Dundar, Culurciello (2014): abstract, and its table of accuracies, here as errors in percent.
PAPER: dict[str, dict[str, Any]] = {
    "mnist": {"dense": 0.38, "flattened": 0.44, "weights": [8, 10], "speedup": 2.0},
    "cifar": {"dense": 13.58, "flattened": 12.96, "weights": [8, 10], "speedup": 2.0},
}
TITLES = {"mnist": "MNIST", "cifar": "CIFAR-10"}
# Of an image: channels and pixels a side.
SHAPES = {"mnist": (1, 28), "cifar": (3, 32)}
PAPER_WIDTHS = (96, 128, 256)
CONVOLUTIONS = ("conv1", "conv2", "conv3")
FLATTENED = CONVOLUTIONS[1:]
HOPELESS = "as the paper's code"
BEGINNINGS = ("variance kept", "as nn.Conv2d's", HOPELESS)
RANKS = (1, 2, 4, 8)
RISE = 1.0
BATCHES = (1, 64)
PART_SECONDS = 4.0
PARTS = ("network", "convolutions", *FLATTENED)


class Plan(NamedTuple):
    """How the networks of a row are trained.

    Attributes:
        data: "mnist" or "cifar".
        widths: maps of the three convolutions.
        hidden: units of the hidden linear layer.
        dropout: before both linear layers.
        images: training images, at most.
        dense: training of the dense network.
        flattened: training of the flattened one, whichever its beginning; one epoch of it where that is hopeless.
        tuned: what follows the decomposition.
        ranks: of the decompositions.
        seconds: that each part is timed for at each batch.
    """

    data: str
    widths: tuple[int, int, int]
    hidden: int
    dropout: float
    images: int
    dense: Training
    flattened: Training
    tuned: Training
    ranks: tuple[int, ...] = RANKS
    seconds: float = PART_SECONDS
    batch_size: int = 64

    def described(self) -> dict[str, Any]:
        """As JSON can hold it."""
        trainings = {name: getattr(self, name).model_dump() for name in ("dense", "flattened", "tuned")}
        return self._asdict() | trainings


def full_plan(data: str) -> Plan:
    """The plan behind a row."""
    return PLANS[data]


def quick_plan(data: str) -> Plan:
    """A narrow network, one epoch of a few images."""
    once = {name: getattr(PLANS[data], name).model_copy(update={"epochs": 1}) for name in ("dense", "flattened")}
    return PLANS[data]._replace(**once, widths=(4, 8, 8), hidden=16, images=512, ranks=(1, 2), seconds=0.02)


def run(data: str, how: How) -> dict[str, Any]:
    """Trains, decomposes and fine-tunes once for each seed; then counts and times.

    Args:
        data: "mnist" or "cifar".
        how: seeds, workers and the like.

    Returns:
        JSON-able record, see over_seeds; errors in percent. A row holds "dense" and "dense_test", "dense_tuned" (held
        out, after the training that decompositions get), "flattened": beginning -> held-out error, "begun": the one
        chosen, "flattened_test", "converted": list of {rank, weights, left_out, error, tuned}, the network's
        convolution weights, what the decomposition leaves out of each layer, and held-out errors; and "chosen": a
        member of it with its "test" error, or None. "weights": "trained" and "paper", convolution weights [dense,
        flattened] at both widths. "times": list of {part, batch, ms: name -> median}.

    Raises:
        ValueError: there are no seeds, or no workers.
        FileNotFoundError: the images are not in the folder that TERSETORCH_DATA names.
    """
    plan = quick_plan(data) if how.quick else full_plan(data)
    figures = {"dense_test": "least", "flattened_test": "least"}
    record: dict[str, Any] = over_seeds(
        f"flattened_{data}", partial(_one, plan), how, plan.described(), PAPER[data], figures
    )
    weights = {
        words: [_weights(_network(plan, kind, widths=widths)) for kind in (False, True)]
        for words, widths in (("trained", plan.widths), ("paper", PAPER_WIDTHS))
    }
    return record | {"weights": weights, "times": _times(plan)}


def table(record: dict[str, Any]) -> Table:
    """Errors, weights and times of every network; of several seeds the mean, and the worst in brackets."""
    paper, rows = record["paper"], record["seeds"]
    (dense, flat), (wide_dense, wide_flat) = (record["weights"][widths] for widths in ("trained", "paper"))
    heads = ["", "paper's error", "test error", "held out", "before tuning", "convolution weights", "fewer"]
    faster = ["network faster", "convolutions faster"]
    shown = Table(
        *heads, "fewer, paper's widths", *faster, title=TITLES[record["plan"]["data"]], caption=_caption(record)
    )
    dense_errors = [_mean([row[key] for row in rows]) for key in ("dense_test", "dense")]
    shown.add_row("dense", f"{paper['dense']} %", *dense_errors, "", f"{dense:,}")
    tuned = _mean([row["dense_tuned"] for row in rows])
    shown.add_row("dense, tuned as the ranks", "", "", tuned, dense_errors[1], f"{dense:,}")
    for begun in BEGINNINGS:
        shown.add_row(
            f"flattened, {begun}",
            f"{paper['flattened']} %",
            _tested([row["flattened_test"] for row in rows if row["begun"] == begun], len(rows)),
            _mean([row["flattened"][begun] for row in rows]),
            "",
            f"{flat:,}",
            f"{dense / flat:.1f}x",
            f"{wide_dense / wide_flat:.1f}x",
            *(", ".join(f"{ratio:.1f}x" for ratio in _speedups(record, part)) for part in PARTS[:2]),
        )
    for index, rank in enumerate(record["plan"]["ranks"]):
        points = [row["converted"][index] for row in rows]
        chosen = [row["chosen"] for row in rows if row["chosen"] is not None and row["chosen"]["rank"] == rank]
        errors = [_mean([point[key] for point in points]) for key in ("tuned", "error")]
        weights = points[0]["weights"]
        tested = _tested([point["test"] for point in chosen], len(rows))
        shown.add_row(f"dense as rank {rank}", "", tested, *errors, f"{weights:,}", f"{dense / weights:.1f}x")
    return shown


def draw(record: dict[str, Any], path: Path) -> None:
    """Draws held-out errors over convolution weights, and times at the paper's widths, as an SVG or PNG file.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    figure = figure_class("flattened")(figsize=(10, 4), layout="constrained")
    errors, times = figure.subplots(1, 2)
    rows = record["seeds"]
    dense, flat = record["weights"]["trained"]
    errors.scatter([dense] * len(rows), [row["dense"] for row in rows], marker="o", label="dense")
    for begun, marker in zip(BEGINNINGS, "s^v", strict=True):
        errors.scatter(
            [flat] * len(rows), [row["flattened"][begun] for row in rows], marker=marker, label=f"flattened, {begun}"
        )
    for key, words in (("error", "dense by rank, as it is"), ("tuned", "dense by rank, fine-tuned")):
        points = list(zip(*(row["converted"] for row in rows), strict=True))
        xs = [point[0]["weights"] for point in points]
        errors.plot(xs, [statistics.mean(each[key] for each in point) for point in points], marker=".", label=words)
    errors.set(xlabel="convolution weights", ylabel="held-out error, %", xscale="log", yscale="log")
    for label in (errors.yaxis.set_major_formatter, errors.yaxis.set_minor_formatter):
        label("{x:g}")
    errors.legend(fontsize="small")
    labels = []
    for place, row in enumerate(record["times"]):
        labels.append(f"{row['part']}, {row['batch']}")
        for offset, form in enumerate(FORMS):
            ms = min(value for name, value in row["ms"].items() if name.removesuffix(LAST) == form)
            whole = min(value for name, value in row["ms"].items() if name.removesuffix(LAST) == "dense")
            times.barh(place + 0.27 * (offset - 1), ms / whole, 0.25, color=f"C{offset}", label=None if place else form)
    times.set(yticks=range(len(labels)), yticklabels=labels, xlabel="time over the dense one's, at the paper's widths")
    times.invert_yaxis()
    times.legend(fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(FORMS))
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _caption(record: dict[str, Any]) -> str:
    plan = record["plan"]
    widths = "-".join(map(str, plan["widths"]))
    return (
        f"Trained: {widths} maps, {plan['images']:,} images, {plan['dense']['epochs']} epochs, and "
        f"{plan['tuned']['epochs']} to tune. Faster, at the paper's 96-128-256 maps, the fastest dense over ours: "
        f"one image, {BATCHES[1]} images."
    )


def _mean(values: list[float]) -> str:
    worst = f" ({max(values):.2f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f} %{worst}"


def _tested(values: list[float], seeds: int) -> str:
    """Of the seeds that chose it."""
    if not values:
        return ""
    return _mean(values) + (f", {len(values)} of {seeds} seeds" if len(values) < seeds else "")


def _speedups(record: dict[str, Any], part: str) -> list[float]:
    """The fastest dense form's time over ours, for each batch."""
    ratios = []
    for row in record["times"]:
        if row["part"] == part:
            best = {
                form: min(ms for name, ms in row["ms"].items() if name.removesuffix(LAST) == form) for form in FORMS
            }
            ratios.append(best["dense"] / best["fused"])
    return ratios


# ---- one seed


def _one(plan: Plan, seed: int, *, progress: Progress | None) -> dict[str, Any]:
    data = IMAGES[plan.data](seed, plan.images)
    train = data.train
    dense = _fitted(plan, _network(plan, False, seed), train, plan.dense, seed, progress, "dense")
    row: dict[str, Any] = {"dense": _error(dense, data.held_out), "dense_test": _error(dense, data.test)}
    tuned = _fitted(plan, copy.deepcopy(dense), train, plan.tuned, seed + 1, progress, "dense, longer")
    row["dense_tuned"] = _error(tuned, data.held_out)
    flattened = {}
    for begun in BEGINNINGS:
        model = _network(plan, True, seed)
        _begin(model, begun, seed)
        training = plan.flattened if begun != HOPELESS else plan.flattened.model_copy(update={"epochs": 1})
        flattened[begun] = _fitted(plan, model, train, training, seed, progress, f"flattened, {begun}")
    row["flattened"] = {begun: _error(model, data.held_out) for begun, model in flattened.items()}
    row["begun"] = min(BEGINNINGS, key=row["flattened"].__getitem__)
    row["flattened_test"] = _error(flattened[row["begun"]], data.test)
    row["converted"], row["chosen"] = [], None
    for rank in plan.ranks:
        left_out: dict[str, float] = {}
        model = factorize.flatten(
            copy.deepcopy(dense), rank, targets=[f"{name}.weight" for name in FLATTENED], errors=left_out
        )
        point = {"rank": rank, "weights": _weights(model), "left_out": left_out, "error": _error(model, data.held_out)}
        _fitted(plan, model, train, plan.tuned, seed + 1, progress, f"rank {rank}")
        point["tuned"] = _error(model, data.held_out)
        row["converted"].append(point)
        if row["chosen"] is None and point["tuned"] <= row["dense"] + RISE:
            row["chosen"] = point | {"test": _error(model, data.test)}
    return row


def _fitted(
    plan: Plan,
    model: nn.Module,
    train: tuple[Tensor, ...],
    training: Training,
    seed: int,
    progress: Progress | None,
    words: str,
) -> nn.Module:
    more: dict[str, Any] = {"progress": progress, "description": words}
    images, labels = train
    return fit(model, images, labels, **dict(training), batch_size=plan.batch_size, seed=seed, **more).eval()


def _network(plan: Plan, flattened: bool, seed: int = 0, widths: tuple[int, int, int] | None = None) -> nn.Module:
    channels, size = SHAPES[plan.data]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = FlattenedCNN(
            channels,
            size,
            widths=widths or plan.widths,
            hidden=plan.hidden if widths is None else 256,
            dropout=plan.dropout,
            flattened=flattened,
        )
    # An epoch of the dense one takes two thirds of the time so.
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


@torch.no_grad()
def _begin(model: nn.Module, begun: str, seed: int) -> None:
    """Draws the 1-D filters and their biases anew."""
    if begun == BEGINNINGS[0]:
        return
    generator = torch.Generator().manual_seed(seed)
    for layer in [module for module in model.modules() if isinstance(module, FlattenedConv2d)]:
        for stage in range(layer.stages):
            lateral, vertical, horizontal, *biases = layer.filters(stage)
            for weight, bias in zip((lateral, vertical, horizontal), biases, strict=True):
                numbers = weight.shape[1] if begun == BEGINNINGS[1] or weight is lateral else len(weight)
                for parameter in (weight, bias):
                    assert parameter is not None
                    parameter.uniform_(-(numbers**-0.5), numbers**-0.5, generator=generator)


def _weights(model: nn.Module) -> int:
    """Of the convolutions, without biases."""
    layers = [model.get_submodule(name) for name in CONVOLUTIONS]
    return sum(
        parameter.numel() for layer in layers for name, parameter in layer.named_parameters() if "bias" not in name
    )


def _error(model: nn.Module, part: tuple[Tensor, Tensor]) -> float:
    error: float = error_rate(model, *part)
    return 100 * error


# ---- times

LAST = ", channels_last"
FORMS = ("dense", "chain", "fused")


@torch.no_grad()
def _times(plan: Plan) -> list[dict[str, Any]]:
    """Median milliseconds of the network, of all before its linear layers, and of single layers, at full widths."""
    dense, chain = (_network(plan, kind, widths=PAPER_WIDTHS).eval() for kind in (False, True))
    fused = convert(chain, plan=dict.fromkeys(FLATTENED, "flattened_conv2d"))
    rows = []
    for part in PARTS:
        for batch in BATCHES:
            calls: dict[str, Callable[[], object]] = {}
            for form, whole in zip(FORMS, (dense, chain, fused), strict=True):
                for suffix, order in (("", torch.contiguous_format), (LAST, torch.channels_last)):
                    model = copy.deepcopy(whole).to(memory_format=order)  # type: ignore[call-overload]
                    x = _input(plan, part, batch).contiguous(memory_format=order)
                    calls[form + suffix] = partial(_part(model, part), x)
            times = interleave(calls, plan.seconds)
            rows.append({"part": part, "batch": batch, "ms": {name: each["median_ms"] for name, each in times.items()}})
    return rows


def _part(model: nn.Module, part: str) -> nn.Module:
    children = dict(model.named_children())
    if part == "convolutions":
        names = list(children)
        return nn.Sequential(*(children[name] for name in names[: names.index("flatten")]))
    return children.get(part, model)


def _input(plan: Plan, part: str, batch: int) -> Tensor:
    channels, size = SHAPES[plan.data]
    if part in FLATTENED:
        place = FLATTENED.index(part)
        channels, size = PAPER_WIDTHS[place], size // 2 ** (place + 1)
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(0))


# ---- images


def _mnist(seed: int, images: int) -> Images:
    data = load_data("mnist", seed=seed)
    return Images(
        (2 * data.train_images[:images] - 1, data.train_labels[:images]),
        (2 * data.validation_images - 1, data.validation_labels),
        (2 * data.test_images - 1, data.test_labels),
    )


def _cifar(seed: int, images: int) -> Images:
    return cifar10(seed, images, memory_format=torch.channels_last)


IMAGES: Mapping[str, Callable[[int, int], Images]] = {"mnist": _mnist, "cifar": _cifar}
PLANS = {
    data: Plan(
        data,
        widths=(32, 48, 64),
        hidden=128,
        dropout=0.3,
        images=10_000,
        dense=Training(epochs=6, lr=0.05, weight_decay=5e-4),
        flattened=Training(epochs=6, lr=0.003, weight_decay=0.01, optimizer="adam"),
        tuned=Training(epochs=1, lr=0.001, weight_decay=0.01, optimizer="adam"),
    )
    for data in PAPER
}

ROWS = [
    Reproduction(
        f"flattened_{data}",
        f"Jin et al. 2014: flattened convolutions beside dense ones on {TITLES[data]}",
        partial(run, data),
        table,
        draw,
    )
    for data in PAPER
]
