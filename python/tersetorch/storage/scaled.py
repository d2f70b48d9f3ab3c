"""Weights that were codes into one table, times a scale: of bitsandbytes' NF4 and FP4.

Weights of a run, consecutive in C order, share a scale: each is dtype(float32(table[code] scale)). Tables of the types
are known, and their largest magnitude is 1: so a run's largest magnitude is its scale, rounded to dtype, and every
other weight is as close to one number of the table as the rounding lets it. Both are kept if the products are the
weights to the bit. A file holds its table: a reader knows none.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from tersetorch.storage import integers
from tersetorch.storage.entry import Entry
from tersetorch.storage.errors import refuse
from tersetorch.storage.importers.bitsandbytes import BLOCKS, TABLES
from tersetorch.storage.streams import Array, Context

Patterns = NDArray[np.uint32]
Float32 = NDArray[np.float32]

# Rising, -0.0 before 0.0.
_TABLES = [
    np.array(sorted(table, key=lambda number: (number, np.copysign(1, number))), np.float32)
    for table in TABLES.values()
]


@dataclass(frozen=True)
class Found:
    """A matrix as codes: the run, the table and scales as bit patterns, and codes, flat."""

    run: int
    table: Patterns
    scales: Patterns
    codes: NDArray[np.uint8]


def find(matrix: Array, dtype: torch.dtype) -> Found | None:
    """A matrix [rows, columns] of bit patterns of numbers of dtype as codes into a known table; None for others."""
    numbers = integers.numbers_of(matrix, dtype)
    for table in _TABLES:
        for run in sorted((run for run in BLOCKS if not matrix.size % run), reverse=True):
            groups = numbers.reshape(-1, run)
            if _solved(integers.widest(groups), table, dtype) is None:
                continue
            solved = _solved(groups, table, dtype)
            if solved is not None:
                scales, codes = solved
                if np.array_equal(_products(codes, table, scales, dtype), matrix.reshape(-1, run)):
                    return Found(run, table.view(np.uint32), scales.view(np.uint32), codes.reshape(-1))
    return None


def context(entry: Entry, table: Patterns) -> Context:
    """What a coder of codes knows: they rise with the numbers of the table."""
    order = np.argsort(table.view(np.float32), kind="stable")
    return Context(entry.grid, None, order, int(np.count_nonzero(table.view(np.float32) < 0)))


def numbers(entry: Entry, table: Patterns, scales: Patterns, codes: Array) -> Array:
    """The bit patterns that codes stand for.

    Raises:
        TerseFileError: a number of the table or a scale is none, or a product too large for one.
    """
    bits = _products(codes.reshape(-1, entry.block), table.view(np.float32), scales.view(np.float32), entry.dtype)
    parts = table.view(np.float32), scales.view(np.float32), integers.numbers_of(bits, entry.dtype)
    if not all(np.isfinite(part).all() for part in parts):
        refuse("hold finite scales and numbers in its table, and products that are finite", "NaN or infinity")
    return bits.reshape(-1)


def _products(codes: Array, table: Float32, scales: Float32, dtype: torch.dtype) -> Array:
    with np.errstate(over="ignore", invalid="ignore"):
        return integers.rounded(table[codes] * scales[:, None], dtype)


def _solved(groups: Float32, table: Float32, dtype: torch.dtype) -> tuple[Float32, NDArray[np.uint8]] | None:
    """Scales and codes of runs that have the products' numbers, None if some have none."""
    step = max(1, integers.CHUNK // groups.shape[1])
    scales, codes = np.zeros(len(groups), np.float32), np.empty(groups.shape, np.uint8)
    middles = (table[1:] + table[:-1]) / 2
    for at in range(0, len(groups), step):
        part = groups[at : at + step]
        sizes = np.abs(part)
        largest = sizes.max(1)
        if not np.isfinite(largest).all() or bool(((sizes > 0) & (sizes < integers.NORMAL)).any()):
            return None
        found = np.searchsorted(middles, part / np.where(largest, largest, 1)[:, None], "right").astype(np.uint8)
        found -= np.signbit(part) & (part == 0)  # -0.0, of a table that has it
        codes[at : at + step] = found
        scales[at : at + step] = largest
        if dtype is torch.float32:
            tries = iter([largest])
        else:
            error = integers.rounding(sizes, dtype, 0)
            units = np.abs(table[found]).astype(np.float64)
            of = np.where(units, units, 1)
            low = np.where(units, (sizes - error) / of, 0).max(1)
            high = np.where(units, (sizes + error) / of, np.inf).min(1)
            high = np.where(largest, high, low)
            if not (low <= high).all():
                return None
            tries = (patterns.view(np.float32) for patterns, _ in integers.to_try(low, high, exact=False))
        left = np.arange(len(part))
        for tried in tries:
            scales[at + left] = tried[left]
            products = integers.numbers_of(_products(found[left], table, tried[left], dtype), dtype)
            left = left[(products != part[left]).any(1)]
            if not left.size:
                break
        else:
            return None
    return scales, codes
