"""Layers of low rank: what error they cost at which size, as they are and after fine-tuning.

Two networks. LeNet-300-100 on MNIST: all three layers by truncated SVD, whose ranks one ratio for the whole network
chooses. A CNN for CIFAR-10 images, 32-64-64 filters of 5x5 and two linear layers: its second convolution, which takes
most of the multiply-accumulates, by every form of factors at several sizes; the first by few colours. Fine-tuned as the
paper does: the approximated layer and all below it stand still, the rest trains. The CNN is trained on 20,000 images,
fine-tuned on 6,000. They are lossy JPEGs, so errors are not the published data's. Errors of every point are read on
held-out training images, 5,000 of CIFAR-10, which the seed draws. The test images are read for the dense network and
for what is chosen: of each form the smallest size whose fine-tuned held-out error is at most a point above the dense
network's.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
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
from tersetorch.costs import count
from tersetorch.methods import factorize
from tersetorch.recipes.deep_compression import Training
from tersetorch.reports.figure import figure_class
from tersetorch.zoo import LeNet300100, error_rate, fit
from tersetorch.zoo import load as load_data

# Denton et al. (2014), section 4: of a network for ImageNet; Han et al. (2015), table 6, quotes the 5x.
PAPER = {
    "claim": "2x faster convolutions within a point of error; 2 to 3 times fewer weights in them, 5 to 13 in FC layers",
    "speedup": 2.0,
    "rise": 1.0,
    "linear": 5.0,
}
RATIOS = (2.0, 3.0, 5.0, 8.0, 13.0, 20.0)
BATCH = 128
# The convolution that is approximated, and the one that colours are for.
SECOND, FIRST = "3", "0"
TIMED_SECONDS = 1.0
TICKS = (1, 1.5, 2, 3, 4, 5, 6, 8, 10, 13, 20, 30, 50, 80)

Approximate = Callable[[nn.Module], object]


class Plan(NamedTuple):
    """How long is trained.

    Attributes:
        dense: the network.
        tuned: what is left of it after an approximation.
        images: of these, at most.
        tuned_images: the first so many of them.
    """

    dense: Training
    tuned: Training
    images: int = 60_000
    tuned_images: int = 60_000


# ---- the runs


def run_linear(how: How) -> dict[str, Any]:
    """Trains LeNet-300-100, factors it, fine-tunes and measures, once for each seed.

    Returns:
        JSON-able record, see over_seeds. A row holds "dense" and "dense_test", errors in percent, and "points": form ->
        list of {setting, ratio, error, tuned}, ratio being dense over factored parameters; and "chosen": form -> a
        point with its test error, or None.

    Raises:
        ValueError: there are no seeds, or no workers.
        FileNotFoundError: MNIST is not in the folder that TERSETORCH_DATA names.
    """
    short = how.quick
    dense = Training(epochs=1 if short else 15, lr=0.1, weight_decay=5e-5, input_dropout=0.1)
    plan = Plan(dense, Training(epochs=1 if short else 3, lr=0.01, weight_decay=5e-5))
    forms = _linear_forms(RATIOS[1:3] if short else RATIOS)
    return _over_seeds("low_rank_lenet_300_100", how, plan, forms, _mnist, _lenet, None)


def run_convolutions(how: How) -> dict[str, Any]:
    """Trains a CNN, approximates one convolution in every form, fine-tunes and measures, once for each seed.

    Returns:
        As run_linear. Ratios are the approximated layer's, dense over factored: "ratio" of parameters, "macs" of
        multiply-accumulates and "speedup", of its forward's median time at a batch of 128.

    Raises:
        ValueError: there are no seeds, or no workers.
        FileNotFoundError: the images are not in the folder that TERSETORCH_DATA names.
    """
    short = how.quick
    dense = Training(epochs=1 if short else 6, lr=0.05, weight_decay=5e-4)
    plan = Plan(dense, Training(epochs=1, lr=0.01, weight_decay=5e-4), 1000 if short else 20_000, 6_000)
    return _over_seeds("low_rank_cnn", how, plan, _convolution_forms(short), cifar10, _cnn, SECOND)


def _over_seeds(
    name: str,
    how: How,
    plan: Plan,
    forms: dict[str, list[tuple[str, Approximate]]],
    images: Callable[[int], Images],
    build: Callable[[int], nn.Module],
    layer: str | None,
) -> dict[str, Any]:
    described = {
        "batch_size": BATCH,
        "dense": plan.dense.model_dump(),
        "tuned": plan.tuned.model_dump() | {"images": plan.tuned_images},
        "settings": {form: [words for words, _ in settings] for form, settings in forms.items()},
    }
    one = partial(_one, plan, forms, images, build, layer)
    record: dict[str, Any] = over_seeds(name, one, how, described, PAPER, {"dense": "least", "dense_test": "least"})
    return record


def table(record: dict[str, Any]) -> Table:
    """The mean rise of the held-out error over the dense network's in points, and in brackets the worst seed's."""
    named = {"ratio": "fewer weights", "macs": "fewer MACs", "speedup": "faster"}
    settings, paper = record["plan"]["settings"], record["paper"]
    first = next(iter(record["seeds"][0]["points"].values()))[0]
    dense = statistics.mean(row["dense"] for row in record["seeds"])
    shown = Table(
        "form",
        "setting",
        *(words for key, words in named.items() if key in first),
        "as it is",
        "fine-tuned",
        "test images, of what was chosen",
        caption=(
            f"The dense network errs on {record['mean']['dense_test']:.2f} % of the test images, {dense:.2f} % of "
            f"those held out, means of {len(record['seeds'])} seeds. Counts and times are of the "
            f"{'approximated layer' if 'macs' in first else 'whole network'}. Errors: points above the dense network's "
            "on held-out images, the mean and in brackets the worst seed. Chosen, for each form and seed: the smallest "
            f"within {paper['rise']:g} point once fine-tuned; in brackets how many seeds chose it. {_fastest(record)}"
            f"The paper says of a network for ImageNet: {paper['claim']}."
        ),
    )
    for form, words_of in settings.items():
        for index, words in enumerate(words_of):
            points = [row["points"][form][index] for row in record["seeds"]]
            rises = [
                [point[key] - row["dense"] for point, row in zip(points, record["seeds"], strict=True)]
                for key in ("error", "tuned")
            ]
            tested = [
                row["chosen"][form]["test"] - row["dense_test"]
                for row in record["seeds"]
                if row["chosen"][form] is not None and row["chosen"][form]["setting"] == words
            ]
            shown.add_row(
                form,
                words,
                *(f"{_mean(points, key):.2f}x" for key in named if key in first),
                *(f"{statistics.mean(rise):+.2f} ({max(rise):+.2f})" for rise in rises),
                f"{statistics.mean(tested):+.2f} ({len(tested)})" if tested else "",
            )
    return shown


def draw(record: dict[str, Any], path: Path) -> None:
    """Draws the mean held-out errors over the ratio of weights as an SVG or PNG file: as they are, and fine-tuned.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    figure = figure_class("low_rank")(figsize=(9, 4), layout="constrained")
    titles = {"error": "as they are", "tuned": "fine-tuned"}
    for axes, (key, title) in zip(figure.subplots(1, 2, sharex=True), titles.items(), strict=True):
        for form, marker in zip(record["plan"]["settings"], "osv^Dx", strict=False):
            columns = list(zip(*(row["points"][form] for row in record["seeds"]), strict=True))
            xs = [_mean(points, "ratio") for points in columns]
            ys = [_mean(points, key) for points in columns]
            axes.plot(xs, ys, marker=marker, markersize=4, label=form, alpha=0.8)
        dense = statistics.mean(row["dense"] for row in record["seeds"])
        axes.axhline(dense, color="0.6", linewidth=1, linestyle="--", label="dense")
        axes.set(title=title, xlabel="dense weights over factored weights", ylabel="held-out error, %", xscale="log")
        wide = axes.get_ylim()[1] > 4 * dense
        axes.set_yscale("log" if wide else "linear")
        for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim()))[: 1 + wide]:
            axis.set_ticks([tick for tick in TICKS if low <= tick <= high])
            axis.set_ticks([], minor=True)
            axis.set_major_formatter("{x:g}")
    axes.legend(fontsize="small")
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _fastest(record: dict[str, Any]) -> str:
    """Which form and setting is fastest of those whose fine-tuned error is near enough with every seed."""
    near = []
    for form, settings in record["plan"]["settings"].items():
        for index, words in enumerate(settings):
            points = [row["points"][form][index] for row in record["seeds"]]
            rises = [point["tuned"] - row["dense"] for point, row in zip(points, record["seeds"], strict=True)]
            if "speedup" in points[0] and max(rises) <= record["paper"]["rise"]:
                near.append((_mean(points, "speedup"), f"{form}, {words}"))
    if not near:
        return ""
    speedup, words = max(near)
    return f"The fastest that is so near with every seed: {words}, {speedup:.2f}x. "


def _mean(points: Sequence[dict[str, Any]], key: str) -> float:
    return statistics.mean(float(point[key]) for point in points)


# ---- the forms


def _linear_forms(ratios: Sequence[float]) -> dict[str, list[tuple[str, Approximate]]]:
    return {"SVD": [(f"{ratio:g}x", partial(_within, ratio)) for ratio in ratios]}


def _within(ratio: float, model: nn.Module) -> object:
    return factorize.svd(model, ratio=ratio)


def _convolution_forms(short: bool) -> dict[str, list[tuple[str, Approximate]]]:
    """Settings for 64 filters of 32 channels and 5x5 taps, from the largest to the smallest."""

    def some(values: Sequence[Any]) -> Sequence[Any]:
        return values[-1:] if short else values

    few = 5 if short else 1

    return {
        "SVD, filters": [(f"rank {r}", partial(_svd, r, "filters")) for r in some((32, 24, 16, 12, 8))],
        "SVD, separable": [(f"rank {r}", partial(_svd, r, "separable")) for r in some((64, 48, 32, 24, 16))],
        "outer products": [(f"{k // few} terms", partial(_outer, k // few)) for k in some((160, 120, 80, 40))],
        "clusters, outer products": [
            (f"4 x 2 clusters, {k // few} terms", partial(_clusters, k // few, "outer_product"))
            for k in some((24, 16, 12, 8))
        ],
        "clusters, SVD": [
            (f"2 x 2 clusters, ranks {j}, {k}", partial(_clusters, (j, k), "svd"))
            for j, k in some(((12, 16), (10, 12), (8, 8)))
        ],
        "colours of the first layer": [(f"{c} colours", partial(_colours, c)) for c in some((16, 8, 4))],
    }


def _svd(rank: int, form: Any, model: nn.Module) -> object:
    return factorize.svd(model, rank, form=form, targets=SECOND)


def _outer(rank: int, model: nn.Module) -> object:
    return factorize.outer_product(model, rank, targets=SECOND)


def _clusters(rank: Any, method: Any, model: nn.Module) -> object:
    grid = (4, 2) if method == "outer_product" else (2, 2)
    return factorize.bicluster(model, rank, *grid, method=method, targets=SECOND)


def _colours(colours: int, model: nn.Module) -> object:
    return factorize.monochromatic(model, colours, targets=FIRST)


# ---- one seed


def _one(
    plan: Plan,
    forms: dict[str, list[tuple[str, Approximate]]],
    images: Callable[[int], Images],
    build: Callable[[int], nn.Module],
    layer: str | None,
    seed: int,
    *,
    progress: Progress | None,
) -> dict[str, Any]:
    data = images(seed)
    train = [part[: plan.images] for part in data.train]
    dense = build(seed)
    fit(dense, *train, **dict(plan.dense), batch_size=BATCH, seed=seed, progress=progress, description="train").eval()
    row: dict[str, Any] = {
        "dense": _error(dense, data.held_out),
        "dense_test": _error(dense, data.test),
        "points": {},
        "chosen": {},
    }
    for form, settings in forms.items():
        points, tuned = [], []
        for words, approximate in settings:
            model = copy.deepcopy(dense)
            approximate(model)
            at = FIRST if form.startswith("colours") else layer
            point = {"setting": words, "error": _error(model, data.held_out), **_ratios(dense, model, train[0], at)}
            # Of a network that is factored whole, all trains.
            if at is None:
                _tune(plan, train, seed, progress, words, model)
            else:
                with factorize.frozen_up_to(model, at):
                    _tune(plan, train, seed, progress, words, model)
            points.append(point | {"tuned": _error(model, data.held_out)})
            tuned.append(model)
        row["points"][form] = points
        near = [index for index, point in enumerate(points) if point["tuned"] <= row["dense"] + PAPER["rise"]]
        row["chosen"][form] = points[near[-1]] | {"test": _error(tuned[near[-1]], data.test)} if near else None
    return row


def _tune(
    plan: Plan, train: Sequence[Tensor], seed: int, progress: Progress | None, words: str, model: nn.Module
) -> None:
    fit(
        model,
        *(part[: plan.tuned_images] for part in train),
        **dict(plan.tuned),
        batch_size=BATCH,
        seed=seed + 1,
        progress=progress,
        description=f"fine-tune: {words}",
    ).eval()


def _ratios(dense: nn.Module, model: nn.Module, images: Tensor, layer: str | None) -> dict[str, float]:
    """Dense over factored: parameters of the network, or parameters, multiply-accumulates and time of a layer."""
    if layer is None:
        return {"ratio": count(dense, images[:1]).parameters / count(model, images[:1]).parameters}
    place = int(layer)
    with torch.no_grad():
        x = nn.Sequential(*list(dense.children())[:place])(images[:BATCH])
        before, after = list(dense.children())[place], list(model.children())[place]
        counts = [count(each, x[:1]) for each in (before, after)]
        times = interleave({"dense": lambda: before(x), "factored": lambda: after(x)}, TIMED_SECONDS)
    return {
        "ratio": counts[0].parameters / counts[1].parameters,
        "macs": counts[0].macs / counts[1].macs,
        "speedup": times["dense"]["median_ms"] / times["factored"]["median_ms"],
    }


def _error(model: nn.Module, part: tuple[Tensor, Tensor]) -> float:
    error: float = error_rate(model, *part)
    return 100 * error


# ---- networks and images


def _lenet(seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LeNet300100()


def _cnn(seed: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 32, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(64, 64, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(64 * 16, 64),
            nn.ReLU(),
            nn.Linear(64, 10),
        )


def _mnist(seed: int) -> Images:
    data = load_data("mnist", seed=seed)
    return Images(
        (data.train_images, data.train_labels),
        (data.validation_images, data.validation_labels),
        (data.test_images, data.test_labels),
    )


ROWS = [
    Reproduction(
        "low_rank_lenet_300_100",
        "Denton et al. 2014: layers of LeNet-300-100 by SVD, as they are and fine-tuned",
        run_linear,
        table,
        draw,
    ),
    Reproduction(
        "low_rank_cnn",
        "Denton et al. 2014: a convolution of a CNN by SVD, outer products and clusters, as they are and fine-tuned",
        run_convolutions,
        table,
        draw,
    ),
]
