"""One stream of numbers as bytes: the coder that makes it smallest, and back.

Coders: raw (the values' own bytes, little endian), packed (codes at a fixed width), huffman and rans (codes), constant
(codes that are all 0, in no bytes), gaps, gaps-huffman and gaps-rans (positions as relative gaps of `width` bits with
fillers), bitmap (positions), all (every position, in no bytes).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tersetorch import _native
from tersetorch.storage.errors import refuse

Array = NDArray[Any]
MAX_ENTRIES = 65536
# Codes of at most 15 bits.
MAX_HUFFMAN_ENTRIES = 32768
MAX_RANS_ENTRIES = 8192
# Items that a byte of a stream may hold, of coders that can spend less than a bit on one.
MAX_ITEMS_PER_BYTE = 4096
POSITION_CODERS = ("gaps", "gaps-huffman", "gaps-rans", "bitmap", "all")
CODE_CODERS = ("packed", "huffman", "rans", "constant")
SUBBIT_CODERS = ("rans", "gaps-rans")


@dataclass(frozen=True)
class Coding:
    """A coder, its width where it has one (0 elsewhere), and the bytes it will take."""

    coder: str
    nbytes: int
    width: int = 0


@dataclass(frozen=True)
class Stream:
    """Encoded numbers: what they are (values, positions, codes, codebook), how, and the bytes."""

    role: str
    coder: str
    width: int
    data: bytes

    def spec(self) -> list[Any]:
        """What the header says of it."""
        return [self.coder, len(self.data)] + [self.width] * (self.width > 0)


def raw_stream(role: str, values: Array) -> Stream:
    """The values as they are."""
    return Stream(role, "raw", 0, values.tobytes())


def decode_raw(data: bytes, dtype: np.dtype[Any], count: int) -> Array:
    """`count` values of dtype, read-only."""
    if len(data) != count * dtype.itemsize:
        refuse(f"hold {count * dtype.itemsize} bytes for {count} values of {dtype}", f"{len(data)}")
    return np.frombuffer(data, dtype)


def best_code_coding(counts: Array) -> Coding:
    """The smallest coder for codes of which counts[c] are c."""
    if len(counts) == 1:
        return Coding("constant", 0)
    width = max(1, (len(counts) - 1).bit_length())
    count = int(counts.sum())
    used = np.count_nonzero(counts)
    choices = [Coding("packed", (count * width + 7) // 8)]
    if used <= MAX_HUFFMAN_ENTRIES:
        choices.append(Coding("huffman", _native.huffman_size(counts.astype(np.uint64))))
    if used <= MAX_RANS_ENTRIES:
        choices.append(Coding("rans", _native.rans_size(counts.astype(np.uint64))))
    # Half as many items, since the size of rANS is an estimate.
    allowed = (choice for choice in choices if 2 * count <= choice.nbytes * MAX_ITEMS_PER_BYTE)
    return min(allowed, key=lambda choice: choice.nbytes)


def encode_codes(codes: Array, entries: int, coding: Coding) -> Stream:
    """Codes below entries as a stream."""
    if coding.coder == "constant":
        data = b""
    elif coding.coder == "huffman":
        data = _native.huffman_encode(codes.astype(np.uint16), entries)
    elif coding.coder == "rans":
        data = _native.rans_encode(codes.astype(np.uint16), entries)
    else:
        data = _native.write_bits(codes.astype(np.uint32), max(1, (entries - 1).bit_length()))
    return Stream("codes", coding.coder, 0, data)


def decode_codes(data: bytes, coder: str, entries: int, count: int) -> Array:
    """`count` codes below entries."""
    if coder == "constant":
        return np.broadcast_to(np.uint16(0), count)
    try:
        if coder == "huffman":
            return _native.huffman_decode(data, entries, count)
        if coder == "rans":
            return _native.rans_decode(data, entries, count)
        codes = _native.read_bits(data, max(1, (entries - 1).bit_length()), count)
    except ValueError as error:
        refuse("hold codes that decode", error)
    if count and int(codes.max()) >= entries:
        refuse(f"hold codes below {entries}", int(codes.max()))
    return codes


def best_position_coding(positions: NDArray[np.int64], size: int) -> Coding:
    """The smallest coder for rising positions in [0, size)."""
    if positions.size == size:
        return Coding("all", 0)
    coder, width, nbytes = _native.best_gaps(positions)
    bitmap = (size + 7) // 8
    return Coding("bitmap", bitmap) if bitmap <= nbytes else Coding(coder, nbytes, width)


def encode_positions(role: str, positions: NDArray[np.int64], size: int, coding: Coding) -> Stream:
    """Rising positions in [0, size) as a stream."""
    if coding.coder == "all":
        data = b""
    elif coding.coder == "bitmap":
        data = _native.encode_bitmap(positions, size)
    else:
        data = _native.encode_gaps(positions, coding.coder, coding.width)
    return Stream(role, coding.coder, coding.width, data)


def decode_positions(data: bytes, coder: str, width: int, count: int, size: int) -> NDArray[np.int64]:
    """`count` rising positions in [0, size)."""
    if coder == "all":
        return np.arange(size)
    try:
        if coder == "bitmap":
            return _native.decode_bitmap(data, count, size)
        return _native.decode_gaps(data, coder, width, count, size)
    except ValueError as error:
        refuse("hold positions that decode", error)


def table_bytes(data: bytes, coder: str, alphabet: int) -> int:
    """Bytes of the code table at the head of a Huffman or rANS stream; 0 for the other coders."""
    try:
        if coder.endswith("huffman"):
            return _native.huffman_table_size(data, alphabet)
        return _native.rans_table_size(data, alphabet) if coder.endswith("rans") else 0
    except ValueError as error:
        refuse("hold a code table that decodes", error)
