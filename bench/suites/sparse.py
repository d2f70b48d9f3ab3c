"""Sparse layers beside the dense and sparse ones that a user could run instead."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tersetorch import _native

from ..cases import CASES, DENSITIES, Case, Pattern, row_variation, weight_of
from ..implementations import Implementation, LeftOut, Packed, max_error_of, refusal
from ..options import Options
from ..ours import OURS
from ..peers import PEERS
from ..rates import Evictor, Rates
from ..timing import interleave

# Seconds for each implementation of a group; cold samples, most of which is evicting, get twice as many.
SECONDS, QUICK_SECONDS = 0.15, 0.08

BATCHES = {"linear": (1, 8, 64), "conv": (1,)}
FULL_BATCHES = {"linear": (1, 8, 16, 64, 128, 512), "conv": (1, 16)}


@dataclass(frozen=True)
class Group:
    """What is timed side by side: one layer, one batch, some densities.

    The dense implementations do not see the density and are timed once; their records repeat with each density.

    Attributes:
        cache: warm: each sample follows an untimed call of the same implementation; cold: everything has been evicted.
        active: the share of non-zero activations.
    """

    case: Case
    batch: int
    densities: tuple[float, ...] = DENSITIES
    pattern: Pattern = "random"
    cache: Literal["warm", "cold"] = "warm"
    active: float = 1.0

    @property
    def label(self) -> str:
        """One line for a person."""
        words = [self.case.name, f"batch {self.batch}", " ".join(f"{d:.0%}" for d in self.densities)]
        words += [self.pattern] * (self.pattern != "random") + [self.cache] * (self.cache != "warm")
        words += [f"{self.active:.0%} active"] * (self.active < 1)
        return ", ".join(words)


@dataclass(frozen=True)
class _Entry:
    implementation: Implementation
    density: float
    packed: Packed
    pack_ms: float
    error: float


def groups(options: Options) -> list[Group]:
    """The groups that the options ask for; those of one layer follow each other.

    Densities or batches that are named are all measured, of every case that matches, instead of the usual selection.
    """
    chosen: Iterable[Group]
    if options.full or options.batches or options.densities:
        chosen = _product(options)
    else:
        chosen = _quick() if options.quick else _selection()
    return [group for group in chosen if options.takes_case(group.case.name)]


def _selection() -> Iterator[Group]:
    """What the stored tables show."""
    fc6, fc7 = CASES["alexnet fc6"], CASES["alexnet fc7"]
    yield Group(fc6, 1)
    yield Group(fc6, 1, cache="cold")
    yield Group(fc6, 1, (0.09,), active=0.4)
    yield Group(fc6, 1, (0.09,), "trained")
    yield Group(fc7, 1)
    yield Group(fc7, 8)
    yield Group(fc7, 64)
    yield Group(fc7, 16, (0.09,))
    yield Group(fc7, 512, (0.09,))
    yield Group(fc7, 64, (0.09,), "trained")
    for name in ("alexnet fc8", "transformer ffn up", "transformer ffn down", "resnet50 1x1 as linear"):
        for batch in (1, 8, 64):
            yield Group(CASES[name], batch)
        if name == "transformer ffn up":
            yield Group(CASES[name], 512, (0.09,))
    yield Group(CASES["mobilenet pointwise as linear"], 1, (0.09, 0.35))
    yield Group(CASES["mobilenet pointwise as linear"], 64, (0.09, 0.35))
    yield Group(CASES["large transformer ffn"], 1, (0.09,))
    for name, case in CASES.items():
        if case.kind == "conv":
            yield Group(case, 1, (0.1, 0.35))
            if name in ("vgg16 conv3_1", "resnet 256 at 14"):
                yield Group(case, 16, (0.1, 0.35))


def _quick() -> Iterator[Group]:
    yield Group(CASES["alexnet fc6"], 1, (0.09,))
    yield Group(CASES["alexnet fc7"], 64, (0.09,))
    yield Group(CASES["transformer ffn up"], 8, (0.09,))
    yield Group(CASES["resnet 256 at 14"], 1, (0.1,))


def _product(options: Options) -> Iterator[Group]:
    densities = options.densities or DENSITIES
    for case in CASES.values():
        for batch in options.batches or (FULL_BATCHES if options.full else BATCHES)[case.kind]:
            yield Group(case, batch, densities)
            if options.full:
                yield Group(case, batch, densities, "trained")
                if batch == 1 and case.kind == "linear":
                    yield Group(case, batch, densities, cache="cold")


class Sparse:
    """Measures groups; what is packed for one layer and pattern is kept until the next.

    Every result is compared with float64 before it is timed. limit_ms is the least time that an implementation's own
    arithmetic and its own bytes (weight, samples and result, once each) allow at the rates measured in the same run,
    fraction_of_limit that time over its p30_ms.
    """

    def __init__(self, options: Options, rates: Rates) -> None:
        self._options = options
        self._rates = rates
        self._layer: tuple[Case, Pattern] | None = None
        self._weights: dict[float, Tensor] = {}
        self._packed: dict[tuple[str, float, int], tuple[Packed, float]] = {}
        self._evictor: Evictor | None = None

    def measure(self, group: Group) -> tuple[list[dict[str, Any]], list[LeftOut]]:
        """The records of a group, and what was left out."""
        with torch.inference_mode():
            return self._measure(group)

    def _measure(self, group: Group) -> tuple[list[dict[str, Any]], list[LeftOut]]:
        case, threads = group.case, self._options.threads
        if (case, group.pattern) != self._layer:
            self._weights.clear()
            self._packed.clear()
            gc.collect()
            self._layer = case, group.pattern
        x = _samples(group)
        entries: dict[str, _Entry] = {}
        calls: dict[str, Callable[[], Any]] = {}
        left_out = []
        for density in group.densities:
            weight = self._weight(density)
            want = case.reference(x, weight)
            for implementation in (*PEERS[case.kind], *OURS[case.kind]):
                ours, dense = implementation.family == "ours", implementation.family == "dense"
                if not self._options.takes(implementation.name, ours) or implementation.missing(group.batch, threads):
                    continue
                if dense and density != group.densities[0]:
                    continue
                try:
                    packed, pack_ms = self._pack(implementation, weight, density, group)
                    call = packed.bind(x)
                    error = max_error_of(implementation.result(call()), want)
                except Exception as problem:  # whatever a library raises where this CPU lacks something
                    if ours:
                        raise
                    reason = str(problem).partition("\n")[0]
                    left_out.append(LeftOut(implementation.name, group.label, reason))
                    continue
                wrong = refusal(error, implementation.mode)
                if wrong:
                    left_out.append(LeftOut(implementation.name, group.label, wrong, wrong=True))
                    continue
                key = f"{implementation.name} {density}"
                entries[key] = _Entry(implementation, density, packed, pack_ms, error)
                calls[key] = call
        if not calls:
            return [], left_out
        seconds = len(calls) * (QUICK_SECONDS if self._options.quick else SECONDS)
        if group.cache == "cold":
            self._evictor = self._evictor or Evictor(threads)
            times = interleave(calls, 2 * seconds, self._evictor)
        else:
            times = interleave(calls, seconds)
        records = []
        for density in group.densities:
            weight = self._weight(density)
            shared = _shared(group, density, weight, threads)
            if group.cache == "cold" and self._evictor:
                shared["evicted_bytes"] = self._evictor.nbytes
            kept = (weight != 0).float().mean().item()
            for key, entry in entries.items():
                if entry.implementation.family == "dense" or entry.density == density:
                    records.append(shared | self._figures(group, entry, times[key], kept, x))
        return records, left_out

    def _weight(self, density: float) -> Tensor:
        assert self._layer is not None
        if density not in self._weights:
            self._weights[density] = weight_of(self._layer[0], density, self._layer[1])
        return self._weights[density]

    def _pack(
        self, implementation: Implementation, weight: Tensor, density: float, group: Group
    ) -> tuple[Packed, float]:
        batch = group.batch if implementation.follows_batch else 0
        if implementation.follows_batch:  # the last batch's copy goes before the next one comes
            for key in [k for k in self._packed if k[0] == implementation.name and k[2] != batch]:
                del self._packed[key]
        key = (implementation.name, density, batch)
        if key not in self._packed:
            start = time.perf_counter()
            packed = implementation.pack(group.case, weight, group.batch, self._options.threads)
            self._packed[key] = packed, 1e3 * (time.perf_counter() - start)
        return self._packed[key]

    def _figures(self, group: Group, entry: _Entry, times: dict[str, float], kept: float, x: Tensor) -> dict[str, Any]:
        implementation, case = entry.implementation, group.case
        dense = implementation.family == "dense"
        operations = 2 * case.multiplies(group.batch, 1.0 if dense else kept)
        width = 2 if implementation.mode == "bfloat16" and dense else 4
        results = case.multiplies(group.batch, 1.0) / torch.Size(case.shape[1:]).numel()
        moved = entry.packed.nbytes + width * (x.numel() + round(results))
        level = _native.cpu_active() if implementation.family == "ours" else _native.cpu_detected()
        limit_ms, bound = self._rates.limit_ms(operations, moved, implementation.mode, level, group.cache == "cold")
        return {
            "implementation": implementation.name,
            "family": implementation.family,
            "mode": implementation.mode,
            "pack_ms": entry.pack_ms,
            "weight_bytes": entry.packed.nbytes,
            "bytes": moved,
            "ops": round(operations),
            "limit_ms": limit_ms,
            "limit": bound,
            "fraction_of_limit": limit_ms / times["p30_ms"],
            "max_error": entry.error,
            **times,
        }


def _samples(group: Group) -> Tensor:
    x = group.case.samples(group.batch)
    if group.active < 1:  # what a ReLU leaves
        keep = torch.rand(x.shape, generator=torch.Generator().manual_seed(2)) < group.active
        x = torch.where(keep, x.abs(), 0.0)
    return x


def _shared(group: Group, density: float, weight: Tensor, threads: int) -> dict[str, Any]:
    case = group.case
    return {
        "suite": "sparse",
        "case": case.name,
        "kind": case.kind,
        "shape": list(case.shape),
        "image": list(group.case.samples(1).shape[2:]),
        "density": density,
        "pattern": group.pattern,
        "row_variation": row_variation(weight),
        "batch": group.batch,
        "active": group.active,
        "cache": group.cache,
        "threads": threads,
        "isa": _native.cpu_active(),
    }
