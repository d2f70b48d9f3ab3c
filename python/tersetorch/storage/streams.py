"""One stream of numbers as bytes: the coder that makes it smallest, and back.

Coders: raw (the values' own bytes, little endian), packed (codes at a fixed width), huffman (codes), constant (codes
that are all 0, in no bytes), gaps and gaps-huffman (positions as relative gaps of `width` bits with fillers), bitmap
(positions), all (every position, in no bytes).
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
POSITION_CODERS = ("gaps", "gaps-huffman", "bitmap", "all")
CODE_CODERS = ("packed", "huffman", "constant")


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
    packed = Coding("packed", (int(counts.sum()) * width + 7) // 8)
    if np.count_nonzero(counts) > MAX_HUFFMAN_ENTRIES:
        return packed
    huffman = Coding("huffman", _native.huffman_size(counts.astype(np.uint64)))
    return huffman if huffman.nbytes < packed.nbytes else packed


def encode_codes(codes: Array, entries: int, coding: Coding) -> Stream:
    """Codes below entries as a stream."""
    if coding.coder == "constant":
        data = b""
    elif coding.coder == "huffman":
        data = _native.huffman_encode(codes.astype(np.uint16), entries)
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
    width, huffman, nbytes = _native.best_gaps(positions)
    bitmap = (size + 7) // 8
    return (
        Coding("bitmap", bitmap) if bitmap <= nbytes else Coding("gaps-huffman" if huffman else "gaps", nbytes, width)
    )


def encode_positions(role: str, positions: NDArray[np.int64], size: int, coding: Coding) -> Stream:
    """Rising positions in [0, size) as a stream."""
    if coding.coder == "all":
        data = b""
    elif coding.coder == "bitmap":
        data = _native.encode_bitmap(positions, size)
    else:
        data = _native.encode_gaps(positions, coding.width, coding.coder == "gaps-huffman")
    return Stream(role, coding.coder, coding.width, data)


def decode_positions(data: bytes, coder: str, width: int, count: int, size: int) -> NDArray[np.int64]:
    """`count` rising positions in [0, size)."""
    if coder == "all":
        return np.arange(size)
    try:
        if coder == "bitmap":
            return _native.decode_bitmap(data, count, size)
        return _native.decode_gaps(data, width, coder == "gaps-huffman", count, size)
    except ValueError as error:
        refuse("hold positions that decode", error)


def table_bytes(data: bytes, coder: str, alphabet: int) -> int:
    """Bytes of the code table at the head of a Huffman stream; 0 for the other coders."""
    if coder not in ("huffman", "gaps-huffman"):
        return 0
    try:
        return _native.huffman_table_size(data, alphabet)
    except ValueError as error:
        refuse("hold a code table that decodes", error)
