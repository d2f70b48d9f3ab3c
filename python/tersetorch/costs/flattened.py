"""What a flattened convolution does: in each stage three products along one dimension each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from tersetorch import ops
from tersetorch.nn import FlattenedConv2d


class Step(NamedTuple):
    """One of the three convolutions of a stage.

    Attributes:
        filters: its weight, a row for each map.
        bias: what is added to its maps, or None.
        positions: where each filter is applied, of all images.
        numbers: values that it gives.
    """

    filters: Tensor
    bias: Tensor | None
    positions: int
    numbers: int


def steps(module: FlattenedConv2d, shape: Sequence[int]) -> Iterator[Step]:
    """The steps of a call with images [..., C, H, W] of that shape, in the order of computing."""
    images, (height, width) = prod(shape[:-3]), shape[-2:]
    for s in range(module.stages):
        filters = module.filters(s)
        out, rank, *taps, down, across, above, beside = module._op_sizes[8 * s : 8 * (s + 1)]
        maps = rank * out
        yield Step(filters.lateral, filters.lateral_bias, images * height * width, images * height * width * maps)
        height = (height + 2 * above - taps[0]) // down + 1
        yield Step(filters.vertical, filters.vertical_bias, images * height * width, images * height * width * maps)
        width = (width + 2 * beside - taps[1]) // across + 1
        yield Step(filters.horizontal, filters.bias, images * height * width, images * height * width * out)


def products(module: FlattenedConv2d, shapes: Iterable[Sequence[int]]) -> tuple[int, int]:
    """Multiply-accumulates of calls with images of these shapes, and those whose weight is not zero."""
    macs = effective = 0
    for shape in shapes:
        for step in steps(module, shape):
            macs += step.positions * step.filters.numel()
            kept = step.filters.numel() if step.filters.is_meta else int(torch.count_nonzero(step.filters.detach()))
            effective += step.positions * kept
    return macs, effective


def additions(module: FlattenedConv2d, shapes: Iterable[Sequence[int]]) -> int:
    """Biases that these calls add."""
    return sum(step.numbers for shape in shapes for step in steps(module, shape) if step.bias is not None)


def moved(module: FlattenedConv2d, read: int, written: int, shape: Sequence[int]) -> list[int]:
    """Bytes handed and given by what a call does as one: all of it in layout "fused", each step in "chain"."""
    if module.layout == "fused":
        return [read + written]
    maps = [step.numbers * module.get_parameter("lateral_0").itemsize for step in steps(module, shape)]
    maps[-1] = written
    return [before + after for before, after in zip([read, *maps], maps, strict=False)]


def weight_bytes(module: FlattenedConv2d) -> int:
    """Bytes of the filters and biases as the layout has them."""
    if module.layout == "chain":
        return sum(parameter.nbytes for parameter in module.parameters())
    with torch.no_grad():
        return sum(ops.flat_conv2d_pack(module.filters(s), rank=module.rank).nbytes for s in range(module.stages))
