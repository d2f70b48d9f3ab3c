"""Flattened convolutions, fused, beside the chain of torch's and the dense convolution that they stand in for.

The dense convolution computes something else: it is timed beside, and compared with its own reference. Large batches
are timed twice: with the pages that glibc gives, fresh ones for what is beyond 32 MiB, and with pages that are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..allocator import can_keep_pages, kept_pages
from ..cases import FLATS, Case, Flat, flat_weight
from ..flat_peers import FLAT, layer_of
from ..implementations import Implementation, LeftOut, Packed
from ..layers import Layers, Row
from ..options import Options
from ..peers import PEERS
from ..rates import Rates

SECONDS, QUICK_SECONDS = 0.3, 0.05
BATCHES = (1, 32)
DENSE = ("torch F.conv2d float32", "torch F.conv2d float32 channels_last", "oneDNN packed conv float32")
# What is measured without being asked for: the numbers to reach, and a few other sizes.
USUAL = (
    *((f"flat {channels} 3x3 at 14", 1) for channels in (96, 128, 256)),
    *((f"flat 128 5x5 at {size}", batch) for size in (14, 56) for batch in BATCHES),
    ("flat 96 3x3 at 32", 32),
    ("flat 96 5x5 at 56", 1),
    ("flat 256 3x3 at 56", 1),
)
FRESH, KEPT = "flattened", "flattened, pages kept"
# Bytes of a result from which glibc maps each anew, so that it matters whether pages are kept.
LARGE = 1 << 25


@dataclass(frozen=True)
class Group:
    """What is timed side by side: one layer, one batch and one way to get memory."""

    case: Flat
    batch: int
    kept: bool = False

    @property
    def label(self) -> str:
        """One line for a person."""
        return f"{self.case.name}, batch {self.batch}{', pages kept' * self.kept}"


def groups(options: Options) -> list[Group]:
    """The groups that the options ask for."""
    if options.full or options.batches:
        chosen = [(name, batch) for name in FLATS for batch in options.batches or BATCHES]
    else:
        chosen = [("flat 128 5x5 at 14", 1)] if options.quick else list(USUAL)
    found = []
    for case, batch in ((FLATS[name], batch) for name, batch in chosen if options.takes_case(name)):
        found.append(Group(case, batch))
        if 4 * case.numbers_out(batch) >= LARGE and can_keep_pages():
            found.append(Group(case, batch, kept=True))
    return found


class Flattened:
    """Measures groups. Every result is compared with float64 before it is timed."""

    def __init__(self, options: Options, rates: Rates) -> None:
        self._options = options
        self._layers = Layers("flat", options, rates)

    def measure(self, group: Group) -> tuple[list[dict[str, Any]], list[LeftOut]]:
        """The records of a group, and what was left out."""
        seconds = QUICK_SECONDS if self._options.quick else SECONDS
        with kept_pages() if group.kept else nullcontext():
            return self._layers.measure(group.case, group.batch, _rows(group), group.label, seconds)


def _rows(group: Group) -> Iterator[Row]:
    case = group.case
    patterns = (KEPT if group.kept else FRESH,)
    weight = flat_weight(case)
    channels = case.in_channels
    dense = torch.randn(case.shape, generator=torch.Generator().manual_seed(0)) / (channels * case.kernel**2) ** 0.5
    operations = 2.0 * group.batch * dense.numel() * case.out_size**2
    for one in PEERS["conv"]:
        if one.name in DENSE:
            yield Row(one, dense, patterns, operations)
    for one in (*FLAT, *OURS):
        halves = "bfloat16" in one.name and one.family == "ours"
        yield Row(one, weight, patterns, moved=2 * 2 * case.numbers_out(group.batch) if halves else None)


def _ours(dtype: torch.dtype, order: torch.memory_format) -> Callable[[Case, Tensor, int, int], Packed]:
    def pack(case: Case, weight: Tensor, batch: int, threads: int) -> Packed:
        assert isinstance(case, Flat)
        layer = layer_of(case, weight).pack("fused")

        def bind(x: Tensor) -> Callable[[], Tensor]:
            samples = x.to(dtype).contiguous(memory_format=order)
            return lambda: layer(samples)

        return Packed(bind, sum(buffer.nbytes for buffer in layer.buffers()))

    return pack


OURS = (
    Implementation("tersetorch flat", "ours", "float32", _ours(torch.float32, torch.contiguous_format)),
    Implementation("tersetorch flat channels_last", "ours", "float32", _ours(torch.float32, torch.channels_last)),
    Implementation(
        "tersetorch flat bfloat16 channels_last", "ours", "bfloat16", _ours(torch.bfloat16, torch.channels_last)
    ),
)
