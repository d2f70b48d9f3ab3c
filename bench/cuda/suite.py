"""Measures a group: every row's result is compared with float64 on the device, then all are timed in turns."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..implementations import LeftOut, max_error_of, refusal
from ..options import Options
from . import timing
from .implementations import rows
from .problems import Group, Problem, problem_of
from .rates import Rates
from .row import Row

# Of each row, for its replays; capturing comes on top.
SECONDS, QUICK_SECONDS = 0.04, 0.015
# All copies of a weight, in sizes of the L2 cache: with less the cache would still hold a part when its turn comes.
CACHES = 4
MAX_COPIES = 32

Interleave = Callable[[Mapping[str, timing.Calls], float], dict[str, dict[str, float]]]


class Cuda:
    """Measures groups.

    limit_ms is the least time that the operations of the compressed weight, or the bytes of weight, samples and result,
    allow at the rates that torch reaches in the same run.
    """

    def __init__(
        self, options: Options, rates: Rates, device: str = "cuda", interleave: Interleave = timing.interleave
    ) -> None:
        """Device and interleave are for tests without a GPU."""
        self._options, self._rates, self._device, self._interleave = options, rates, device, interleave

    def measure(self, group: Group) -> tuple[list[dict[str, Any]], list[LeftOut]]:
        """The records of a group, and what was left out."""
        tf32 = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = False  # float32 means float32, as it does for matrices
        try:
            with torch.inference_mode():
                return self._measure(group)
        finally:
            torch.backends.cudnn.allow_tf32 = tf32

    def _measure(self, group: Group) -> tuple[list[dict[str, Any]], list[LeftOut]]:
        problem = problem_of(group, self._device)
        want = problem.case.reference(problem.x, problem.dense)
        calls: dict[str, timing.Calls] = {}
        kept: dict[str, tuple[Row, float | None]] = {}
        left_out = []
        for row in rows(problem):
            ours = row.family == "ours"
            if not self._options.takes(row.name, ours):
                continue
            copies = max(1, min(MAX_COPIES, math.ceil(CACHES * self._rates.cache / max(1, row.nbytes))))
            try:
                bound = [row.bind() for _ in range(copies)]
                error = max_error_of(bound[0]() * row.step, want) if row.checked else None
            except Exception as reason:  # whatever a library raises where this GPU lacks something
                if ours:
                    raise
                left_out.append(LeftOut(row.name, group.label, str(reason).partition("\n")[0]))
                continue
            wrong = None if error is None else refusal(error, row.mode)
            if wrong:
                left_out.append(LeftOut(row.name, group.label, wrong, wrong=ours))
                continue
            calls[row.name], kept[row.name] = bound, (row, error)
        if not calls:
            return [], left_out
        times = self._interleave(calls, len(calls) * (QUICK_SECONDS if self._options.quick else SECONDS))
        return [self._record(group, problem, *kept[name], times[name]) for name in calls], left_out

    def _record(
        self, group: Group, problem: Problem, row: Row, error: float | None, times: dict[str, float]
    ) -> dict[str, Any]:
        size = 4 if row.mode == "float32" else 2
        floats = size * (problem.x.numel() + problem.case.numbers_out(len(problem.x)))
        moved = row.nbytes + (floats if row.moved is None else row.moved)
        limit_ms, bound = self._rates.limit_ms(row.operations, moved, row.mode)
        return {
            "suite": group.family,
            "case": group.case.name,
            "kind": group.case.kind,
            "shape": list(group.case.shape),
            "density": group.density,
            "pattern": group.pattern,
            "batch": group.batch,
            "active": 1.0,
            "cache": "cold",
            "threads": 0,
            "implementation": row.name,
            "family": row.family,
            "mode": row.mode,
            "weight_bytes": row.nbytes,
            "bytes": moved,
            "ops": round(row.operations),
            "limit_ms": limit_ms,
            "limit": bound,
            "fraction_of_limit": limit_ms / times["p30_ms"],
            "max_error": error,
            **times,
        }
