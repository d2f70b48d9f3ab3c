"""One stream of numbers as bytes: the coder that makes it smallest, and back.

Values and codebooks: raw (their own bytes, little endian), numbers (a few, each by its exponent or its difference to
the one before), planes (many, each byte of them by rANS or as it is).
Codes: packed (at a fixed width), huffman, rans, contexts (adaptive, by the codes around each), constant (all 0, in no
bytes).
Positions: gaps, gaps-huffman and gaps-rans (relative, of `width` bits with fillers), bitmap, contexts (adaptive, by
what is stored around each weight), all (every position, in no bytes).

Coders with contexts are the smallest and slow, 25 to 30 nanoseconds a bit when they decode; a stream of more than
MAX_CONTEXT_BITS decisions, a quarter of a second, is written by another coder. The other coders of codes decode 250 to
1,100 million a second, those of positions 100 to 600 million.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
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
# Decisions of a stream that is coded in context, and codes that it can tell apart.
MAX_CONTEXT_BITS = 1 << 23
MAX_CONTEXT_ENTRIES = 256
# Values that are coded one by one.
MAX_NUMBERS = 65536
VALUE_CODERS = ("raw", "numbers", "planes")
POSITION_CODERS = ("gaps", "gaps-huffman", "gaps-rans", "bitmap", "contexts", "all")
CODE_CODERS = ("packed", "huffman", "rans", "contexts", "constant")
# What tersetorch.save chooses from: all coders, or all but contexts, whose codes decode at 200 million a second.
CODERS = ("smallest", "fast")
SUBBIT_CODERS = ("rans", "gaps-rans", "contexts", "numbers", "planes")


@dataclass(frozen=True)
class Coding:
    """A coder, its width where it has one (0 elsewhere), the bytes it will take, and what it wrote to find out."""

    coder: str
    nbytes: int
    width: int = 0
    data: bytes | None = None


@dataclass(frozen=True)
class Grid:
    """A tensor as rows of channels of kernels, in C order; a line of a kernel has kernel_width places."""

    size: int
    channels: int
    kernel: int
    kernel_width: int

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """What the native code takes."""
        return self.size, self.channels, self.kernel, self.kernel_width


@dataclass(frozen=True)
class Context:
    """What a coder of codes knows beside them: where they stand, and the order of the values they stand for.

    Attributes:
        grid: of the tensor.
        positions: of the codes in it; None for all.
        order: codes by rising value.
        negative: how many of them stand for values below 0.
    """

    grid: Grid
    positions: NDArray[np.int64] | None
    order: NDArray[np.int64]
    negative: int

    @property
    def arguments(self) -> tuple[NDArray[np.int64], int, int, int, int, int, int]:
        """What the native code takes."""
        positions = np.zeros(0, np.int64) if self.positions is None else self.positions
        return positions, *self.grid.sizes, _code_width(len(self.order)), self.negative


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


def best_value_coding(values: Array) -> Coding:
    """The smallest coder for bit patterns."""
    raw = Coding("raw", values.nbytes)
    if values.size <= MAX_NUMBERS:
        data = _native.numbers_encode(values.astype(np.uint64), 8 * values.itemsize)
        coding = Coding("numbers", len(data), data=data)
    elif values.itemsize > 1:
        sizes = [_plane_bytes(plane) for plane in _planes(values)]
        coding = Coding("planes", sum(min(size, values.size) for size in sizes) + _PLANE.size * len(sizes))
    else:
        return raw
    return coding if coding.nbytes < raw.nbytes and _bounded(values.size, coding) else raw


def value_stream(role: str, values: Array, coding: Coding | None = None) -> Stream:
    """Bit patterns as a stream, in the smallest coder or the one that best_value_coding found."""
    coding = coding or best_value_coding(values)
    if coding.coder == "planes":
        data = b"".join(map(_encode_plane, _planes(values)))
    else:
        data = values.tobytes() if coding.data is None else coding.data
    return Stream(role, coding.coder, 0, data)


def decode_values(data: bytes, coder: str, dtype: np.dtype[Any], count: int) -> Array:
    """`count` bit patterns of dtype, an unsigned integer; may be read-only."""
    if coder == "raw":
        if len(data) != count * dtype.itemsize:
            refuse(f"hold {count * dtype.itemsize} bytes for {count} values of {dtype}", f"{len(data)}")
        return np.frombuffer(data, dtype)
    try:
        if coder == "numbers":
            values: Array = _native.numbers_decode(data, 8 * dtype.itemsize, count).astype(dtype)
            return values
        return _decode_planes(data, dtype, count)
    except ValueError as error:
        refuse("hold values that decode", error)


# A byte plane's coder (1 for rANS) and length.
_PLANE = struct.Struct("<BQ")


def _planes(values: Array) -> list[Array]:
    """The bytes of numbers turned left by one bit: of float32, the exponent is one of them, and the sign a last bit."""
    top = values.dtype.type(8 * values.itemsize - 1)
    turned = (values << values.dtype.type(1)) | (values >> top)
    return list(np.ascontiguousarray(turned.view(np.uint8).reshape(-1, values.itemsize).T))


def _plane_bytes(plane: Array) -> int:
    return _native.rans_size(np.bincount(plane, minlength=256).astype(np.uint64))


def _encode_plane(plane: Array) -> bytes:
    data = _native.rans_encode(plane.astype(np.uint16), 256)
    coded = len(data) < plane.size <= len(data) * MAX_ITEMS_PER_BYTE
    body = data if coded else plane.tobytes()
    return _PLANE.pack(coded, len(body)) + body


def _decode_planes(data: bytes, dtype: np.dtype[Any], count: int) -> Array:
    start = 0
    # Written plane by plane and turned in place: a tensor's peak of memory is here.
    turned = np.empty((count, dtype.itemsize), np.uint8)
    for number in range(dtype.itemsize):
        if len(data) - start < _PLANE.size:
            refuse(f"hold {dtype.itemsize} byte planes", f"{len(data)} bytes")
        coded, length = _PLANE.unpack_from(data, start)
        start += _PLANE.size
        body = data[start : start + length]
        if length != len(body) or coded > 1 or (not coded and length != count):
            refuse(f"hold whole byte planes of {count} values", f"{len(body)} bytes")
        start += length
        turned[:, number] = _native.rans_decode(body, 256, count) if coded else np.frombuffer(body, np.uint8)
    if start != len(data):
        refuse("end after the last byte plane", f"{len(data) - start} more bytes")
    whole: Array = turned.reshape(-1).view(dtype)
    values: Array = whole >> dtype.type(1)
    whole <<= dtype.type(8 * dtype.itemsize - 1)
    values |= whole
    return values


def best_code_coding(counts: Array, codes: Callable[[], Array] | None = None, context: Context | None = None) -> Coding:
    """The smallest coder for codes of which counts[c] are c; with codes and their context, contexts are tried too."""
    if len(counts) == 1:
        return Coding("constant", 0)
    width = _code_width(len(counts))
    count = int(counts.sum())
    used = np.count_nonzero(counts)
    choices = [Coding("packed", (count * width + 7) // 8)]
    if used <= MAX_HUFFMAN_ENTRIES:
        choices.append(Coding("huffman", _native.huffman_size(counts.astype(np.uint64))))
    if used <= MAX_RANS_ENTRIES:
        choices.append(Coding("rans", _native.rans_size(counts.astype(np.uint64))))
    if codes is not None and context is not None and count and fits_contexts(len(counts), count, context.grid):
        ranks = np.empty(len(counts), np.uint8)
        ranks[context.order] = np.arange(len(counts), dtype=np.uint8)
        data = _native.contexts_encode_symbols(ranks[codes()], *context.arguments)
        choices.append(Coding("contexts", len(data), data=data))
    return min((choice for choice in choices if _bounded(count, choice)), key=lambda choice: choice.nbytes)


def fits_contexts(entries: int, count: int, grid: Grid) -> bool:
    """Whether codes may be coded in context."""
    return grid.size > 0 and entries <= MAX_CONTEXT_ENTRIES and count * _code_width(entries) <= MAX_CONTEXT_BITS


def _code_width(entries: int) -> int:
    return max(1, (entries - 1).bit_length())


def _bounded(count: int, coding: Coding) -> bool:
    """Whether a reader may accept so many items; half of what it does, since the size of rANS is an estimate."""
    return 2 * count <= coding.nbytes * MAX_ITEMS_PER_BYTE


def encode_codes(codes: Array, entries: int, coding: Coding) -> Stream:
    """Codes below entries as a stream."""
    if coding.data is not None:
        data = coding.data
    elif coding.coder == "constant":
        data = b""
    elif coding.coder == "huffman":
        data = _native.huffman_encode(codes.astype(np.uint16), entries)
    elif coding.coder == "rans":
        data = _native.rans_encode(codes.astype(np.uint16), entries)
    else:
        data = _native.write_bits(codes.astype(np.uint32), _code_width(entries))
    return Stream("codes", coding.coder, 0, data)


def decode_codes(data: bytes, coder: str, entries: int, count: int, context: Context | None = None) -> Array:
    """`count` codes below entries; context is what they were encoded with."""
    if coder == "constant":
        return np.broadcast_to(np.uint16(0), count)
    try:
        if coder == "huffman":
            return _native.huffman_decode(data, entries, count)
        if coder == "rans":
            return _native.rans_decode(data, entries, count)
        codes: Array
        if coder == "contexts":
            assert context is not None
            codes = _native.contexts_decode_symbols(data, count, *context.arguments)
        else:
            codes = _native.read_bits(data, _code_width(entries), count)
    except ValueError as error:
        refuse("hold codes that decode", error)
    if count and int(codes.max()) >= entries:
        refuse(f"hold codes below {entries}", int(codes.max()))
    if coder == "contexts":
        assert context is not None
        return context.order.astype(np.uint8)[codes]
    return codes


def best_position_coding(positions: NDArray[np.int64], size: int, grid: Grid | None = None) -> Coding:
    """The smallest coder for rising positions in [0, size); with a grid, contexts are tried too."""
    if positions.size == size:
        return Coding("all", 0)
    coder, width, nbytes = _native.best_gaps(positions)
    choices = [Coding("bitmap", (size + 7) // 8), Coding(coder, nbytes, width)]
    if grid is not None and positions.size and size <= MAX_CONTEXT_BITS:
        data = _native.contexts_encode_positions(positions, *grid.sizes)
        choices.append(Coding("contexts", len(data), data=data))
    return min((choice for choice in choices if _bounded(positions.size, choice)), key=lambda choice: choice.nbytes)


def encode_positions(role: str, positions: NDArray[np.int64], size: int, coding: Coding) -> Stream:
    """Rising positions in [0, size) as a stream."""
    if coding.data is not None:
        data = coding.data
    elif coding.coder == "all":
        data = b""
    elif coding.coder == "bitmap":
        data = _native.encode_bitmap(positions, size)
    else:
        data = _native.encode_gaps(positions, coding.coder, coding.width)
    return Stream(role, coding.coder, coding.width, data)


def decode_positions(
    data: bytes, coder: str, width: int, count: int, size: int, grid: Grid | None = None
) -> NDArray[np.int64]:
    """`count` rising positions in [0, size); grid is what they were encoded with."""
    if coder == "all":
        return np.arange(size)
    try:
        if coder == "bitmap":
            return _native.decode_bitmap(data, count, size)
        if coder == "contexts":
            assert grid is not None
            return _native.contexts_decode_positions(data, count, *grid.sizes)
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
