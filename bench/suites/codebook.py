"""Dense layers whose weights are codes into a table, beside dense ones and beside other libraries' weights of few bits.

Others' weights have scales of small blocks and need 4.1 to 4.5 bits each; ours have one table, as k-means leaves them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tersetorch.formats import CodebookWeight
from tersetorch.nn import CodebookLinear

from ..cases import CASES, Case, Linear
from ..coded_peers import CODED, DENSE
from ..implementations import Implementation, LeftOut, Mode, Packed
from ..layers import Layers, Row
from ..options import Options
from ..peers import PEERS
from ..rates import Rates

# Seconds for each row of a group.
SECONDS, QUICK_SECONDS = 0.1, 0.06
BITS = (2, 3, 4, 5, 6, 8)
BATCHES = (1, 8, 64, 256)
MODES: tuple[tuple[str, Mode], ...] = (("exact", "float32"), ("bfloat16", "bfloat16"), ("int8", "int8"))


@dataclass(frozen=True)
class Group:
    """What is timed side by side: one layer, one batch, codes of some bits.

    The peers do not see our codes: they are timed once, and their records repeat with each number of bits.
    """

    case: Linear
    batch: int
    bits: tuple[int, ...] = BITS
    cache: Literal["warm", "cold"] = "warm"

    @property
    def label(self) -> str:
        """One line for a person."""
        return f"{self.case.name}, batch {self.batch}, {' '.join(map(str, self.bits))} bits" + (
            ", cold" * (self.cache == "cold")
        )


def groups(options: Options) -> list[Group]:
    """The groups that the options ask for; those of one layer follow each other.

    Batches that are named are all measured, of every linear layer that matches, instead of the usual selection.
    """
    if options.full or options.batches:
        layers = [case for case in CASES.values() if isinstance(case, Linear)]
        chosen = [Group(case, batch) for case in layers for batch in options.batches or BATCHES]
    else:
        chosen = list(_quick() if options.quick else _selection())
    return [group for group in chosen if options.takes_case(group.case.name)]


def _selection() -> Iterator[Group]:
    """What the stored tables show."""
    few = (4, 8)
    yield Group(_linear("alexnet fc6"), 1)
    yield Group(_linear("alexnet fc6"), 1, few, "cold")
    yield Group(_linear("alexnet fc6"), 8)
    yield Group(_linear("alexnet fc6"), 64, few)
    yield Group(_linear("alexnet fc6"), 256, few)
    for batch in BATCHES:
        yield Group(_linear("transformer ffn up"), batch)
    for name in ("transformer ffn down", "alexnet fc8"):
        for batch in (1, 8, 64):
            yield Group(_linear(name), batch, few)
    yield Group(_linear("vgg16 fc6"), 1, (4,))
    yield Group(_linear("large transformer ffn"), 1, (4,))


def _quick() -> Iterator[Group]:
    yield Group(_linear("alexnet fc7"), 1, (4,))
    yield Group(_linear("transformer ffn up"), 8, (4, 8))


def _linear(name: str) -> Linear:
    case = CASES[name]
    assert isinstance(case, Linear)
    return case


class Codebook:
    """Measures groups. Every result is compared with float64 before it is timed."""

    def __init__(self, options: Options, rates: Rates) -> None:
        self._options = options
        self._layers = Layers("codebook", options, rates)
        self._weights: dict[tuple[Linear, int], tuple[CodebookWeight, Tensor]] = {}

    def measure(self, group: Group) -> tuple[list[dict[str, Any]], list[LeftOut]]:
        """The records of a group, and what was left out."""
        seconds = QUICK_SECONDS if self._options.quick else SECONDS
        return self._layers.measure(group.case, group.batch, self._rows(group), group.label, seconds, group.cache)

    def _rows(self, group: Group) -> Iterator[Row]:
        if any(case != group.case for case, _ in self._weights):
            self._weights = {}
        for bits in group.bits:
            if (group.case, bits) not in self._weights:
                weight = weight_of(group.case, bits)
                self._weights[group.case, bits] = weight, weight.to_dense()
        patterns = [f"{bits} bits" for bits in group.bits]
        dense = self._weights[group.case, group.bits[-1]][1]
        for one in PEERS["linear"]:
            if one.name.startswith(DENSE):
                yield Row(one, dense, patterns)
        for one in CODED:
            yield Row(one, dense, patterns)
        for bits, pattern in zip(group.bits, patterns, strict=True):
            weight, dense = self._weights[group.case, bits]
            for name, mode in MODES:
                yield Row(_ours(weight, name, mode), dense, (pattern,))


def weight_of(case: Linear, bits: int) -> CodebookWeight:
    """Random codes of a normal distribution's quantiles, as float32 has them; the same for the same arguments."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(1 << bits, case.shape, generator=generator, dtype=torch.uint8)
    parts = (torch.arange(1 << bits) + 0.5) / (1 << bits)
    table = torch.erfinv(2 * parts - 1) * (2 / case.in_features) ** 0.5
    return CodebookWeight.from_codes(codes, table[None])


def _ours(weight: CodebookWeight, name: str, mode: Mode) -> Implementation:
    def pack(case: Case, dense: Tensor, batch: int, threads: int) -> Packed:
        layer = CodebookLinear(weight).eval().pack("codebook" if name == "exact" else f"codebook_{name}")

        def bind(x: Tensor) -> Callable[[], Any]:
            return lambda: layer(x)

        return Packed(bind, weight.nbytes)

    return Implementation(f"tersetorch codebook {name}", "ours", mode, pack)
