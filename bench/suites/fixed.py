"""Fixed point: rounding beside torch's fake quantisation, products beside dense layers of the same numbers.

Rounding takes what a call takes with the memory of its result, as a user has it: fresh pages where the allocator gives
them back. Products take whole numbers and return the rounded sums as whole numbers; weights and samples are numbers of
8 bits, which every implementation has exactly. An int16 product counts as two of int8: a processor makes half as many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tersetorch import _native
from tersetorch.formats import FixedFormat, FixedWeight
from tersetorch.ops import fixed_matmul, fixed_pack, fixed_round, fixed_round_whole

from ..cases import CASES, Case, Linear
from ..implementations import Implementation, LeftOut, Packed
from ..layers import Layers, Row
from ..options import Options
from ..peers import PEERS
from ..rates import Rates
from ..timing import interleave

SECONDS, QUICK_SECONDS = 0.15, 0.05
SIZE, QUICK_SIZE = 1 << 24, 1 << 18
LAYERS = ("square 1024", "alexnet fc7", "transformer ffn up")
BATCHES = (1, 8, 64)
DENSE = ("torch F.", "torch dynamic")
SAMPLES, WEIGHT, SUMS = FixedFormat(3, 5), FixedFormat(1, 7), FixedFormat(10, 12)
ROUNDED = FixedFormat(4, 12)
Round = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Group:
    """What is timed side by side: a layer and a batch, or rounding where there is no layer."""

    case: Case | None = None
    batch: int = 1
    size: int = SIZE

    @property
    def label(self) -> str:
        """One line for a person."""
        if self.case is None:
            return f"round {self.size >> 10} Ki floats to {ROUNDED}"
        return f"{self.case.name}, batch {self.batch}, fixed point"


ROUNDINGS: dict[str, tuple[str, Round]] = {
    "tersetorch nearest": ("ours", lambda x: fixed_round(x, *_bits(ROUNDED))),
    "tersetorch stochastic": ("ours", lambda x: fixed_round(x, *_bits(ROUNDED), "stochastic", 1)),
    "tersetorch stochastic, int16 out": ("ours", lambda x: fixed_round_whole(x, *_bits(ROUNDED), "stochastic", 1)),
    "torch fake_quantize, nearest": (
        "dense",
        lambda x: torch.fake_quantize_per_tensor_affine(x, ROUNDED.step, 0, -(1 << 15), (1 << 15) - 1),
    ),
}


def groups(options: Options) -> list[Group]:
    """The groups that the options ask for."""
    layers = LAYERS[:1] if options.quick else LAYERS
    batches = options.batches or (BATCHES[-1:] if options.quick else BATCHES)
    rounding = Group(size=QUICK_SIZE if options.quick else SIZE)
    found = [rounding] if options.takes_case(rounding.label) else []
    return found + [Group(CASES[name], batch) for name in layers for batch in batches if options.takes_case(name)]


class Fixed:
    """Measures groups. Every result is compared with the formula in float64 before it is timed."""

    def __init__(self, options: Options, rates: Rates) -> None:
        self._options = options
        self._rates = rates
        self._layers = Layers("fixed", options, rates, SAMPLES.nearest)

    def measure(self, group: Group) -> tuple[list[dict[str, Any]], list[LeftOut]]:
        """The records of a group, and what was left out."""
        seconds = QUICK_SECONDS if self._options.quick else SECONDS
        if group.case is None:
            return self._rounding(group, seconds)
        return self._layers.measure(group.case, group.batch, _rows(group.case, group.batch), group.label, seconds)

    def _rounding(self, group: Group, seconds: float) -> tuple[list[dict[str, Any]], list[LeftOut]]:
        x = torch.randn(group.size, generator=torch.Generator().manual_seed(0)).mul_(2)
        calls: dict[str, Callable[[], Any]] = {}
        errors: dict[str, float] = {}
        left_out = []
        for name, (family, run) in ROUNDINGS.items():
            if not self._options.takes(name, family == "ours"):
                continue
            steps = run(x).double() / (ROUNDED.step if "int16" not in name else 1)
            inside = x.double().clamp(ROUNDED.low, ROUNDED.high) / ROUNDED.step
            # In steps: half of one to the nearest, and less than one at random.
            errors[name] = float((steps - inside).abs().max())
            if (steps != steps.round()).any() or not errors[name] <= (1.0 if "stochastic" in name else 0.5):
                left_out.append(LeftOut(name, group.label, "it rounds to something else", wrong=True))
                continue
            calls[name] = lambda run=run: run(x)  # type: ignore[misc]
        times = interleave(calls, 4 * seconds * len(calls)) if calls else {}
        return [self._record(group, name, errors[name], times[name]) for name in calls], left_out

    def _record(self, group: Group, name: str, error: float, times: dict[str, float]) -> dict[str, Any]:
        moved = group.size * (6 if "int16" in name else 8)
        limit_ms, bound = self._rates.limit_ms(0, moved, "float32", _native.cpu_active(), True)
        return {
            "suite": "fixed",
            "case": group.label,
            "kind": "rounding",
            "shape": [group.size],
            "density": 1.0,
            "pattern": "floats",
            "batch": 1,
            "active": 1.0,
            "cache": "warm",
            "threads": self._options.threads,
            "isa": _native.cpu_active(),
            "implementation": name,
            "family": ROUNDINGS[name][0],
            "mode": "float32",
            "weight_bytes": 0,
            "bytes": moved,
            "ops": 0,
            "pack_ms": 0.0,
            "max_error": error,
            "limit_ms": limit_ms,
            "limit": bound,
            "fraction_of_limit": limit_ms / times["p30_ms"],
            **times,
        }


def weight_of(case: Case) -> Tensor:
    """Normal numbers of 8 bits, always the same for the same case."""
    return WEIGHT.nearest(torch.randn(case.shape, generator=torch.Generator().manual_seed(0)).mul_(0.2))


def _bits(format: FixedFormat) -> tuple[int, int]:
    return format.integer_bits, format.fraction_bits


def _rows(case: Case, batch: int) -> Iterator[Row]:
    assert isinstance(case, Linear)
    weight = weight_of(case)
    for one in PEERS[case.kind]:
        if one.name.startswith(DENSE):
            yield Row(one, weight, ("fixed",))
    operations = 2 * case.multiplies(batch, 1.0)
    for bits in (8, 16):
        numbers = batch * (case.in_features * bits // 8 + 4 * case.out_features)
        yield Row(_ours(bits), weight, ("fixed",), operations * bits / 8, moved=numbers)


def _ours(bits: int) -> Implementation:
    dtype = torch.int8 if bits == 8 else torch.int16

    def pack(case: Case, weight: Tensor, batch: int, threads: int) -> Packed:
        packed = fixed_pack(FixedWeight.from_dense(weight, WEIGHT, dtype).steps)
        integer_bits, fraction_bits = _bits(SUMS)
        sum_fraction_bits = SAMPLES.fraction_bits + WEIGHT.fraction_bits

        def bind(x: Tensor) -> Callable[[], Tensor]:
            whole = fixed_round_whole(x, *_bits(SAMPLES), dtype=dtype)
            return lambda: fixed_matmul(
                whole,
                packed,
                rows=weight.shape[0],
                sum_fraction_bits=sum_fraction_bits,
                integer_bits=integer_bits,
                fraction_bits=fraction_bits,
            )

        return Packed(bind, packed.nbytes)

    return Implementation(f"tersetorch fixed int{bits}", "ours", "int8", pack, result=lambda y: y.float() * SUMS.step)
