"""Weights whose rows share sub-vectors, or are sums of shared ones: codebooks, and a code for each term and segment.

Shared sub-vectors are found from the numbers alone. What sums are made of nobody finds again: their codes come with
the weight, from tersetorch.finalize or from a file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from tersetorch.formats.shared_parts import find_parts, widths
from tersetorch.formats.vector_codes import VectorCodes, decode
from tersetorch.storage.entry import Entry
from tersetorch.storage.streams import Array, Context

# Widths of segments that are looked at in all of them.
TRIED = 2
SIGNED = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}


def candidates(plain: Entry, bits: Array, nbytes: int) -> Iterator[tuple[Entry, VectorCodes]]:
    """Entries, and codes of sub-vectors as bit patterns, of what may take less than nbytes, the smallest form known."""
    matrix = torch.from_numpy(bits.view(SIGNED[bits.itemsize])).view(plain.shape[0], -1)
    for found in widths(matrix)[:TRIED]:
        parts = find_parts(matrix, found.width) if found.least < nbytes else None
        codes = None if parts is None else VectorCodes(parts.codes, parts.codebooks[None])
        entry = None if codes is None else entry_of(plain, codes)
        if entry is not None and codes is not None:
            yield entry, codes
            packed = codes.codes.numel() * (entry.entries - 1).bit_length() // 8
            nbytes = min(nbytes, packed + codes.codebooks.nbytes)


def entry_of(plain: Entry, found: VectorCodes) -> Entry | None:
    """The entry of a weight that these codes say; None where they are no fewer numbers than it has."""
    if found.codebooks.numel() > plain.numel or found.codes.numel() > plain.numel:
        return None
    stages, books, width, entries = found.codebooks.shape
    entry = replace(plain, form="vectors", base=0, block=width, stages=stages, entries=entries)
    return replace(entry, stored=found.codes.numel(), one_book=books < entry.segments)


def context(entry: Entry) -> Context:
    """What a coder of codes knows."""
    return Context(entry.grid, None, np.arange(entry.entries), 0)


def codes_of(entry: Entry, books: Any, codes: Array) -> VectorCodes:
    """Codes of a stream and codebooks, flat, in their form."""
    shape = entry.stages, entry.codebooks // entry.stages, entry.block, entry.entries
    return VectorCodes(torch.from_numpy(codes.astype(np.uint8)).view(entry.shape[0], -1), books.view(shape))


def numbers(entry: Entry, found: VectorCodes) -> torch.Tensor:
    """The tensor [rows, columns] that codes stand for, of the codebooks' dtype, which may be bit patterns."""
    codes, codebooks = found
    columns = entry.numel // entry.shape[0]
    if codebooks.dtype is not torch.bfloat16 or len(codebooks) > 1:
        return decode(codes, codebooks, columns)
    # torch's gather of bfloat16 gives every NaN the same bits.
    return decode(codes, codebooks.view(torch.int16), columns).view(torch.bfloat16)
