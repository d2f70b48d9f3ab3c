"""One layer in many forms, timed side by side: what the suites of coded weights and of signs share."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tersetorch import _native

from .cases import Case
from .implementations import Implementation, LeftOut, Packed, max_error_of, refusal
from .options import Options
from .rates import Evictor, Rates
from .timing import interleave


def same(numbers: Tensor) -> Tensor:
    """The numbers as they are."""
    return numbers


@dataclass(frozen=True)
class Row:
    """An implementation and what it is given.

    Attributes:
        implementation: it.
        weight: what it packs, float32 [out, in].
        patterns: the forms of a weight beside which it is shown, of which the last is its own; a record for each.
        operations: of a call, a multiply and an add counted as two; None for those of a dense product.
        outcome: what its result must be, of the product in float64.
        moved: bytes of samples and results; None for those of float tensors, bfloat16 ones in that mode of a peer.
    """

    implementation: Implementation
    weight: Tensor
    patterns: Sequence[str]
    operations: float | None = None
    outcome: Callable[[Tensor], Tensor] = same
    moved: int | None = None

    @property
    def key(self) -> str:
        """What tells it from other rows of a layer."""
        return f"{self.implementation.name}, {self.patterns[-1]}"


class Layers:
    """Packs rows, compares every result with float64, and times those that are right.

    What was packed serves the next batches of the same case. limit_ms is the least time that the operations, or the
    bytes of weight, samples and result, once each, allow at the rates measured in the same run.
    """

    def __init__(self, suite: str, options: Options, rates: Rates, samples: Callable[[Tensor], Tensor] = same) -> None:
        """samples: what becomes of a case's samples."""
        self._samples = samples
        self._suite = suite
        self._options = options
        self._rates = rates
        self._case: Case | None = None
        self._packed: dict[str, tuple[Packed, float, int]] = {}
        self._evictor: Evictor | None = None

    def measure(
        self,
        case: Case,
        batch: int,
        rows: Iterable[Row],
        label: str,
        seconds: float,
        cache: Literal["warm", "cold"] = "warm",
    ) -> tuple[list[dict[str, Any]], list[LeftOut]]:
        """The records of the rows that the options ask for and that can run here, and what was left out.

        seconds: for each row; where the caches are emptied before every call, twice as many.
        """
        rows = list(rows)
        keys = {row.key for row in rows} if case == self._case else set()
        self._case, self._packed = case, {key: packed for key, packed in self._packed.items() if key in keys}
        with torch.inference_mode():
            return self._measure(case, batch, rows, label, seconds, cache)

    def _measure(
        self,
        case: Case,
        batch: int,
        rows: list[Row],
        label: str,
        seconds: float,
        cache: Literal["warm", "cold"],
    ) -> tuple[list[dict[str, Any]], list[LeftOut]]:
        x = self._samples(case.samples(batch))
        calls: dict[str, Callable[[], Any]] = {}
        kept: dict[str, tuple[Row, Packed, float, float]] = {}
        wants: dict[int, Tensor] = {}
        left_out = []
        for row in rows:
            one = row.implementation
            ours = one.family == "ours"
            if not self._options.takes(one.name, ours) or one.missing(batch, self._options.threads):
                continue
            try:
                packed, pack_ms = self._pack(case, row, batch)
                call = packed.bind(x)
                result = one.result(call())
            except Exception as problem:  # whatever a library raises where this CPU lacks something
                if ours:
                    raise
                left_out.append(LeftOut(one.name, label, str(problem).strip().partition("\n")[0]))
                continue
            held = row.weight if packed.held is None else packed.held
            want = wants.get(id(held))
            if want is None:
                want = wants[id(held)] = case.reference(x, held)
            error = max_error_of(result, row.outcome(want))
            wrong = refusal(error, one.mode)
            if wrong:
                left_out.append(LeftOut(one.name, label, wrong, wrong=True))
                continue
            calls[row.key], kept[row.key] = call, (row, packed, pack_ms, error)
        if not calls:
            return [], left_out
        if cache == "cold":
            self._evictor = self._evictor or Evictor(self._options.threads)
            times = interleave(calls, 2 * seconds * len(calls), self._evictor)
        else:
            times = interleave(calls, seconds * len(calls))
        records = []
        for key, (row, packed, pack_ms, error) in kept.items():
            numbers = x.numel() + case.numbers_out(batch)
            figures = self._figures(case, batch, cache, row, packed, numbers) | {"pack_ms": pack_ms, "max_error": error}
            figures |= times[key] | {"fraction_of_limit": figures["limit_ms"] / times[key]["p30_ms"]}
            records += [{"suite": self._suite, "pattern": pattern} | figures for pattern in row.patterns]
        return records, left_out

    def _pack(self, case: Case, row: Row, batch: int) -> tuple[Packed, float]:
        one = row.implementation
        packed, pack_ms, made_for = self._packed.get(row.key, (None, 0.0, batch))
        if packed is None or (one.follows_batch and made_for != batch):
            self._packed.pop(row.key, None)  # the last batch's copy goes before the next one comes
            start = time.perf_counter()
            packed = one.pack(case, row.weight, batch, self._options.threads)
            pack_ms = 1e3 * (time.perf_counter() - start)
            self._packed[row.key] = packed, pack_ms, batch
        return packed, pack_ms

    def _figures(self, case: Case, batch: int, cache: str, row: Row, packed: Packed, numbers: int) -> dict[str, Any]:
        one = row.implementation
        operations = 2 * case.multiplies(batch, 1.0) if row.operations is None else row.operations
        width = 2 if one.mode == "bfloat16" and one.family != "ours" else 4
        moved = packed.nbytes + (width * numbers if row.moved is None else row.moved)
        level = _native.cpu_active() if one.family == "ours" else _native.cpu_detected()
        limit_ms, bound = self._rates.limit_ms(operations, moved, one.mode, level, cache == "cold")
        return {
            "case": case.name,
            "kind": case.kind,
            "shape": list(case.shape),
            "density": 1.0,
            "batch": batch,
            "active": 1.0,
            "cache": cache,
            "threads": self._options.threads,
            "isa": _native.cpu_active(),
            "implementation": one.name,
            "family": one.family,
            "mode": one.mode,
            "weight_bytes": packed.nbytes,
            "bytes": moved,
            "ops": round(operations),
            "limit_ms": limit_ms,
            "limit": bound,
        }
