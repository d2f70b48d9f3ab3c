"""What a bench table is made of: an implementation packs a weight once, then binds it to samples and runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor

from .cases import Case

Mode = Literal["float32", "bfloat16", "int8", "binary"]
# Largest error of a result, of the largest result, against float64.
MAX_ERROR: dict[Mode, float] = {"float32": 1e-4, "bfloat16": 2e-2, "int8": 5e-2, "binary": 0}


@dataclass(frozen=True)
class Packed:
    """A weight as an implementation keeps it.

    Attributes:
        bind: given samples, returns the call that is timed. What bind itself does (a session's start, samples of
            another dtype where the implementation's neighbours would hand over such) is not timed.
        nbytes: bytes of the weight that a call reads.
        held: the weight that it multiplies by, float32, where it cannot hold the one that it was given.
    """

    bind: Callable[[Tensor], Callable[[], Any]]
    nbytes: int
    held: Tensor | None = None


@dataclass(frozen=True)
class Implementation:
    """One row of a table.

    Attributes:
        name: what records call it.
        family: ours, or what kind of a peer; coded ones keep weights of few bits, binary ones multiply signs.
        mode: the arithmetic, which also says how large an error may be.
        pack: (case, weight, batch, threads) -> the packed weight.
        needs: modules without which it is not there.
        follows_batch: whether the packed weight depends on the batch.
        threads: the largest number of threads it can use; None for any.
        batches: the fewest and the most samples it is meant for.
        result: what a call returns, as a float tensor of the reference's shape.
    """

    name: str
    family: Literal["ours", "dense", "sparse", "coded", "binary"]
    mode: Mode
    pack: Callable[[Case, Tensor, int, int], Packed]
    needs: tuple[str, ...] = ()
    follows_batch: bool = False
    threads: int | None = None
    batches: tuple[int, float] = (1, math.inf)
    result: Callable[[Any], Tensor] = torch.as_tensor

    def missing(self, batch: int, threads: int) -> str | None:
        """Why it cannot run here, or None."""
        absent = [name for name in self.needs if find_spec(name) is None]
        if absent:
            return f"{', '.join(absent)} not installed (pip install 'tersetorch[bench]' has most of them)"
        if self.threads is not None and threads > self.threads:
            return f"uses {self.threads} thread"
        if not self.batches[0] <= batch <= self.batches[1]:
            return f"meant for {self.batches[0]} to {self.batches[1]} samples"
        return None


@dataclass(frozen=True)
class LeftOut:
    """What was not timed in a group, and why: its result was wrong, or it cannot run here."""

    implementation: str
    where: str
    reason: str
    wrong: bool = False

    def __str__(self) -> str:
        """One sentence."""
        return f"{self.implementation} is left out of {self.where}: {self.reason}"


def refusal(error: float, mode: Mode) -> str | None:
    """Why a result with that error is not timed, or None where the mode allows it."""
    allowed = MAX_ERROR[mode]
    return None if error <= allowed else f"its result must be within {allowed} of float64, got {error:.3g}"


def max_error_of(got: Tensor, want: Tensor) -> float:
    """Largest error over the largest expected result; infinite for another shape, NaN where one is NaN."""
    if got.shape != want.shape:
        return math.inf
    return ((got.double() - want).abs().max() / want.abs().max()).item()
