"""Bytes as Deep Compression's tables count them: entries of fixed width with relative positions, or Huffman coded."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tersetorch import _native

Counts = NDArray[np.int64]


def gap_counts(positions: NDArray[np.int64], bits: int) -> tuple[Counts, int]:
    """How often each stored gap occurs when rising positions are stored as the zeros skipped before each, and fillers.

    A gap of `bits` bits skips up to 2^bits - 1 zeros; where more lie between, a filler that is itself a zero is stored
    with the largest gap.

    Returns:
        int64 [2^bits], fillers among them; and the number of fillers.

    Source:
        Han, Mao, Dally, Deep Compression (2016), section 2 and figure 2.
    """
    skipped = np.diff(positions, prepend=-1) - 1
    span = 1 << bits
    fillers = int((skipped // span).sum())
    counts = np.bincount(skipped % span, minlength=span).astype(np.int64)
    counts[-1] += fillers
    return counts, fillers


def fixed_bytes(entries: int, value_bits: int, gap_bits: int, codebook: int) -> float:
    """Bytes of entries, fillers counted, of a value and a gap each, and of a codebook of float32 values."""
    return entries * (value_bits + gap_bits) / 8 + 4 * codebook


def huffman_bytes(counts: Counts) -> int:
    """Bytes of symbols of which counts[s] are s, in canonical Huffman codes with their table."""
    return _native.huffman_size(counts.astype(np.uint64))
