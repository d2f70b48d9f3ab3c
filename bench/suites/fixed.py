"""Fixed point: rounding beside torch's fake quantisation, products beside dense layers of the same numbers.

Rounding takes what a call takes with the memory of its result: fresh pages, as glibc gives them for so much, and pages
that are kept; a copy stands beside it, which moves the same bytes. Linear products take whole numbers and return the
rounded sums as whole numbers. Convolutions are the layer, which takes floats, rounds them and returns floats. Weights
and samples are numbers of 8 bits, which every implementation has exactly. An int16 product counts as two of int8: a
processor makes half as many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from tersetorch import _native
from tersetorch.formats import FixedFormat, FixedWeight
from tersetorch.nn import FixedPointConv2d
from tersetorch.ops import fixed_matmul, fixed_pack, fixed_round, fixed_round_whole

from ..allocator import can_keep_pages, kept_pages
from ..cases import CASES, Case, Conv
from ..implementations import Implementation, LeftOut, Packed
from ..layers import Layers, Row
from ..options import Options
from ..peers import PEERS
from ..rates import Rates
from ..timing import interleave

SECONDS, QUICK_SECONDS = 0.15, 0.05
SIZE, QUICK_SIZE = 1 << 24, 1 << 18
LAYERS = ("square 1024", "alexnet fc7", "transformer ffn up")
CONVOLUTIONS = ("resnet 256 at 14", "alexnet conv3")
BATCHES = {"linear": (1, 8, 64), "conv": (1, 16)}
DENSE = ("torch F.linear", "torch F.conv2d float32", "torch dynamic", "torch static int8", "oneDNN packed conv")
SAMPLES, WEIGHT, SUMS = FixedFormat(3, 5), FixedFormat(1, 7), FixedFormat(10, 12)
ROUNDED = FixedFormat(4, 12)
FRESH, KEPT = "floats", "floats, pages kept"
Round = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Group:
    """What is timed side by side: a layer and a batch, or rounding where there is no layer."""

    case: Case | None = None
    batch: int = 1
    size: int = SIZE
    kept: bool = False

    @property
    def label(self) -> str:
        """One line for a person."""
        if self.case is None:
            return f"round {self.size >> 10} Ki floats to {ROUNDED}{', pages kept' * self.kept}"
        return f"{self.case.name}, batch {self.batch}, fixed point"


def _fake_quantize(x: Tensor) -> Tensor:
    return torch.fake_quantize_per_tensor_affine(x, ROUNDED.step, 0, -(1 << 15), (1 << 15) - 1)


def _nearest(x: Tensor) -> Tensor:
    return (x / ROUNDED.step).round().clamp(-(1 << 15), (1 << 15) - 1) * ROUNDED.step


def _stochastic(x: Tensor) -> Tensor:
    return (x / ROUNDED.step + torch.rand_like(x)).floor().clamp(-(1 << 15), (1 << 15) - 1) * ROUNDED.step


@cache
def _compiled(run: Round) -> Round:
    return torch.compile(run)


# Family and what is called; a copy rounds nothing.
ROUNDINGS: dict[str, tuple[str, Round]] = {
    "tersetorch nearest": ("ours", lambda x: fixed_round(x, *_bits(ROUNDED))),
    "tersetorch stochastic": ("ours", lambda x: fixed_round(x, *_bits(ROUNDED), "stochastic", 1)),
    "tersetorch stochastic, int16 out": ("ours", lambda x: fixed_round_whole(x, *_bits(ROUNDED), "stochastic", 1)),
    "torch fake_quantize, nearest": ("dense", _fake_quantize),
    "torch.compile, nearest": ("dense", lambda x: _compiled(_nearest)(x)),
    "torch.compile, stochastic": ("dense", lambda x: _compiled(_stochastic)(x)),
    "torch clone": ("copy", torch.clone),
}


def groups(options: Options) -> list[Group]:
    """The groups that the options ask for."""
    size = QUICK_SIZE if options.quick else SIZE
    ways = (False,) if options.quick or not can_keep_pages() else (False, True)
    found = [group for group in (Group(size=size, kept=kept) for kept in ways) if options.takes_case(group.label)]
    names = (LAYERS[0], CONVOLUTIONS[0]) if options.quick else (*LAYERS, *CONVOLUTIONS)
    for case in (CASES[name] for name in names if options.takes_case(name)):
        batches = BATCHES[case.kind][-1:] if options.quick else BATCHES[case.kind]
        found += [Group(case, batch) for batch in options.batches or batches]
    return found


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
            with kept_pages() if group.kept else nullcontext():
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
            try:
                steps = run(x).double() / (ROUNDED.step if "int16" not in name else 1)
            except Exception as problem:  # a compiler that is not there
                if family == "ours":
                    raise
                left_out.append(LeftOut(name, group.label, str(problem).strip().partition("\n")[0]))
                continue
            inside = x.double().clamp(ROUNDED.low, ROUNDED.high) / ROUNDED.step
            # In steps: half of one to the nearest, and less than one at random.
            errors[name] = float((steps - inside).abs().max()) if family != "copy" else 0.0
            wrong = (steps != steps.round()).any() or not errors[name] <= (1.0 if "stochastic" in name else 0.5)
            if wrong and family != "copy":
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
            "case": Group(size=group.size).label,
            "kind": "rounding",
            "shape": [group.size],
            "density": 1.0,
            "pattern": KEPT if group.kept else FRESH,
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
    weight = weight_of(case)
    for one in PEERS[case.kind]:
        if one.name.startswith(DENSE):
            yield Row(one, weight, ("fixed",))
    operations = 2 * case.multiplies(batch, 1.0)
    for bits in (8, 16):
        if isinstance(case, Conv):
            yield Row(_convolution(bits), weight, ("fixed",), operations * bits / 8)
        else:
            numbers = batch * (case.in_features * bits // 8 + 4 * case.out_features)
            yield Row(_linear(bits), weight, ("fixed",), operations * bits / 8, moved=numbers)


def _linear(bits: int) -> Implementation:
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


def _convolution(bits: int) -> Implementation:
    # Numbers of 8 bits are numbers of 16 too.
    samples, held = (SAMPLES, WEIGHT) if bits == 8 else (FixedFormat(11, 5), FixedFormat(9, 7))

    def pack(case: Case, weight: Tensor, batch: int, threads: int) -> Packed:
        assert isinstance(case, Conv)
        channels = case.in_channels, case.out_channels
        dense = nn.Conv2d(*channels, case.kernel, case.stride, case.padding, groups=case.groups, bias=False)
        dense.weight = nn.Parameter(weight)
        layer = FixedPointConv2d.from_dense(dense, held, samples, SUMS)
        return Packed(lambda x: lambda: layer(x), layer.steps.nbytes)

    return Implementation(f"tersetorch fixed int{bits}", "ours", "int8", pack)
