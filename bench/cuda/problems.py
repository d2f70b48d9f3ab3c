"""What the CUDA bench computes: layers of published networks, their weights compressed in one way, and samples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tersetorch import ops

from ..cases import CASES, Case, weight_of
from ..options import Options

Family = Literal["codebook", "sparse", "product", "conv", "xnor"]
FAMILIES: tuple[Family, ...] = ("codebook", "sparse", "product", "conv", "xnor")
BATCHES = {
    "codebook": (1, 8, 64, 256),
    "sparse": (1, 8, 64, 256),
    "product": (1, 8, 64),
    "conv": (1, 32),
    "xnor": (1, 64, 1024),
}
LAYERS = {
    "codebook": ("alexnet fc6", "alexnet fc7", "large transformer ffn"),
    "sparse": ("alexnet fc6", "alexnet fc7"),
    "product": ("alexnet fc6", "alexnet fc7"),
    "conv": ("resnet 256 at 14", "resnet 512 at 7", "alexnet conv3"),
    "xnor": ("alexnet fc6", "alexnet fc7"),
}
# Bits of a code; densities; columns of a segment with entries of its codebook.
BITS, DENSITIES, SEGMENTS, CONV_DENSITIES = (3, 4, 6, 8), (0.1, 0.35), ((4, 256), (8, 256), (4, 16), (2, 16)), (0.2,)


@dataclass(frozen=True)
class Group:
    """What is timed side by side: one layer, compressed in one way, one batch."""

    family: Family
    case: Case
    batch: int
    density: float = 1.0
    width: int = 1
    entries: int = 0

    @property
    def pattern(self) -> str:
        """The form in words, which records keep as their pattern."""
        if self.family == "codebook":
            return f"{(self.entries - 1).bit_length()} bits"
        if self.family == "xnor":
            return "signs"
        return f"{self.width} columns, {self.entries} entries" if self.family == "product" else "random"

    @property
    def label(self) -> str:
        """One line for a person."""
        form = f"density {self.density}" if self.pattern == "random" else self.pattern
        return f"{self.family}: {self.case.name}, batch {self.batch}, {form}"


@dataclass(frozen=True)
class Problem:
    """A group's tensors on the device.

    Attributes:
        dense: float32, what the compressed weight stands for.
        x: of +1 and -1 where the weight is (xnor).
        codes: uint8 [out, in] (codebook), or packed (product); empty otherwise.
        codebook: float32 [1, entries], or [1, segments, width, entries]; empty otherwise.
    """

    family: Family
    case: Case
    density: float
    entries: int
    x: Tensor
    dense: Tensor
    codes: Tensor
    codebook: Tensor


def groups(family: Family, options: Options) -> list[Group]:
    """The groups of a family that the options ask for."""
    names = LAYERS[family][1:2] if options.quick else LAYERS[family]
    chosen = [
        group
        for name in names
        for batch in options.batches or BATCHES[family][: 1 if options.quick else None]
        for group in _forms(family, CASES[name], batch, options)
    ]
    return [group for group in chosen if options.takes_case(group.case.name)]


def _forms(family: Family, case: Case, batch: int, options: Options) -> Iterator[Group]:
    if family == "codebook":
        yield from (Group(family, case, batch, entries=2**bits) for bits in BITS)
    elif family == "product":
        yield from (Group(family, case, batch, width=width, entries=entries) for width, entries in SEGMENTS)
    elif family == "xnor":
        yield Group(family, case, batch)
    else:
        densities = options.densities or (DENSITIES if family == "sparse" else CONV_DENSITIES)
        yield from (Group(family, case, batch, density=density) for density in densities)


def problem_of(group: Group, device: str) -> Problem:
    """Always the same numbers for the same group."""
    generator = torch.Generator().manual_seed(0)
    case, codes, codebook = group.case, torch.empty(0), torch.empty(0)
    rows, columns = case.shape[0], torch.Size(case.shape[1:]).numel()
    if group.family == "codebook":
        codes = torch.randint(group.entries, (rows, columns), dtype=torch.uint8, generator=generator)
        # Even steps that bfloat16 holds: what 4-bit products of torch can hold too.
        codebook = (torch.arange(group.entries) - group.entries // 2)[None] / 2.0**12
        dense = codebook[0][codes.long()]
    elif group.family == "product":
        segments = columns // group.width
        codes = torch.randint(group.entries, (rows, segments), generator=generator).to(torch.uint8)
        codebook = torch.randn(1, segments, group.width, group.entries, generator=generator) / columns**0.5
        codes = ops.product_pack(codes, group.entries)
        dense = ops.product_decode(codes, codebook, out_features=rows, in_features=columns)
    elif group.family == "xnor":
        dense = torch.randint(2, (rows, columns), generator=generator) * 2.0 - 1.0
    else:
        dense = weight_of(case, group.density, "random")
    x = case.samples(group.batch)
    x = torch.where(x >= 0, 1.0, -1.0) if group.family == "xnor" else x
    tensors = [t.to(device) for t in (x, dense, codes, codebook)]
    return Problem(group.family, case, group.density, group.entries, *tensors)
