"""Weights that were integers of at most nine bits with their sign, times a scale: of quantised models, read exactly.

Weights of a run, consecutive in C order, share a scale: the whole tensor, a row, or a part of one. Each is

    dtype(float32(float32(integer scale) factor))

with a float32 scale, and no factor but where the library multiplied twice (bitsandbytes, by 1 / 127). Zero points are
part of the integers, [-255, 255]. A scale may be negative: that of a run whose zeros are -0.0.

A scale is found from a run's largest magnitude, which is one of 255 multiples of it. Each weight then says how large
its integer may be, as it was rounded once, and the integer how large the scale may be; of the scales that are left one
with few bits is taken. It is kept if the products are the weights to the bit. A few runs tell whether to look at all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tersetorch.storage.entry import Entry
from tersetorch.storage.errors import refuse
from tersetorch.storage.streams import Array, Context

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST = 255
# Weights of the shortest run that is looked for, and of each run that is looked at first.
SHORTEST = 16
WEIGHTS = 64
# Runs of those that are looked at first that have the most magnitudes.
TRIED = 16
# Weights that are looked at together.
CHUNK = 1 << 18
# Zeros that a scale may end with: it was bfloat16, or float16, or neither.
ZEROS = (16, 13, 0)
# Where bounds are loose and the middle is none: of the way between them, halves, quarters, ... of 128.
SHARES = tuple(int(f"{step:07b}"[::-1], 2) / 128 for step in range(2, 128))
NORMAL = 2.0**-126
# float32(1 / 127), as bitsandbytes writes it; 0 is for no factor.
FACTORS = (0, int(np.float32(7.874015718698502e-3).view(np.uint32)))
_EXPONENT = np.uint32(0x7F800000)

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Found:
    """A matrix as integers: the run, the factor's pattern (0 for none), the scales' patterns, and integers, flat."""

    run: int
    factor: int
    scales: NDArray[np.uint32]
    integers: NDArray[np.int16]


def find(matrix: Array, dtype: torch.dtype, distinct: Array | None) -> Found | None:
    """A matrix [rows, columns] of bit patterns as integers with as few scales as it can have, None for other weights.

    Args:
        matrix: bit patterns.
        dtype: of the numbers, one of DTYPES.
        distinct: its patterns, each once; None for many.
    """
    few = None if distinct is None or len(distinct) > 2 * MOST + 1 else numbers_of(distinct, dtype)
    numbers = numbers_of(matrix, dtype)
    for factor in FACTORS[: 1 + (dtype is torch.float32)]:
        for run in runs(matrix):
            whole = run == matrix.size
            if whole and few is None:
                continue
            groups = few[None] if whole and few is not None else numbers.reshape(-1, run)
            order = _likely(groups, dtype, factor)
            bounds = _scale_bounds(groups, dtype, factor, order) if order else None
            if bounds is not None:
                found = _checked(matrix.reshape(-1, run), numbers.reshape(-1, run), dtype, factor, bounds)
                if found is not None:
                    return found
                break
    return None


def context(entry: Entry) -> Context:
    """What a coder of codes knows: they rise with the integers, from entry.least on."""
    return Context(entry.grid, None, np.arange(entry.entries), min(max(0, -entry.least), entry.entries))


def numbers(entry: Entry, scales: NDArray[np.uint32], codes: Array) -> Array:
    """The bit patterns that codes stand for.

    Raises:
        TerseFileError: a scale is no number, or a product too large for one.
    """
    integers = codes.astype(np.int16) + np.int16(entry.least)
    bits = _products(integers.reshape(-1, entry.block), scales, entry.factor, entry.dtype)
    if not np.isfinite(_number_of(scales)).all() or not np.isfinite(numbers_of(bits, entry.dtype)).all():
        refuse("hold finite scales, and products that are finite", "NaN or infinity")
    return bits.reshape(-1)


def runs(matrix: Array) -> Iterator[int]:
    """Weights of the runs to look for, the longest first."""
    columns = matrix.shape[1]
    if len(matrix) > 1:
        yield matrix.size
    yield from (run for run in range(columns, SHORTEST - 1, -1) if not columns % run)


def numbers_of(bits: Array, dtype: torch.dtype) -> NDArray[np.float32]:
    """Numbers from their bit patterns."""
    if dtype is torch.bfloat16:
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    values: NDArray[Any] = bits.view(np.float16 if dtype is torch.float16 else np.float32)
    return values.astype(np.float32, copy=False)


def _number_of(patterns: NDArray[np.uint32]) -> NDArray[np.float32]:
    return patterns.view(np.float32)


def _number(pattern: int) -> float:
    return float(np.uint32(pattern).view(np.float32))


def _products(integers: Array, scales: NDArray[np.uint32], factor: int, dtype: torch.dtype) -> Array:
    """Bit patterns of integers [runs, run] times their scales, of any bits."""
    with np.errstate(over="ignore", invalid="ignore"):
        products = integers.astype(np.float32)
        products *= _number_of(scales)[:, None]
        if factor:
            products *= np.float32(_number(factor))
        return rounded(products, dtype)


def rounded(products: NDArray[np.float32], dtype: torch.dtype) -> Array:
    """Bit patterns of numbers in dtype, to nearest, ties to even."""
    bits: NDArray[Any] = products.view(np.uint32)
    if dtype is torch.float16:
        bits = products.astype(np.float16).view(np.uint16)
    elif dtype is torch.bfloat16:
        bits = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1)) >> np.uint32(16)).astype(np.uint16)
    return bits


def widest(groups: NDArray[np.float32]) -> NDArray[np.float32]:
    """Numbers of a few runs, their largest magnitudes first: of the runs with the most magnitudes among some."""
    count = min(len(groups), max(TRIED, CHUNK // groups.shape[1]))
    some = groups[np.linspace(0, len(groups) - 1, count).astype(np.int64)]
    largest = np.take_along_axis(some, np.abs(some).argmax(1)[:, None], 1)
    few = np.concatenate([largest, some[:, :: -(-some.shape[1] // WEIGHTS)]], 1)
    rising = np.sort(np.abs(few), 1)
    magnitudes = (rising[:, 1:] != rising[:, :-1]).sum(1)
    return few[np.argsort(-magnitudes, kind="stable")[:TRIED]]


def _likely(groups: NDArray[np.float32], dtype: torch.dtype, factor: int) -> list[int]:
    """The integers that a run's largest magnitude may be, the likeliest first; none if some runs have none."""
    few = widest(groups)
    if not np.isfinite(few).all():
        return []
    most: Counter[int] = Counter()
    for run in few:
        tried = np.arange(1, MOST + 1)
        fits = _bounds(np.repeat(np.abs(run)[None], MOST, 0), dtype, factor, tried)[2]
        if not fits.any():
            return []
        most[int(tried[fits][0])] += 1
    likely = [integer for integer, _ in sorted(most.items(), key=lambda item: (-item[1], item[0]))]
    return [*likely, *(integer for integer in range(1, MOST + 1) if integer not in most)]


def _scale_bounds(
    groups: NDArray[np.float32], dtype: torch.dtype, factor: int, order: list[int]
) -> tuple[Floats, Floats] | None:
    """The least and the most that the scale of each run may be, None if one has none."""
    step = max(1, CHUNK // groups.shape[1])
    found = []
    for at in range(0, len(groups), step):
        bounds = _chunk_bounds(groups[at : at + step], dtype, factor, order)
        if bounds is None:
            return None
        found.append(bounds)
    low, high = (np.concatenate(bounds) / (_number(factor) if factor else 1) for bounds in zip(*found, strict=True))
    return low, high


def to_try(low: Floats, high: Floats, exact: bool) -> Iterator[tuple[NDArray[np.uint32], NDArray[np.bool_]]]:
    """Scales between their bounds, bit patterns of one for each run, those with few bits first; and which runs' are."""
    for zeros in ZEROS:
        half, mask = np.uint32((1 << zeros) >> 1), np.uint32((1 << 32) - (1 << zeros))
        patterns = ((low + high) / 2).astype(np.float32).view(np.uint32) + half & mask
        scales = _number_of(patterns)
        # What is beside inexact bounds may be right: the largest may have been taken for the integer beside its own.
        yield patterns, (low <= scales) & (scales <= high) | (not exact)
    # In exact bounds, the middle is as good as any.
    for share in () if exact else SHARES:
        yield (low + (high - low) * share).astype(np.float32).view(np.uint32), np.ones(low.shape, np.bool_)


def _chunk_bounds(
    groups: NDArray[np.float32], dtype: torch.dtype, factor: int, order: list[int]
) -> tuple[Floats, Floats] | None:
    """The least and the most that the scale of each run may be, None if one has none."""
    magnitudes = np.abs(groups)
    largest = magnitudes.max(1)
    if not np.isfinite(largest).all():
        return None
    low, high = np.zeros(len(groups)), np.zeros(len(groups))
    left = np.flatnonzero(largest)
    probe = magnitudes[:, :: -(-groups.shape[1] // 8)]
    for most in order:
        if not left.size:
            break
        tried = np.concatenate([largest[left, None], probe[left]], 1)
        at = left[_bounds(tried, dtype, factor, np.full(left.size, most))[2]]
        if at.size:
            lows, highs, fits = _bounds(
                np.concatenate([largest[at, None], magnitudes[at]], 1), dtype, factor, np.full(at.size, most)
            )
            low[at[fits]], high[at[fits]] = lows[fits], highs[fits]
            left = np.setdiff1d(left, at[fits], assume_unique=True)
    return None if left.size else (low, high)


def _bounds(
    magnitudes: NDArray[np.float32], dtype: torch.dtype, factor: int, most: NDArray[np.int64]
) -> tuple[Floats, Floats, NDArray[np.bool_]]:
    """The least and the most that the scale of each run may be if its first magnitude is so many; whether it may be."""
    values = magnitudes.astype(np.float64)
    error = rounding(magnitudes, dtype, factor)
    low, high = (values[:, 0] - error[:, 0]) / most, (values[:, 0] + error[:, 0]) / most
    fits = low >= NORMAL
    low[~fits] = high[~fits] = 1
    for _ in range(1 if dtype is torch.float32 else 4):
        least = np.ceil((values - error) / high[:, None])
        greatest = np.floor((values + error) / low[:, None])
        fits &= (least <= greatest).all(1)
        # Those that the scale known so far leaves no choice tell more of it.
        told = (least == greatest) & (least > 0)
        of = np.where(told, least, 1)
        low = np.maximum(low, np.where(told, (values - error) / of, 0).max(1))
        high = np.minimum(high, np.where(told, (values + error) / of, np.inf).min(1))
        fits &= low <= high
        low[~fits] = high[~fits] = 1
    return low, high, fits


def rounding(magnitudes: NDArray[np.float32], dtype: torch.dtype, factor: int) -> Floats:
    """The most by which rounding changed a product into a magnitude."""
    lowest = (magnitudes.view(np.uint32) & _EXPONENT).view(np.float32).astype(np.float64)  # of the same exponent
    if dtype is torch.bfloat16:
        return lowest * (2.0**-8 + 2.0**-23)
    if dtype is torch.float16:
        return np.where(magnitudes, np.maximum(lowest * 2.0**-11, 2.0**-25) + lowest * 2.0**-23, 0)
    return lowest * 2.0**-24 * (3 if factor else 1)


def _checked(
    bits: Array, values: NDArray[np.float32], dtype: torch.dtype, factor: int, bounds: tuple[Floats, Floats]
) -> Found | None:
    """Integers, and scales within bounds that give all runs to the bit."""
    negative = (bits == bits.dtype.type(1 << (8 * bits.itemsize - 1))).any(1)
    step = max(1, CHUNK // bits.shape[1])
    integers, scales = np.empty(bits.shape, np.int16), np.zeros(len(bits), np.uint32)
    left = np.arange(len(bits))
    for patterns, usable in to_try(*bounds, exact=dtype is torch.float32 and not factor):
        trying = left[usable[left]]
        scales[trying] = np.where(negative[trying], patterns[trying] | np.uint32(1 << 31), patterns[trying])
        for at in range(0, trying.size, step):
            part = trying[at : at + step]
            units = _number_of(scales[part]).astype(np.float64) * (_number(factor) if factor else 1)
            counts = np.rint(values[part] / np.where(units, units, 1)[:, None])
            integers[part] = np.clip(counts, -MOST, MOST)
            same = (_products(integers[part], scales[part], factor, dtype) == bits[part]).all(1)
            left = np.setdiff1d(left, part[same], assume_unique=True)
            if 2 * np.count_nonzero(same) < part.size:
                break
        if not left.size:
            return Found(bits.shape[1], factor, scales, integers.reshape(-1))
    return None
