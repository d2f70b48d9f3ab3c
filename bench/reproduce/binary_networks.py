"""BinaryConnect and BNN beside the same networks in float: an MLP on MNIST, and a VGG-like net on CIFAR-10.

What is shorter than in the papers stands in SHORTENED, and in each record.

Without the copy of real values below the signs, each step adds its change to the signs and rounds: where no change
reaches 1, no sign ever turns. These networks have a rate at which none does.

Networks of signs are converted when they are trained: the same decisions are asked of every test image, and the file's
bytes are counted. Stochastic BinaryConnect is evaluated with its real values, as in the paper, and not converted.

One decision of MNIST's differs, in BNN without real values, seed 2, test image 6048: the batch norm of unit 479 of the
first layer is -1.9e-7 of the exact sum, as the converted network and float64 have it, and +0.9e-7 of a float32 sum that
is off by 1.3e-6. The float network decides as they do where it gets the image alone, and otherwise in a batch of 1000.

Rates were chosen on held-out training images, 5,000 of them, which the seed draws; the test images are read once for
each network, at the end of its training.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

from tersetorch.bench.reproduce.binary_training import Checkpoint, Plan, Variant, train
from tersetorch.bench.reproduce.runs import How, Reproduction, over_seeds
from tersetorch.conversion import convert
from tersetorch.methods import finalize
from tersetorch.storage import save
from tersetorch.zoo import BinaryMLP, BinaryVGG, error_rate, read_cifar10
from tersetorch.zoo import load as load_data
from tersetorch.zoo.photos import Part

HELD_OUT = 5_000
# What a row says of each network beside its test error.
FIGURES = ("held_out", "changed", "converted")

# The first layer of BNN's networks takes images as the bytes they are; "binary" would let it take floats.
PIXEL_PLANS = {
    "mnist": {"fc1": "binary_linear_pixels", **{f"fc{n}": "binary_linear" for n in (2, 3, 4)}},
    "cifar": {
        "conv1": "binary_conv2d_pixels",
        **{f"conv{n}": "binary_conv2d" for n in range(2, 7)},
        **{f"fc{n}": "binary_linear" for n in (7, 8, 9)},
    },
}

# Test errors in percent. Courbariaux, Bengio, David, BinaryConnect (2015), table 2; Hubara et al., Binarized Neural
# Networks (2016), table 1: Theano's for plain batch norm and Adam, Torch's for stochastic signs and shifts.
PAPER: dict[str, dict[str, Any]] = {
    "mnist": {
        "float": "1.30 ± 0.04",
        "dropout": "1.01 ± 0.04",
        "connect": "1.29 ± 0.08",
        "connect_stochastic": "1.18 ± 0.04",
        "bnn": "0.96",
        "bnn_shift": "stochastic too: 1.40",
    },
    "cifar": {"float": "10.64", "connect": "9.90", "bnn": "11.40"},
}
SHORTENED = {
    "mnist": "width 1024, as BinaryConnect's, where BNN's is 2048 (Torch) or 4096 (Theano); 6 epochs of 55,000 images "
    "where the papers' are 1000 of 50,000",
    "cifar": "an eighth of the papers' channels; 6 epochs where theirs are 500; no whitening; and the images went "
    "through lossy JPEG, which costs networks about 10 points, so that only our own figures compare",
}
TITLES = {
    "mnist": "MLP of three hidden layers on MNIST",
    "cifar": "VGG-like network on CIFAR-10",
}


def full_plan(data: str) -> Plan:
    """The plan behind the reproduction."""
    float32 = Variant("float", "float", lr=3e-3)
    connect = Variant("BinaryConnect", "binary_connect", lr=3e-3)
    bnn = Variant("BNN", "bnn", lr=3e-3 if data == "cifar" else 3e-2)
    if data == "cifar":
        variants = {"float": float32, "connect": connect, "bnn": bnn}
        return Plan(variants, epochs=6, batch_size=100, fall=0.01, width=16)
    variants = {
        "float": float32,
        "dropout": replace(float32, words="float, dropout", dropout=0.3, input_dropout=0.1),
        "connect": connect,
        "connect_stochastic": replace(connect, words="BinaryConnect, stochastic", stochastic=True),
        "connect_no_copy": replace(connect, words="BinaryConnect without real values", keep=False),
        "bnn": bnn,
        "bnn_stochastic": replace(bnn, words="BNN, stochastic activations", stochastic=True),
        "bnn_shift": replace(bnn, words="BNN, batch norm and AdaMax by shifts", shift=True, lr=2**-4),
        "bnn_no_copy": replace(bnn, words="BNN without real values", keep=False, lr=3e-3),
    }
    return Plan(variants, epochs=6, batch_size=200, fall=0.01, width=1024)


def quick_plan(data: str) -> Plan:
    """A narrow network, one epoch of a few images."""
    return replace(full_plan(data), epochs=1, batch_size=100, width=256 if data == "mnist" else 4, images=5_000)


@dataclass(frozen=True)
class Images:
    """What networks take, and labels, in three parts."""

    train: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def run(data: str, how: How) -> dict[str, Any]:
    """Trains every network once for each seed.

    A run with notes goes on after the last whole epoch.

    Args:
        data: "mnist" or "cifar".
        how: seeds, workers and the like.

    Returns:
        JSON-able record, see over_seeds. A row holds each network's test error in percent and, by the same names,
        "held_out" errors, "changed", the part of the signs that training changed, and "converted": the bytes of the
        converted network's file, those of its float32 weights, and the test images it decides in another way.

    Raises:
        ValueError: there are no seeds, or no workers.
        FileNotFoundError: the images are not in the folder that TERSETORCH_DATA names.
    """
    plan = quick_plan(data) if how.quick else full_plan(data)
    record: dict[str, Any] = over_seeds(
        f"binary_{data}",
        partial(_one, data, plan, how.notes),
        how,
        {"data": data, "shortened": SHORTENED[data], **plan.described()},
        PAPER[data],
        dict.fromkeys(plan.variants, "least"),
    )
    return record


def table(record: dict[str, Any]) -> Table:
    """Each network beside the papers'."""
    shown = Table(
        "", "paper, test error", "test error", "worst seed", "held out", "signs changed", "file, bytes", "smaller",
        "other decisions", title=TITLES[record["plan"]["data"]], caption=f"Shortened: {record['plan']['shortened']}.",
    )  # fmt: skip
    rows = record["seeds"]
    for name, variant in record["plan"]["variants"].items():
        published = record["paper"].get(name)
        spread = f" ± {statistics.stdev(row[name] for row in rows):.2f}" if len(rows) > 1 else ""
        changed = [row["changed"][name] for row in rows]
        converted = [row["converted"][name] for row in rows]
        cells = ["-"] * 3
        if None not in converted:
            size = statistics.mean(each["bytes"] for each in converted)
            others = sum(each["other_decisions"] for each in converted)
            cells = [f"{size:,.0f}", f"{converted[0]['bytes_float32'] / size:.1f}x", str(others)]
        shown.add_row(
            variant["words"],
            "-" if published is None else f"{published} %",
            f"{record['mean'][name]:.2f}{spread} %",
            f"{record['worst'][name]:.2f} %",
            f"{statistics.mean(row['held_out'][name] for row in rows):.2f} %",
            "-" if None in changed else f"{100 * statistics.mean(changed):.1f} %",
            *cells,
        )
    return shown


def _one(data: str, plan: Plan, notes: Path | None, seed: int, *, progress: Progress | None) -> dict[str, Any]:
    path = None if notes is None else notes.with_name(f"{notes.name}.{seed}")
    checkpoint = Checkpoint(path, plan)
    images = IMAGES[data](seed)
    for name in plan.variants:
        if name not in checkpoint.rows:
            checkpoint.finish(name, _network(data, plan, name, images, seed, progress, checkpoint))
    found = checkpoint.rows
    checkpoint.remove()
    return {
        **{name: row["test"] for name, row in found.items()},
        **{figure: {name: row[figure] for name, row in found.items()} for figure in FIGURES},
    }


def _network(
    data: str, plan: Plan, name: str, images: Images, seed: int, progress: Progress | None, checkpoint: Checkpoint
) -> dict[str, Any]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BUILD[data](plan, plan.variants[name], images.train[0])
    some, labels = (part[: plan.images] for part in images.train)
    changed = train(model, name, plan, some, labels, seed, progress, checkpoint)
    finished = finalize(model.eval())
    return {
        "held_out": 100 * error_rate(finished, *images.held_out),
        "test": 100 * error_rate(finished, *images.test),
        "changed": changed,
        "converted": _converted(data, plan.variants[name], finished, images.test[0]),
    }


def _converted(data: str, variant: Variant, model: nn.Module, images: Tensor) -> dict[str, int] | None:
    """Bytes and decisions of the network as signs are stored and multiplied; None where its weights are no signs."""
    if variant.method == "float" or (variant.method == "binary_connect" and variant.stochastic):
        return None
    fast = convert(model, plan=PIXEL_PLANS[data] if variant.method == "bnn" else "binary")
    with torch.no_grad():
        others = sum(int((fast(some).argmax(1) != model(some).argmax(1)).sum()) for some in images.split(1000))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.terse"
        save(fast, path)
        size = path.stat().st_size
    numbers = sum(parameter.numel() for parameter in model.parameters())
    return {"bytes": size, "bytes_float32": 4 * numbers, "other_decisions": others}


def _mlp(plan: Plan, variant: Variant, images: Tensor) -> nn.Module:
    return BinaryMLP(
        in_features=images.shape[1],
        width=plan.width,
        shift=variant.shift,
        dropout=variant.dropout,
        input_dropout=variant.input_dropout,
    )


def _vgg(plan: Plan, variant: Variant, images: Tensor) -> nn.Module:
    model = BinaryVGG(channels=plan.width, shift=variant.shift)
    # An epoch takes two thirds of the time so.
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def _mnist(seed: int) -> Images:
    data = load_data("mnist", seed=seed)
    parts = (
        (images.flatten(1), labels)
        for images, labels in (
            (data.train_images, data.train_labels),
            (data.validation_images, data.validation_labels),
            (data.test_images, data.test_labels),
        )
    )
    return Images(*parts)


def _cifar(seed: int) -> Images:
    (images, labels), test = _cifar_part("train"), _cifar_part("test")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    held_out, kept = order[:HELD_OUT], order[HELD_OUT:]
    return Images((images[kept], labels[kept]), (images[held_out], labels[held_out]), test)


@cache
def _cifar_part(part: Part) -> tuple[Tensor, Tensor]:
    """Values in [0, 1], as the bytes of an image say them."""
    images, labels = read_cifar10(part)
    return images.contiguous(memory_format=torch.channels_last).float() / 255, labels


IMAGES: Mapping[str, Callable[[int], Images]] = {"mnist": _mnist, "cifar": _cifar}
BUILD: Mapping[str, Callable[[Plan, Variant, Tensor], nn.Module]] = {"mnist": _mlp, "cifar": _vgg}

ROWS = [
    Reproduction(
        f"binary_{data}",
        f"BinaryConnect 2015 and BNN 2016: {TITLES[data]}, in signs and in float",
        partial(run, data),
        table,
    )
    for data in PAPER
]
