"""Runs the pruned and shared SqueezeNet that the authors of Deep Compression published, from their own file.

    TERSETORCH_DATA=FOLDER python examples/python/squeezenet.py -o squeezenet.terse

FOLDER holds models/squeezenet-deep-compression.net (the authors' 0.66 MB) and data/imagenet-100.npz (a hundred images
with labels). The codes and positions become a network, the network a .terse file, smaller than theirs; then every
layer is measured on this machine, and the report says which kernels take over. Nothing is trained.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tersetorch as tt


def load_network(path: Path) -> nn.Module:
    """The published network; its weights are exactly the file's."""
    return tt.zoo.squeezenet_from_deep_compression(path).eval()


def right_of(network: nn.Module, folder: Path, most: int = 100) -> tuple[int, int]:
    """How many of the images the network names right, in its first answer and in its first five."""
    images, labels = tt.zoo.read_imagenet100(folder)
    with torch.no_grad():
        answers = torch.cat([network(some) for some in tt.zoo.caffe_input(images[:most]).split(25)]).topk(5).indices
    hits = answers == labels[:most, None]
    return int(hits[:, 0].sum()), int(hits.any(1).sum())


def main() -> None:
    """Imports, stores, measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("squeezenet.terse"), help="the file to write")
    parser.add_argument("--json", type=Path, help="store the figures here")
    arguments = parser.parse_args()
    folder = Path(os.environ["TERSETORCH_DATA"])
    published = folder / "models" / "squeezenet-deep-compression.net"
    network = load_network(published)
    images, _ = tt.zoo.read_imagenet100(folder)
    fast = tt.convert(network, tt.zoo.caffe_input(images[:1]))
    tt.save(fast, arguments.output)
    first, five = right_of(tt.load(arguments.output), folder)
    found, file = tt.report(fast), tt.inspect(arguments.output)
    figures: dict[str, Any] = {
        "right_of_100": first,
        "right_in_five_of_100": five,
        "dense_bytes": file.dense_bytes,
        "published_bytes": published.stat().st_size,
        "file_bytes": file.file_bytes,
        "dense_ms": found.dense_ms,
        "fast_ms": found.converted_ms,
        "largest_difference": found.max_difference,
    }
    print(found)
    print(json.dumps(figures, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
