"""One shot, no retraining: a CIFAR-10 ResNet-20 pruned to 50 %, to 80 % and to 2:4, by magnitude and by second order.

Nothing is chosen: every layer but the first convolution loses the same part of its weights, and every method has its
default arguments. Each seed draws the training images that the methods are calibrated on; the test images are read once
for each network. The images went through JPEG, which costs the network, trained on the originals, ten points from the
start. Each network is also measured with its batch norm statistics taken anew from training images, which pruning
without retraining asks for at high sparsity, though it costs the dense network some points.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor, nn

from tersetorch.bench.reproduce.runs import How, Reproduction, over_seeds
from tersetorch.methods import prune
from tersetorch.zoo import ResNet20, cifar_input, error_rate, read_cifar10

WEIGHTS = "models/resnet20-cifar10.safetensors"
SETTINGS: dict[str, dict[str, Any]] = {"50 %": {"sparsity": 0.5}, "80 %": {"sparsity": 0.8}, "2:4": {"pattern": "2:4"}}
# Its three input channels do not divide into groups of four, and it is the layer that errors grow from.
IGNORE = "conv1"
BATCH = 128

# Each prunes a network by calibration batches and the arguments of a setting.
METHODS: dict[str, Callable[..., nn.Module]] = {
    "magnitude": lambda model, data, **arguments: prune.magnitude(model, **arguments),
    "obd": partial(prune.obd, loss="cross_entropy"),
    "layerwise": partial(prune.obs, solver="layerwise"),
    "exactobs": partial(prune.obs, solver="exactobs"),
    "blocked": partial(prune.obs, solver="blocked"),
}


def run(how: How) -> dict[str, Any]:
    """Prunes the network in every way, once for each seed.

    Returns:
        JSON-able record, see over_seeds. A row holds errors in percent of the test images: of the dense network, and by
        setting and method, each as pruned and with batch norm taken anew.

    Raises:
        ValueError: there are no seeds, or no workers.
        FileNotFoundError: CIFAR-10 or the weights are not in the folder that TERSETORCH_DATA names.
    """
    plan = {
        "calibration": 64 if how.quick else 512,
        "batch_norm": 256 if how.quick else 2048,
        "test_per_class": 10 if how.quick else 250,
        "ignore": IGNORE,
    }
    figures = {f"{name}{kind}": "least" for name in figure_names() for kind in ("", ", batch norm anew")}
    record: dict[str, Any] = over_seeds("one_shot", partial(_one, plan), how, plan, {}, figures)
    return record


def table(record: dict[str, Any]) -> Table:
    """Mean errors of the seeds, as pruned and with batch norm taken anew."""
    shown = Table("", *SETTINGS, *(f"{name}, batch norm anew" for name in SETTINGS), title="ResNet-20: test error")
    mean = record["mean"]
    dense = [f"{mean[name]:.1f} %" for name in ("dense", "dense, batch norm anew") for _ in SETTINGS]
    shown.add_row("dense", *dense)
    for method in METHODS:
        cells = [mean[f"{name} {method}{kind}"] for kind in ("", ", batch norm anew") for name in SETTINGS]
        shown.add_row(method, *(f"{cell:.1f} %" for cell in cells))
    return shown


def _one(plan: Mapping[str, Any], seed: int, *, progress: Progress | None) -> dict[str, Any]:
    bar = Progress(disable=True) if progress is None else progress
    task = bar.add_task(f"one shot, seed {seed}", total=len(SETTINGS) * len(METHODS) + 1)
    images, labels = read_cifar10("train", per_class=max(1, plan["batch_norm"] // 5))
    drawn = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[: plan["batch_norm"]]
    anew = list(cifar_input(images[drawn]).split(BATCH))
    calibrated = drawn[: plan["calibration"]]
    data = list(zip(cifar_input(images[calibrated]).split(BATCH), labels[calibrated].split(BATCH), strict=True))
    images, labels = read_cifar10("test", per_class=plan["test_per_class"])
    test = cifar_input(images)
    dense = ResNet20()
    dense.load_state_dict(load_file(Path(os.environ.get("TERSETORCH_DATA", "")) / WEIGHTS))
    row = {}

    def measure(name: str, model: nn.Module) -> None:
        row[name] = 100 * error_rate(model, test, labels)
        row[f"{name}, batch norm anew"] = 100 * error_rate(prune.recalibrate_batch_norm(model, anew), test, labels)
        bar.advance(task)

    measure("dense", copy.deepcopy(dense))
    for name, model in pruned(dense, data, IGNORE):
        measure(name, model)
    return row


def figure_names() -> list[str]:
    """The dense network, then every setting and method."""
    return ["dense", *(f"{setting} {method}" for setting in SETTINGS for method in METHODS)]


def pruned(dense: nn.Module, data: list[tuple[Tensor, Tensor]], ignore: str) -> Iterator[tuple[str, nn.Module]]:
    """A copy of dense for each setting and method, pruned by calibration data of inputs and targets, with its name."""
    for setting, arguments in SETTINGS.items():
        for method, cut in METHODS.items():
            yield f"{setting} {method}", cut(copy.deepcopy(dense), data, ignore=ignore, **arguments)


ROWS = [Reproduction("one_shot", "One shot at 50 %, 80 % and 2:4: ResNet-20 by magnitude and second order", run, table)]
