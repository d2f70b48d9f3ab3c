"""Weights of which each row, or each block of columns, holds few values of its own: a table for each, and codes.

So are the codes of a layer whose kernel cannot tell blocks of its columns apart, and has one table for all of them.
Tables hold rising values, bit patterns here, and repeat their last where they have fewer than the longest. Blocks are
looked for at powers of two of columns, and where the values of the first columns end; the last block may be narrower.
The first row or block tells whether it is worth looking at the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from tersetorch.storage import streams
from tersetorch.storage.entry import Entry
from tersetorch.storage.streams import Array, Context

# Numbers of the first row or block that are looked at first.
SAMPLE = 4096
# Candidates that are coded to learn their size.
TRIED = 2
# Of a table's bytes, what no coder of few floats goes below by much.
LEAST_OF_TABLES = 0.7


def candidates(matrix: Array, nbytes: int, floats: bool = True) -> Iterator[tuple[int, Array, Array]]:
    """Columns of a block (0 for rows), tables [groups, entries] and codes of what may take less than nbytes.

    Args:
        matrix: bit patterns [rows, columns] of floats, or uint8 numbers.
        nbytes: of the smallest form known.
        floats: whether the patterns are those of floats.
    """
    columns = matrix.shape[1]
    powers = [1 << power for power in range(columns.bit_length()) if not columns % (1 << power)]
    blocks = {0} if len(matrix) > 1 else set()
    blocks.update(block for block in (*powers, _first_block(matrix)) if block < columns)
    estimates = sorted((_least_bytes(matrix, block), block) for block in blocks)
    for least, block in estimates[:TRIED]:
        found = _tables(matrix, block, floats) if least < nbytes else None
        if found is not None and found[0].size <= matrix.size:
            yield block, *found


def context(entry: Entry, tables: Array) -> Context:
    """What a coder of codes knows: their order is that of the values, whose signs are taken from the first table."""
    sign = _sign(tables.dtype, entry.dtype.is_floating_point)
    return Context(entry.grid, None, np.arange(entry.entries), int(np.count_nonzero(tables[0] & sign)))


def numbers(entry: Entry, tables: Array, codes: Array) -> Array:
    """The bit patterns that codes [rows * columns] stand for."""
    matrix = codes.reshape(entry.shape[0], -1)
    table_of = np.arange(matrix.shape[1]) // entry.block if entry.block else np.arange(len(matrix))[:, None]
    found: Array = tables[table_of, matrix].reshape(-1)
    return found


def _sign(dtype: np.dtype[Any], floats: bool) -> Any:
    """The bit of a pattern that says that its number is negative; 0 where patterns are numbers themselves."""
    return dtype.type(1 << (8 * dtype.itemsize - 1) if floats else 0)


def _first_block(matrix: Array) -> int:
    """Columns, from the first on, that hold the first one's values; all of them if the last does."""
    columns = int(matrix.shape[1])
    rows = matrix[:: -(-len(matrix) // SAMPLE)]
    known = np.unique(rows[:, 0])
    first, past, step = 0, columns, 1
    while past - first > 1:  # column `first` is of the block, column `past` is not
        column = min(first + step, (first + past) // 2 if past < columns else columns - 1)
        values = np.unique(rows[:, column])
        if 2 * np.count_nonzero(np.isin(values, known)) >= len(values):
            first, step, known = column, 2 * step, np.union1d(known, values)
        else:
            past = column
    return past


def _least_bytes(matrix: Array, block: int) -> float:
    """About the bytes if every row or block is like the first; infinite if that has too many values."""
    first = (matrix[:, :block] if block else matrix[0]).reshape(-1)[:SAMPLE]
    counts = np.unique(first, return_counts=True)[1]
    if len(counts) > streams.MAX_CONTEXT_ENTRIES:
        return float("inf")
    groups = -(-matrix.shape[1] // block) if block else matrix.shape[0]
    shares = counts / counts.sum()
    bits = -float((shares * np.log2(shares)).sum())
    return float(LEAST_OF_TABLES * groups * len(counts) * matrix.itemsize + bits * matrix.size / 8)


def _tables(matrix: Array, block: int, floats: bool) -> tuple[Array, Array] | None:
    """Tables [groups, entries] and codes, flat, of the rows or blocks of a matrix; None where one has many values."""
    sign = _sign(matrix.dtype, floats)
    tables = []
    codes = np.empty(matrix.shape, np.uint8)
    groups = [np.s_[:, at : at + block] for at in range(0, matrix.shape[1], block)] if block else range(len(matrix))
    for group in groups:
        numbers = matrix[group]
        # Patterns turned so that they rise with the numbers.
        turned = np.where(numbers & sign, ~numbers, numbers | sign) if sign else numbers
        keys, found = np.unique(turned, return_inverse=True)
        if len(keys) > streams.MAX_CONTEXT_ENTRIES:
            return None
        tables.append(np.where(keys & sign, keys ^ sign, ~keys) if sign else keys)
        codes[group] = found.reshape(numbers.shape)
    entries = max(map(len, tables))
    padded = np.stack([np.pad(table, (0, entries - len(table)), "edge") for table in tables])
    return padded, codes.reshape(-1)
