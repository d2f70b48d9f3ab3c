"""Weights that were small integers times a scale, and an offset: of GGUF files in Q4_K, Q4_1 and Q5_1 above all.

Weights of a run, consecutive in C order, share both. Each is float32(float32(code scale) + offset), with codes of at
most 8 bits from 0 on. Scales and offsets of such libraries have so few bits that nothing is rounded: differences of a
run's weights are then whole multiples of its scale, which is their greatest common divisor, and the least weight is the
offset. Both are kept if they give the weights to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tersetorch.storage.entry import Entry
from tersetorch.storage.errors import refuse
from tersetorch.storage.integers import CHUNK, NORMAL, runs, widest
from tersetorch.storage.streams import Array, Context

MOST = 255
# Bits below the largest magnitude of a run that a difference may have.
BITS = 40

Patterns = NDArray[np.uint32]


@dataclass(frozen=True)
class Found:
    """A matrix as codes: the run, scales and offsets as bit patterns, and codes, flat."""

    run: int
    scales: Patterns
    offsets: Patterns
    codes: NDArray[np.uint8]


def find(matrix: Patterns) -> Found | None:
    """A matrix [rows, columns] of bit patterns of float32 as codes of long runs; None for other weights."""
    numbers = matrix.view(np.float32)
    for run in runs(matrix):
        groups = numbers.reshape(-1, run)
        if _parts(widest(groups)) is not None:
            return _found(groups)
    return None


def context(entry: Entry) -> Context:
    """What a coder of codes knows: they rise with the numbers, and their middle is about zero."""
    return Context(entry.grid, None, np.arange(entry.entries), entry.entries // 2)


def numbers(entry: Entry, scales: Patterns, offsets: Patterns, codes: Array) -> Array:
    """The bit patterns that codes stand for.

    Raises:
        TerseFileError: a scale or an offset is no number, or a sum too large for one.
    """
    found = _sums(codes.reshape(-1, entry.block), scales, offsets)
    if not all(np.isfinite(part).all() for part in (scales.view(np.float32), offsets.view(np.float32), found)):
        refuse("hold finite scales and offsets, and sums that are finite", "NaN or infinity")
    bits: Array = found.view(np.uint32).reshape(-1)
    return bits


def _sums(codes: Array, scales: Patterns, offsets: Patterns) -> NDArray[np.float32]:
    with np.errstate(over="ignore", invalid="ignore"):
        found = codes.astype(np.float32)
        found *= scales.view(np.float32)[:, None]
        found += offsets.view(np.float32)[:, None]
    return found


def _found(groups: NDArray[np.float32]) -> Found | None:
    step = max(1, CHUNK // groups.shape[1])
    parts = []
    for at in range(0, len(groups), step):
        part = _parts(groups[at : at + step])
        if part is None:
            return None
        parts.append(part)
    scales, offsets, codes = (np.concatenate(part) for part in zip(*parts, strict=True))
    return Found(groups.shape[1], scales, offsets, codes.reshape(-1))


def _parts(groups: NDArray[np.float32]) -> tuple[Patterns, Patterns, NDArray[np.uint8]] | None:
    """Scales, offsets and codes of runs; None if one has none."""
    sizes = np.abs(groups)
    largest = sizes.max(1, keepdims=True)
    if not np.isfinite(largest).all() or bool(((sizes > 0) & (sizes < NORMAL)).any()):
        return None
    offsets = groups.min(1)
    unit = BITS - np.frexp(largest)[1]
    whole: NDArray[Any] = np.ldexp(groups.astype(np.float64) - offsets[:, None], unit).astype(np.int64)
    divisors = np.gcd.reduce(whole, axis=1)[:, None]
    codes = whole // np.maximum(divisors, 1)
    if codes.max() > MOST:
        return None
    scales = np.ldexp(divisors.astype(np.float64), -unit)[:, 0].astype(np.float32)
    if bool(((scales > 0) & (scales < NORMAL)).any()):
        return None
    bits = scales.view(np.uint32), offsets.view(np.uint32)
    if not np.array_equal(_sums(codes, *bits).view(np.uint32), np.ascontiguousarray(groups).view(np.uint32)):
        return None
    return *bits, codes.astype(np.uint8)
