"""The memory of a launch. Every access is checked against the bounds of what is there."""

import numpy as np
import numpy.typing as npt

from ptx_interpreter.parse import PtxError, up_to

Array = npt.NDArray[np.generic]
UNSIGNED = {1: np.dtype("u1"), 2: np.dtype("u2"), 4: np.dtype("u4"), 8: np.dtype("u8")}
# Where shared and local memory appear to generic addresses: where no host has any.
SHARED_WINDOW, LOCAL_WINDOW, CONSTANT_WINDOW = 1 << 56, 2 << 56, 3 << 56
UNWRITTEN = 0xCB


class Range:
    """Bytes at consecutive addresses, with views of them as numbers of 1 to 8 bytes."""

    def __init__(self, name: str, begin: int, data: bytes | Array, read_only: bool = False) -> None:
        data = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data
        self.name, self.begin, self.size, self.read_only = name, begin, data.size, read_only
        self.bytes = np.full(up_to(data.size, 16), UNWRITTEN, np.uint8)
        self.bytes[: data.size] = data
        self.views = {size: self.bytes.view(UNSIGNED[size]) for size in UNSIGNED}

    @property
    def data(self) -> Array:
        """What it holds."""
        return self.bytes[: self.size]


class GlobalMemory:
    """Ranges by address."""

    def __init__(self, ranges: list[Range]) -> None:
        self.ranges = sorted(ranges, key=lambda r: r.begin)
        self.begins = np.array([r.begin for r in self.ranges], np.uint64)

    def place(self, addresses: Array, size: int, write: bool, what: str) -> list[tuple[Range, Array, Array | slice]]:
        """Range, indices in its view of numbers of this size, and which of the addresses: one entry in most cases."""
        if not self.ranges:
            raise PtxError(f"{what}: there is no global memory")
        found = np.searchsorted(self.begins, addresses, "right") - 1
        places = []
        for index in [int(found[0])] if (found == found[0]).all() else np.unique(found).tolist():
            of: Array | slice = slice(None) if (found == index).all() else np.flatnonzero(found == index)
            memory = self.ranges[max(index, 0)]
            offsets = (addresses[of] - np.uint64(memory.begin)).astype(np.int64)
            bad = (offsets < 0) | (offsets + size > memory.size)
            if bad.any():
                raise PtxError(
                    f"{what}: out of bounds, '{memory.name}' of {memory.size} bytes at byte {offsets[bad][0]}"
                )
            if write and memory.read_only:
                raise PtxError(f"{what}: writes to '{memory.name}', which is input")
            places.append((memory, indices(offsets, size, what), of))
        return places


class BlockMemory:
    """As many bytes for each block (shared memory) or thread (local memory)."""

    def __init__(self, name: str, size: int, owners: int) -> None:
        self.name, self.size, self.pitch = name, size, up_to(size, 16)
        self.range = Range(name, 0, np.full(self.pitch * owners, UNWRITTEN, np.uint8))

    def place(self, owners: Array, addresses: Array, size: int, what: str) -> list[tuple[Range, Array, Array | slice]]:
        """As GlobalMemory.place."""
        offsets = addresses.astype(np.int64)
        bad = (offsets < 0) | (offsets + size > self.size)
        if bad.any():
            raise PtxError(f"{what}: out of bounds, {self.name} of {self.size} bytes at byte {offsets[bad][0]}")
        return [(self.range, indices(offsets + owners * self.pitch, size, what), slice(None))]


def indices(offsets: Array, size: int, what: str) -> Array:
    """Of numbers in their view."""
    if size == 1:
        return offsets
    if (offsets & (size - 1)).any():
        raise PtxError(f"{what}: not a multiple of {size}")
    return offsets >> (size.bit_length() - 1)
