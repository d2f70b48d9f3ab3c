"""Products with weights of signs, beside dense layers, which take the same numbers as floats or int8.

Samples are signs, but for some groups: reals, as BinaryConnect's layers take them, and pixels, 8-bit numbers, as the
first layer of a network of signs does.

Of signs ours takes float samples and packs them within the time, unless its name says "packed": then samples come as
the layer before leaves them. "signs out" compares with thresholds and leaves packed signs for the next layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tersetorch.ops import (
    bitplane_conv2d,
    bitplane_matmul,
    sign_matmul,
    sign_pack,
    sign_pack_images,
    sign_unpack,
    xnor_conv2d,
    xnor_conv2d_pack,
    xnor_matmul,
    xnor_pack,
)

from ..binary_peers import BINARY
from ..cases import CASES, Case, Conv, Linear
from ..implementations import Implementation, LeftOut, Packed
from ..layers import Layers, Row, same
from ..options import Options
from ..peers import PEERS
from ..rates import Rates

SECONDS, QUICK_SECONDS = 0.15, 0.05
DENSE = ("torch", "oneDNN packed", "openvino", "LiteRT")
SPARSE = "torch sparse CSR"
LINEAR_BATCHES, CONV_BATCHES = (1, 64, 1024), (1, 16)
# Of samples that are no signs.
OTHERS: dict[Samples, tuple[tuple[Case, tuple[int, ...]], ...]] = {
    "reals": ((CASES["alexnet fc7"], (1, 64)), (CASES["transformer ffn up"], (64,))),
    "pixels": ((Linear("MNIST first layer", 4096, 784), (1, 100)), (Conv("CIFAR first layer", 128, 3, 3, 32), (1, 16))),
}


Samples = Literal["signs", "reals", "pixels"]


@dataclass(frozen=True)
class Group:
    """What is timed side by side: one layer and one batch of samples of a kind."""

    case: Case
    batch: int
    samples: Samples = "signs"

    @property
    def label(self) -> str:
        """One line for a person."""
        return f"{self.case.name}, batch {self.batch}, {self.samples}"


def groups(options: Options) -> list[Group]:
    """The groups that the options ask for.

    Batches that are named are all measured, of every layer that matches, instead of the usual selection.
    """
    if options.full or options.batches:
        chosen = [Group(case, batch) for case in CASES.values() for batch in options.batches or _batches(case)]
    else:
        chosen = [Group(CASES[name], batch) for name, batch in (_quick() if options.quick else _selection())]
    if not options.quick:
        others = [(case, batches, samples) for samples, rows in OTHERS.items() for case, batches in rows]
        chosen += [
            Group(case, batch, samples) for case, batches, samples in others for batch in options.batches or batches
        ]
    return [group for group in chosen if options.takes_case(group.case.name)]


def _batches(case: Case) -> tuple[int, ...]:
    return LINEAR_BATCHES if isinstance(case, Linear) else CONV_BATCHES


def _selection() -> Iterator[tuple[str, int]]:
    """What the stored tables show."""
    for batch in LINEAR_BATCHES:
        yield "alexnet fc7", batch
    # As many samples as the other library's own tables have.
    yield from (("square 1024", 1024), ("1024 from 512", 1024), ("256 from 2304", 784))
    yield from (("transformer ffn up", 1), ("transformer ffn up", 64))
    for name in ("resnet 128 at 28", "resnet 256 at 14", "resnet 512 at 7", "128 at 56"):
        for batch in CONV_BATCHES:
            yield name, batch


def _quick() -> Iterator[tuple[str, int]]:
    yield from (("square 1024", 64), ("resnet 256 at 14", 1))


class Binary:
    """Measures groups. Every result is compared with float64 before it is timed; sums of signs must be exact."""

    def __init__(self, options: Options, rates: Rates) -> None:
        self._options = options
        kinds: dict[Samples, Callable[[Tensor], Tensor]] = {"signs": signs, "reals": same, "pixels": pixels}
        self._layers = {kind: Layers("binary", options, rates, made) for kind, made in kinds.items()}

    def measure(self, group: Group) -> tuple[list[dict[str, Any]], list[LeftOut]]:
        """The records of a group, and what was left out."""
        seconds = QUICK_SECONDS if self._options.quick else SECONDS
        return self._layers[group.samples].measure(group.case, group.batch, _rows(group), group.label, seconds)


def _rows(group: Group) -> Iterator[Row]:
    case, batch = group.case, group.batch
    weight = weight_of(case)
    for one in PEERS[case.kind]:
        if one.name.startswith(DENSE) and one.name != SPARSE:
            yield Row(one, weight, (group.samples,))
    if group.samples == "reals":
        # An addition for every four columns.
        yield Row(_REALS, weight, ("reals",), operations=case.multiplies(batch, 1.0) / 2)
    elif group.samples == "pixels":
        x = case.samples(batch)
        yield Row(_PIXELS, weight, ("pixels",), moved=x.numel() + 4 * case.numbers_out(batch))
    else:
        yield from _signs(case, batch, weight)


def _signs(case: Case, batch: int, weight: Tensor) -> Iterator[Row]:
    depth, positions = (case.in_features, 1) if isinstance(case, Linear) else (case.in_channels, case.size**2)
    packed_in, floats_in = batch * positions * 8 * -(-depth // 64), 4 * batch * positions * depth
    floats_out = 4 * case.numbers_out(batch)
    bits_out = floats_out // 32
    for one in BINARY[case.kind]:
        packed = "packed" in one.name
        yield Row(one, weight, ("signs",), moved=(packed_in if packed else floats_in) + floats_out)
    yield Row(_ours(case, packed=False, bits=False), weight, ("signs",), moved=floats_in + floats_out)
    yield Row(_ours(case, packed=True, bits=False), weight, ("signs",), moved=packed_in + floats_out)
    yield Row(_ours(case, packed=False, bits=True), weight, ("signs",), outcome=signs, moved=floats_in + bits_out)
    yield Row(_ours(case, packed=True, bits=True), weight, ("signs",), outcome=signs, moved=packed_in + bits_out)


def signs(numbers: Tensor) -> Tensor:
    """+1 where a number is at least 0, else -1."""
    return torch.where(numbers >= 0, 1.0, -1.0).to(numbers.dtype)


def pixels(numbers: Tensor) -> Tensor:
    """Whole numbers from 0 to 255, of numbers around 0."""
    return (64 * numbers + 128).round().clamp(0, 255)


def weight_of(case: Case) -> Tensor:
    """Random signs, always the same for the same case."""
    generator = torch.Generator().manual_seed(0)
    return signs(torch.rand(case.shape, generator=generator) - 0.5)


def _pack_reals(case: Case, weight: Tensor, batch: int, threads: int) -> Packed:
    stored, rows = xnor_pack(sign_pack(weight)), len(weight)
    return Packed(lambda x: lambda: sign_matmul(x, stored, out_features=rows), stored.nbytes)


def _pack_pixels(case: Case, weight: Tensor, batch: int, threads: int) -> Packed:
    stored, rows, scale = xnor_pack(sign_pack(weight.flatten(1))), len(weight), torch.ones(len(weight))

    def bind(x: Tensor) -> Callable[[], Tensor]:
        images = x.to(torch.uint8)
        if isinstance(case, Linear):
            return lambda: bitplane_matmul(images, stored, in_features=case.in_features, out_features=rows, scale=scale)
        sizes: dict[str, Any] = {"kernel_size": case.kernel, "stride": case.stride, "padding": case.padding}
        return lambda: bitplane_conv2d(images, stored, out_channels=rows, scale=scale, **sizes)

    return Packed(bind, stored.nbytes)


_REALS = Implementation("tersetorch sign matmul", "ours", "float32", _pack_reals)
# Exact, but held against int8 products, which the pixels could have too.
_PIXELS = Implementation("tersetorch bitplane", "ours", "int8", _pack_pixels)


def _ours(case: Case, packed: bool, bits: bool) -> Implementation:
    def pack(case: Case, weight: Tensor, batch: int, threads: int) -> Packed:
        scale = None if bits else torch.ones(len(weight))
        thresholds = torch.zeros(len(weight), dtype=torch.int32) if bits else None
        if isinstance(case, Conv):
            # The padding is exact zeros, as in the dense layers.
            stored = xnor_conv2d_pack(sign_pack_images(weight), groups=case.groups)
            sizes: dict[str, Any] = {
                "in_channels": case.in_channels,
                "out_channels": case.out_channels,
                "kernel_size": case.kernel,
                "stride": case.stride,
                "padding": case.padding,
                "groups": case.groups,
            }
            product: Callable[..., Tensor] = xnor_conv2d
        else:
            stored = xnor_pack(sign_pack(weight))
            sizes = {"in_features": case.in_features, "out_features": case.out_features}
            product = xnor_matmul

        def bind(x: Tensor) -> Callable[[], Tensor]:
            if isinstance(case, Conv):
                x = x.contiguous(memory_format=torch.channels_last)
                samples = sign_pack_images(x) if packed else x
            else:
                samples = sign_pack(x) if packed else x
            return lambda: product(samples, stored, scale=scale, thresholds=thresholds, **sizes)

        return Packed(bind, stored.nbytes)

    def result(y: Tensor) -> Tensor:
        if not bits:
            return y
        unpacked = sign_unpack(y, case.shape[0])
        return unpacked if isinstance(case, Linear) else unpacked.permute(0, 3, 1, 2)

    name = f"tersetorch xnor{' packed' * packed}{', signs out' * bits}"
    return Implementation(name, "ours", "binary", pack, result=result)
