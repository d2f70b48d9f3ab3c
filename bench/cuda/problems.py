"""What the CUDA bench computes: layers of published networks, their weights compressed in one way, and samples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from tersetorch import ops

from ..cases import CASES, FLATS, Conv, Flat, Linear, flat_weight, weight_of
from ..options import Options
from ..suites import fixed

Family = Literal[
    "codebook",
    "sparse",
    "product",
    "conv",
    "xnor",
    "xnor_conv",
    "codebook_conv",
    "embedding",
    "flat",
    "fixed",
    "rounding",
]
FAMILIES: tuple[Family, ...] = get_args(Family)


@dataclass(frozen=True)
class Table:
    """An embedding; samples are rows looked up."""

    name: str
    rows: int
    columns: int

    kind = "embedding"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return (self.rows, self.columns)

    def numbers_out(self, batch: int) -> int:
        """Of a result."""
        return batch * self.columns

    def samples(self, batch: int) -> Tensor:
        """What goes in, int64 [batch]."""
        return torch.randint(self.rows, (batch,), generator=torch.Generator().manual_seed(1))

    def reference(self, x: Tensor, weight: Tensor) -> Tensor:
        """The result in float64."""
        return weight[x].double()


@dataclass(frozen=True)
class Numbers:
    """So many numbers to round, and no weight."""

    name: str
    size: int

    kind = "rounding"
    shape = (0,)

    def numbers_out(self, batch: int) -> int:
        """Of a result."""
        return batch * self.size

    def samples(self, batch: int) -> Tensor:
        """What goes in, float32 [batch, size]."""
        return torch.randn(batch, self.size, generator=torch.Generator().manual_seed(1)).mul_(2)

    def reference(self, x: Tensor, weight: Tensor) -> Tensor:
        """What rounding stays within a step of, in float64."""
        return x.double().clamp(fixed.ROUNDED.low, fixed.ROUNDED.high)


Case = Linear | Conv | Table | Numbers

ALL_CASES: dict[str, Case] = {
    **CASES,
    **FLATS,
    **{case.name: case for case in (Table("gpt-2 tokens", 50257, 768), Numbers("64 Mi floats", 2**26))},
}
BATCHES = {
    "codebook": (1, 8, 64, 256),
    "sparse": (1, 8, 64, 256),
    "product": (1, 8, 64),
    "conv": (1, 32),
    "xnor": (1, 64, 1024),
    "xnor_conv": (1, 32),
    "codebook_conv": (1, 32),
    "embedding": (4096, 65536),
    "flat": (1, 32),
    "fixed": (1, 64, 256),
    "rounding": (1,),
}
LAYERS = {
    "codebook": ("alexnet fc6", "alexnet fc7", "large transformer ffn"),
    "sparse": ("alexnet fc6", "alexnet fc7"),
    "product": ("alexnet fc6", "alexnet fc7"),
    "conv": ("resnet 256 at 14", "resnet 512 at 7", "alexnet conv3"),
    "xnor": ("alexnet fc6", "alexnet fc7"),
    "xnor_conv": ("resnet 128 at 28", "resnet 256 at 14", "resnet 512 at 7"),
    "codebook_conv": ("resnet 256 at 14", "resnet 512 at 7"),
    "embedding": ("gpt-2 tokens",),
    "flat": ("flat 128 5x5 at 14", "flat 256 3x3 at 14", "flat 96 5x5 at 56"),
    "fixed": ("alexnet fc7", "transformer ffn up"),
    "rounding": ("64 Mi floats",),
}
# Bits of a code, and of a code of images or tokens; densities; columns of a segment with entries of its codebook.
BITS, FEW_BITS, DENSITIES, CONV_DENSITIES = (3, 4, 6, 8), (4, 8), (0.1, 0.35), (0.2,)
SEGMENTS = ((4, 256), (8, 256), (4, 16), (2, 16))
CODED = ("codebook", "codebook_conv", "embedding")
FORMS = {
    "xnor": "signs",
    "xnor_conv": "signs",
    "flat": "2 stages",
    "fixed": f"{fixed.SAMPLES} by {fixed.WEIGHT}",
    "rounding": f"{fixed.ROUNDED}",
}


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
        if self.family in CODED:
            return f"{(self.entries - 1).bit_length()} bits"
        if self.family == "product":
            return f"{self.width} columns, {self.entries} entries"
        return FORMS.get(self.family, "random")

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
        x: of +1 and -1 where the weight is (xnor, xnor_conv); int64 rows (embedding).
        codes: uint8 [out, in] (codebook and the like), or packed (product); empty otherwise.
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
    names = LAYERS[family][:2][-1:] if options.quick else LAYERS[family]
    chosen = [
        group
        for name in names
        for batch in options.batches or BATCHES[family][: 1 if options.quick else None]
        for group in _forms(family, ALL_CASES[name], batch, options)
    ]
    return [group for group in chosen if options.takes_case(group.case.name)]


def _forms(family: Family, case: Case, batch: int, options: Options) -> Iterator[Group]:
    if family in CODED:
        yield from (
            Group(family, case, batch, entries=2**bits) for bits in (BITS if family == "codebook" else FEW_BITS)
        )
    elif family == "product":
        yield from (Group(family, case, batch, width=width, entries=entries) for width, entries in SEGMENTS)
    elif family in FORMS:
        yield Group(family, case, batch)
    else:
        densities = options.densities or (DENSITIES if family == "sparse" else CONV_DENSITIES)
        yield from (Group(family, case, batch, density=density) for density in densities)


def problem_of(group: Group, device: str) -> Problem:
    """Always the same numbers for the same group."""
    generator = torch.Generator().manual_seed(0)
    case, codes, codebook = group.case, torch.empty(0), torch.empty(0)
    rows, columns = case.shape[0], torch.Size(case.shape[1:]).numel()
    x = case.samples(group.batch)
    if group.family in CODED:
        codes = torch.randint(group.entries, (rows, columns), dtype=torch.uint8, generator=generator)
        # Even steps that bfloat16 holds: what 4-bit products of torch can hold too.
        codebook = (torch.arange(group.entries) - group.entries // 2)[None] / 2.0**12
        dense = codebook[0][codes.long()].reshape(case.shape)
    elif group.family == "product":
        segments = columns // group.width
        codes = torch.randint(group.entries, (rows, segments), generator=generator).to(torch.uint8)
        codebook = torch.randn(1, segments, group.width, group.entries, generator=generator) / columns**0.5
        codes = ops.product_pack(codes, group.entries)
        dense = ops.product_decode(codes, codebook, out_features=rows, in_features=columns)
    elif group.family in ("xnor", "xnor_conv"):
        dense = torch.randint(2, case.shape, generator=generator) * 2.0 - 1.0
        x = torch.where(x >= 0, 1.0, -1.0)
    elif group.family == "fixed" and isinstance(case, Linear):
        dense, x = fixed.weight_of(case), fixed.SAMPLES.nearest(x)
    elif isinstance(case, Flat):
        dense = flat_weight(case)
    elif isinstance(case, Linear | Conv):
        dense = weight_of(case, group.density, "random")
    else:
        dense = torch.empty(0)
    tensors = [t.to(device) for t in (x, dense, codes, codebook)]
    return Problem(group.family, case, group.density, group.entries, *tensors)
