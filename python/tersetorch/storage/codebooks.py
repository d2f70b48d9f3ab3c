"""Weights of which each row, or each block of columns, holds few values of its own: a table for each, and codes.

Tables hold rising values, bit patterns here, and repeat their last where they have fewer than the longest. Blocks are
looked for at powers of two of columns. The first row or block tells whether it is worth looking at the others.
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


def candidates(matrix: Array, nbytes: int) -> Iterator[tuple[int, Array, Array]]:
    """Columns of a block (0 for rows), tables [groups, entries] and codes of what may take less than nbytes.

    Args:
        matrix: bit patterns [rows, columns] of floats.
        nbytes: of the smallest form known.
    """
    columns = matrix.shape[1]
    powers = [1 << power for power in range(columns.bit_length()) if not columns % (1 << power)]
    blocks = [0] * (len(matrix) > 1) + [block for block in powers if block < columns]
    estimates = sorted((_least_bytes(matrix, block), block) for block in blocks)
    for least, block in estimates[:TRIED]:
        found = _tables(_groups(matrix, block)) if least < nbytes else None
        if found is not None:
            tables, codes = found
            if tables.size <= matrix.size:
                yield block, tables, from_groups(codes, len(matrix), columns, block)


def context(entry: Entry, tables: Array) -> Context:
    """What a coder of codes knows: their order is that of the values, whose signs are taken from the first table."""
    sign = tables.dtype.type(1 << (8 * tables.itemsize - 1))
    return Context(entry.grid, None, np.arange(entry.entries), int(np.count_nonzero(tables[0] & sign)))


def numbers(entry: Entry, tables: Array, codes: Array) -> Array:
    """The bit patterns that codes [rows * columns] stand for."""
    rows, columns = entry.shape[0], entry.numel // entry.shape[0]
    groups = _groups(codes.reshape(rows, columns), entry.block).astype(np.int64)
    return from_groups(np.take_along_axis(tables, groups, 1), rows, columns, entry.block)


def from_groups(groups: Array, rows: int, columns: int, block: int) -> Array:
    """Numbers of groups, flat, in the order of the matrix."""
    if not block:
        return groups.reshape(-1)
    flat: Array = groups.reshape(columns // block, rows, block).transpose(1, 0, 2).reshape(-1)
    return flat


def _groups(matrix: Array, block: int) -> Array:
    """The numbers that share a table, as rows."""
    if not block:
        return matrix
    rows, columns = matrix.shape
    grouped: Array = matrix.reshape(rows, columns // block, block).transpose(1, 0, 2).reshape(columns // block, -1)
    return grouped


def _least_bytes(matrix: Array, block: int) -> float:
    """About the bytes if every row or block is like the first; infinite if that has too many values."""
    first = (matrix[:, :block] if block else matrix[0]).reshape(-1)[:SAMPLE]
    counts = np.unique(first, return_counts=True)[1]
    if len(counts) > streams.MAX_CONTEXT_ENTRIES:
        return float("inf")
    groups = matrix.shape[1] // block if block else matrix.shape[0]
    shares = counts / counts.sum()
    bits = -float((shares * np.log2(shares)).sum())
    return float(LEAST_OF_TABLES * groups * len(counts) * matrix.itemsize + bits * matrix.size / 8)


def _tables(groups: Array) -> tuple[Array, Array] | None:
    """Tables and codes of groups, None where one has too many values."""
    sign: Any = groups.dtype.type(1 << (8 * groups.itemsize - 1))
    tables = []
    codes = np.empty(groups.shape, np.uint8)
    for number, group in enumerate(groups):
        # Patterns turned so that they rise with the numbers.
        keys, codes_of_group = np.unique(np.where(group & sign, ~group, group | sign), return_inverse=True)
        if len(keys) > streams.MAX_CONTEXT_ENTRIES:
            return None
        tables.append(np.where(keys & sign, keys ^ sign, ~keys))
        codes[number] = codes_of_group.reshape(-1)
    entries = max(map(len, tables))
    return np.stack([np.pad(table, (0, entries - len(table)), "edge") for table in tables]), codes
