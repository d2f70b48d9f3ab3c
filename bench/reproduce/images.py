"""Images that rows train on, hold out and test on."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from tersetorch.zoo import read_cifar10
from tersetorch.zoo.photos import Part

HELD_OUT = 5000


class Images(NamedTuple):
    """Images and labels of each part."""

    train: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def cifar10(
    seed: int, count: int | None = None, *, memory_format: torch.memory_format = torch.contiguous_format
) -> Images:
    """CIFAR-10's images, values in [-1, 1]: the seed draws HELD_OUT of the training images, and others to train on.

    Args:
        seed: of the order of the training images.
        count: of images to train on, at most; None for all that are not held out.
        memory_format: as torch.Tensor.contiguous takes it.

    Raises:
        FileNotFoundError: the images are not in the folder that TERSETORCH_DATA names.
    """
    images, labels = _part("train")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    held_out = order[:HELD_OUT]
    kept = order[HELD_OUT:] if count is None else order[HELD_OUT : HELD_OUT + count]
    parts = (images[kept], labels[kept]), (images[held_out], labels[held_out]), _part("test")
    return Images(*((some.contiguous(memory_format=memory_format).float() / 127.5 - 1, own) for some, own in parts))


@cache
def _part(part: Part) -> tuple[Tensor, Tensor]:
    return read_cifar10(part)
