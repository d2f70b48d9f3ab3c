"""Where a network for ImageNet spends its forward pass: each layer's share, at one image and at a batch of 128.

AlexNet and VGG-16 with fresh weights: times do not depend on the numbers. Each linear and convolutional layer is timed
alone, on inputs of the size it gets, in turns with the others; pooling, normalisation and ReLUs are left out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from tersetorch.bench.records import machine_facts
from tersetorch.bench.reproduce.runs import How, Reproduction
from tersetorch.bench.timing import interleave
from tersetorch.reports.figure import figure_class
from tersetorch.zoo import VGG16, AlexNet

# Denton et al. (2014), experiments: a network of five convolutions for ImageNet, 7x7 and 5x5 filters first, on a CPU.
PAPER = {
    "1": {"conv1": 6.5, "conv2": 22.8, "conv3": 13.7, "conv4": 21.7, "conv5": 28.2, "linear": 6.3},
    "128": {"conv1": 21.1, "conv2": 32.9, "conv3": 14.0, "conv4": 11.9, "conv5": 11.2, "linear": 3.9},
}
# How to build one, pixels of a side, and images of a batch.
NETWORKS: Mapping[str, tuple[Callable[[], nn.Module], int, tuple[int, ...]]] = {
    "AlexNet": (AlexNet, 227, (1, 128)),
    "VGG-16": (VGG16, 224, (1, 16)),
}
SECONDS = 30.0


def run(how: How) -> dict[str, Any]:
    """Times every layer; how.quick takes a second for each network and batch, of two images at most.

    Returns:
        JSON-able record: for each network and batch a list [layer, "conv" or "linear", milliseconds, percent of their
        sum] for each layer.
    """
    started = time.monotonic()
    threads = torch.get_num_threads()
    rows = []
    for name, (build, size, batches) in NETWORKS.items():
        for batch in batches:
            images = min(batch, 2) if how.quick else batch
            times = _times(build, size, images, 1.0 if how.quick else SECONDS)
            total = sum(ms for _, ms in times.values())
            rows.append(
                {
                    "network": name,
                    "batch": images,
                    "layers": [[layer, kind, ms, 100 * ms / total] for layer, (kind, ms) in times.items()],
                }
            )
    return {
        "reproduction": "layer_times",
        "paper": PAPER,
        "networks": rows,
        "machine": machine_facts() | {"threads": threads},
        "seconds": time.monotonic() - started,
    }


def table(record: dict[str, Any]) -> Table:
    """The shares, all linear layers together, and the paper's network under them."""
    shown = Table("network", "images", "conv layers", "linear layers", "each conv layer, %", "ms, all of these")
    for row in record["networks"]:
        convolutions = [share for _, kind, _, share in row["layers"] if kind == "conv"]
        both = sum(convolutions)
        shown.add_row(
            row["network"],
            str(row["batch"]),
            f"{both:.1f} %",
            f"{100 - both:.1f} %",
            ", ".join(f"{share:.1f}" for share in convolutions),
            f"{sum(ms for _, _, ms, _ in row['layers']):.4g}",
        )
    for batch, shares in record["paper"].items():
        convolutions = [share for layer, share in shares.items() if layer != "linear"]
        each = ", ".join(f"{share:.1f}" for share in convolutions)
        shown.add_row("the paper's", batch, f"{sum(convolutions):.1f} %", f"{shares['linear']:.1f} %", each, "-")
    return shown


def draw(record: dict[str, Any], path: Path) -> None:
    """Draws the shares as stacked bars into an SVG or PNG file.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    figure = figure_class("layer_times")(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(record["networks"]):
        left = 0.0
        for index, (layer, kind, _, share) in enumerate(row["layers"]):
            colour = f"C{index % 10}" if kind == "conv" else "0.6"
            axes.barh(place, share, left=left, color=colour, edgecolor="white")
            if share > 4:
                axes.text(left + share / 2, place, layer, ha="center", va="center", fontsize="x-small", color="white")
            left += share
    names = [f"{row['network']}, {row['batch']}" for row in record["networks"]]
    axes.set(yticks=range(len(names)), yticklabels=names, xlabel="share of the time of linear and conv layers, %")
    axes.invert_yaxis()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


@torch.no_grad()
def _times(build: Callable[[], nn.Module], size: int, images: int, seconds: float) -> dict[str, tuple[str, float]]:
    """The kind and the median milliseconds of each layer for so many images."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build().eval()
        x = torch.randn(images, 3, size, size)
    inputs: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, given: tuple[Tensor, ...]) -> None:
        inputs[name] = given[0].clone()

    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    hooks = [module.register_forward_pre_hook(partial(keep, name)) for name, module in layers.items()]
    model(x)
    for hook in hooks:
        hook.remove()
    calls = {name: partial(layers[name], given) for name, given in inputs.items()}
    kinds = {name: "conv" if isinstance(layers[name], nn.Conv2d) else "linear" for name in calls}
    return {name: (kinds[name], times["median_ms"]) for name, times in interleave(calls, seconds).items()}


ROWS = [
    Reproduction(
        "layer_times",
        "Denton et al. 2014: where a CNN's time goes, by layer, at one image and in batches",
        run,
        table,
        draw,
    )
]
