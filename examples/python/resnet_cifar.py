"""Prunes a published CIFAR-10 ResNet, shares its weights, and moves it to the kernels that are faster on this machine.

    TERSETORCH_DATA=FOLDER python examples/python/resnet_cifar.py -o resnet.terse

FOLDER holds models/resnet20-cifar10.safetensors and data/cifar10-jpeg.tar.xz (JPEG images: about 10 points more error
than on the originals, before and after alike). The network first trains an epoch on these images, then while it is
pruned, then its shared values do; a tenth of the training images is held out to look at on the way, and the test images
are read once for each network. A few minutes on two cores; --images takes fewer for a quick look.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import tersetorch as tt


@dataclass
class Images:
    """Images and labels of three parts."""

    train: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def load_images(count: int) -> Images:
    """CIFAR-10 as the published network takes it, count images to train on."""
    images, labels = tt.zoo.read_cifar10("train")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    held_out, train = order[: count // 10], order[count // 10 : count // 10 + count]
    test_images, test_labels = tt.zoo.read_cifar10("test", per_class=max(1, count // 50))
    return Images(
        (tt.zoo.cifar_input(images[train]), labels[train]),
        (tt.zoo.cifar_input(images[held_out]), labels[held_out]),
        (tt.zoo.cifar_input(test_images), test_labels),
    )


def load_network(folder: Path) -> nn.Module:
    """The published ResNet-20."""
    network = tt.zoo.ResNet20()
    network.load_state_dict(load_file(folder / "models" / "resnet20-cifar10.safetensors"))
    return network.eval()


def compress(network: nn.Module, images: Images, *, sparsity: float = 0.8, bits: int = 5, epochs: int = 2) -> None:
    """Adapts network to these images, prunes and shares it in place; plain weights again when it is done."""
    steps = tt.zoo.steps_per_epoch(len(images.train[0]))
    tt.zoo.fit(network, *images.train, epochs=1, lr=0.01)
    # The first convolution and the last layer are small, and lose most.
    pruner = tt.prune.GradualPruner(
        network, sparsity=sparsity, begin_step=0, end_step=epochs * steps // 2, frequency=10, targets="layer*"
    )
    tt.zoo.fit(network, *images.train, epochs=epochs, lr=0.02, after_step=pruner.step)
    tt.quantize.kmeans(network, bits)
    tt.zoo.fit(network, *images.train, epochs=1, lr=1e-4, optimizer="adam")
    tt.finalize(network)


def error(network: nn.Module, part: tuple[Tensor, Tensor]) -> float:
    """Percent of the images that the network gets wrong."""
    return 100 * tt.zoo.error_rate(network, *part)


def main() -> None:
    """Compresses, stores, measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("resnet.terse"), help="the file to write")
    parser.add_argument("--images", type=int, default=20_000, help="to train on, up to 45,000")
    parser.add_argument("--measure", action="store_true", help="only time OUTPUT again, as an earlier run left it")
    parser.add_argument("--json", type=Path, help="store the figures here; those of an earlier run are kept")
    arguments = parser.parse_args()
    figures: dict[str, Any] = {}
    if arguments.json and arguments.json.exists():
        figures = json.loads(arguments.json.read_text())
    images = load_images(arguments.images)
    network = load_network(Path(os.environ["TERSETORCH_DATA"]))
    if arguments.measure:
        network = tt.load(arguments.output, model=network)
    else:
        figures["held_out_error_before"] = error(network, images.held_out)
        figures["test_error_before"] = error(network, images.test)
        compress(network, images)
        figures["held_out_error_after"] = error(network, images.held_out)
    fast = tt.convert(network, images.test[0][:1])
    tt.save(fast, arguments.output)
    found = tt.report(fast)
    file = tt.inspect(arguments.output)
    figures |= {
        "test_error_after": error(fast, images.test),
        "dense_bytes": file.dense_bytes,
        "file_bytes": file.file_bytes,
        "dense_ms": found.dense_ms,
        "fast_ms": found.converted_ms,
    }
    print(found)
    print(json.dumps(figures, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
