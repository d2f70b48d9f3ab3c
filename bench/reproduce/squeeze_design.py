"""SqueezeNet's design space, small: what a choice of its metaparameters costs in error, weights, work, bytes and time.

The paper sweeps networks of 5 to 19 MB for ImageNet. Here four fires, e = 32, 32, 64, 64, after a first convolution of
32 filters of 3x3 with stride 2, for CIFAR-10 images; 10,000 of them, 4 epochs. They are lossy JPEGs, so errors are not
the published data's. One choice at a time differs from the base: squeeze ratio and 3x3 share a half, max pooling after
layers 2 and 4, no bypass. The paper trains without batch normalisation, for many epochs. Within these few a network
without it stays at four images wrong of five, and with it everywhere but in the last convolution, which a ReLU follows,
those with a bypass do. So every convolution has one while it trains, and it is folded into the convolution before
anything is measured. What is measured has the paper's form.

Nothing is chosen by these figures: errors of every network are read on 5,000 held-out training images, which the seed
draws, and on the test images. Bytes are those of the file that tersetorch.save writes, which codes all weights to the
bit. Milliseconds are the median forward pass of one image, all networks in turns.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from rich.table import Table
from torch import nn
from torch.nn.utils import fuse_conv_bn_eval

from tersetorch.bench.reproduce.images import Images, cifar10
from tersetorch.bench.reproduce.runs import How, Reproduction, over_seeds
from tersetorch.bench.timing import interleave
from tersetorch.costs import count
from tersetorch.recipes.deep_compression import Training
from tersetorch.reports.figure import figure_class
from tersetorch.storage import save
from tersetorch.zoo import FireNet, error_rate, fit

# Iandola et al. (2016): figure 3 and table 3, accuracies on ImageNet in percent.
PAPER = {
    "squeeze ratio": "top-5 accuracy 80.3 % at 0.125 (4.8 MB), 86.0 % from 0.75 on (19 MB)",
    "3x3 share": "top-5 accuracy 85.6 % from 50 % on, no better at 99 %",
    "bypass": "top-1 accuracy 57.5 % without, 60.4 % simple, 58.8 % complex",
    "pooling": "late downsampling leads to higher accuracy, other things being equal (section 3.1)",
}
BASE: Mapping[str, Any] = {
    "fires": 4,
    "base_e": 32,
    "incr_e": 32,
    "freq": 2,
    "pct_3x3": 0.5,
    "squeeze_ratio": 0.5,
    "pooled": (2, 4),
    "bypass": None,
    "first": (32, 3, 2),
    "dropout": 0.0,
}
# What each sweep sets, and to what.
SWEEPS: Mapping[str, tuple[str, tuple[Any, ...]]] = {
    "squeeze ratio": ("squeeze_ratio", (0.125, 0.25, 0.5, 0.75, 1.0)),
    "3x3 share": ("pct_3x3", (0.0, 0.25, 0.5, 0.75, 1.0)),
    "pooling": ("pooled", ((1, 2), (1, 3), (2, 4), (4, 5))),
    "bypass": ("bypass", (None, "simple", "complex")),
}
TRAINING = Training(epochs=4, lr=0.05, weight_decay=1e-4)
BATCH = 64
IMAGES = 10_000
TIMED_SECONDS = 8.0


# ---- the runs


def run(how: How) -> dict[str, Any]:
    """Trains and measures every network of the sweeps, once for each seed.

    Returns:
        JSON-able record, see over_seeds. A row holds "points": sweep -> list of {setting, parameters, macs, bytes, ms,
        held_out, test}, errors in percent, and "base", the base's test error. The base stands in every sweep.

    Raises:
        ValueError: there are no seeds, or no workers.
        FileNotFoundError: the images are not in the folder that TERSETORCH_DATA names.
    """
    training = TRAINING.model_copy(update={"epochs": 1}) if how.quick else TRAINING
    images = 512 if how.quick else IMAGES
    plan = {
        "base": dict(BASE),
        "settings": {sweep: [_words(value) for value in values] for sweep, (_, values) in SWEEPS.items()},
        "training": training.model_dump(),
        "batch_size": BATCH,
        "images": images,
        "shortened": "4 small fires, 10,000 images and 4 epochs, with batch normalisation that is folded afterwards",
    }
    one = partial(_one, training, images)
    record: dict[str, Any] = over_seeds("squeeze_design", one, how, plan, PAPER, {"base": "least"})
    return record


def table(record: dict[str, Any]) -> Table:
    """Every network once in each sweep: its size, and its mean errors with the worst seed's in brackets."""
    headings = ["choice", "", "parameters", "MACs", "file, bytes", "ms", "held-out error", "test error"]
    shown = Table(
        *headings, title="squeeze ratio and 3x3 share 0.5, pooling after layers 2 and 4, no bypass, unless said"
    )
    for sweep, setting, points in _points(record):
        errors = [[point[part] for point in points] for part in ("held_out", "test")]
        shown.add_row(
            sweep,
            setting,
            *(f"{points[0][key]:,}" for key in ("parameters", "macs")),
            f"{_mean(points, 'bytes'):,.0f}",
            f"{_mean(points, 'ms'):.3f}",
            *(f"{statistics.mean(each):.2f} ({max(each):.2f}) %" for each in errors),
        )
    return shown


def draw(record: dict[str, Any], path: Path) -> None:
    """Draws test errors over file sizes, and over MACs where places of pooling differ, into an SVG or PNG file.

    Means of the seeds, with the least and the most as a bar.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    figure = figure_class("squeeze_design")(figsize=(9, 6.5), layout="constrained")
    panels = dict(zip(record["plan"]["settings"], figure.subplots(2, 2, sharey=True).flat, strict=True))
    for sweep, axes in panels.items():
        xs, ys, low, high = [], [], [], []
        for name, setting, points in _points(record):
            if name == sweep:
                xs.append(_mean(points, "macs") / 1e6 if sweep == "pooling" else _mean(points, "bytes") / 1e3)
                errors = [point["test"] for point in points]
                ys.append(statistics.mean(errors))
                low.append(ys[-1] - min(errors))
                high.append(max(errors) - ys[-1])
                axes.annotate(setting, (xs[-1], ys[-1]), (4, 5), textcoords="offset points", fontsize="small")
        axes.errorbar(xs, ys, (low, high), fmt="o" if sweep == "bypass" else "o-", markersize=4, capsize=2, lw=1)
        axes.set(title=sweep, xlabel="million MACs" if sweep == "pooling" else "file, kB", ylabel="test error, %")
        axes.margins(0.2, 0.1)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _points(record: dict[str, Any]) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    """Each network of each sweep: sweep, setting, and the seeds' figures."""
    for sweep, settings in record["plan"]["settings"].items():
        for index, setting in enumerate(settings):
            yield sweep, setting, [row["points"][sweep][index] for row in record["seeds"]]


def _mean(points: list[dict[str, Any]], key: str) -> float:
    mean: float = statistics.mean(point[key] for point in points)
    return mean


# ---- one seed


def _one(training: Training, count_of_images: int, seed: int, *, progress: Progress | None) -> dict[str, Any]:
    data = cifar10(seed, count_of_images)
    found: dict[tuple[str, str], dict[str, Any]] = {}
    networks: dict[tuple[str, str], nn.Module] = {}
    for name, values in SWEEPS.values():
        for value in values:
            place = _place(name, value)
            if place not in networks:
                model = _network(seed, {name: value})
                description = " ".join(place)
                with_norms = _with_norms(model)
                fit(
                    with_norms,
                    *data.train,
                    **dict(training),
                    batch_size=BATCH,
                    seed=seed,
                    progress=progress,
                    description=description,
                )
                networks[place] = _fold(with_norms).eval()
                found[place] = _figures(networks[place], data)
    image = data.test[0][:1]
    with torch.no_grad():
        times = interleave({place: partial(model, image) for place, model in networks.items()}, TIMED_SECONDS)
    points = {
        sweep: [
            {"setting": _words(value), **found[_place(name, value)], "ms": times[_place(name, value)]["median_ms"]}
            for value in values
        ]
        for sweep, (name, values) in SWEEPS.items()
    }
    return {"points": points, "base": found["base", ""]["test"]}


def _place(name: str, value: Any) -> tuple[str, str]:
    return ("base", "") if value == BASE[name] else (name, _words(value))


def _words(value: Any) -> str:
    if isinstance(value, tuple):
        return "after " + ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value or "none")


def _figures(model: nn.Module, data: Images) -> dict[str, Any]:
    counted = count(model, data.test[0][:1])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.terse"
        save(model, path)
        size = path.stat().st_size
    errors = {part: 100 * error_rate(model, *getattr(data, part)) for part in ("held_out", "test")}
    return {"parameters": counted.parameters, "macs": counted.macs, "bytes": size, **errors}


# ---- networks and images


def _network(seed: int, choice: Mapping[str, Any]) -> FireNet:
    """Weights drawn for ReLUs: He et al., Delving deep into rectifiers (2015)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = FireNet(10, **{**BASE, **choice})
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
    return model


def _with_norms(model: FireNet) -> FireNet:
    """Puts batch normalisation after every convolution, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Conv2d):
            model.set_submodule(name, nn.Sequential(module, nn.BatchNorm2d(module.out_channels)))
    return model


def _fold(model: FireNet) -> FireNet:
    """Makes each convolution and its normalisation, as it is in evaluation, one convolution, in place."""
    model.eval()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Sequential):
            convolution, norm = module
            assert isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
            model.set_submodule(name, fuse_conv_bn_eval(convolution, norm))
    return model


ROWS = [
    Reproduction(
        "squeeze_design",
        "SqueezeNet (2016), figure 3 and section 6: squeeze ratio, 3x3 share, pooling and bypass on CIFAR-10 images",
        run,
        table,
        draw,
    )
]
