"""GGUF files, in which llama.cpp keeps models; little endian, versions 2 and 3.

    "GGUF", u32 version, u64 tensors, u64 entries
    entries: string key, u32 type, value         a string is its u64 length and its bytes, an array u32 type, u64 length
    tensors: string name, u32 dimensions, u64 sizes, the last dimension first, u32 kind, u64 offset
    data, from the next multiple of general.alignment (32) on; each offset is a multiple of it too

Along the last dimension, blocks of 32 weights (256 for the kinds in _K) share scales d, and least values m or -m:

    Q4_0    f16 d, u8 [16]                           d (q - 8); byte j holds q of weights j (low half) and j + 16
    Q4_1    f16 d, f16 m, u8 [16]                    d q + m
    IQ4_NL  f16 d, u8 [16]                           d table[q]
    Q5_0    f16 d, u32, u8 [16]                      d (q - 16); bit j of the u32 is the fifth of weight j's q
    Q5_1    f16 d, f16 m, u32, u8 [16]               d q + m
    Q8_0    f16 d, i8 [32]                           d q
    Q4_K    f16 d, f16 m, u8 [12], u8 [4, 32]        (d s) q - (m t), s and t of 6 bits for each 32 weights
    Q6_K    u8 [2, 64], u8 [2, 32], i8 [16], f16 d   (d s) (q - 32), s for each 16 weights
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tersetorch.storage.importers.quantized_weight import QuantizedWeight
from tersetorch.storage.importers.refusal import refuse

Array = np.ndarray[Any, np.dtype[Any]]
FIX = "export it again, or copy it again from where it came"
MAGIC, VERSIONS = b"GGUF", (2, 3)
ALIGNMENT = "general.alignment"
# Bytes of a number of each type of value; strings are 8, arrays 9.
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
STRING, ARRAY, U32 = 8, 9, 4
MOST_DIMENSIONS = 4
MOST_SIZE = 1 << 48
PLAIN = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


class _Header:
    """Reads a file's head from the front; every length is compared with what is left of the file."""

    def __init__(self, data: Array):
        self.data, self.at = data, 0

    def take(self, size: int) -> bytes:
        if size > self.data.size - self.at:
            refuse("hold the values that its head announces", f"{self.data.size} bytes", FIX)
        self.at += size
        return self.data[self.at - size : self.at].tobytes()

    def number(self, form: str) -> int:
        return int(struct.unpack(f"<{form}", self.take(struct.calcsize(form)))[0])

    def string(self) -> str:
        return self.take(self.number("Q")).decode("utf-8", "backslashreplace")

    def skip(self, kind: int) -> None:
        if kind in SIZES:
            self.take(SIZES[kind])
        elif kind == STRING:
            self.take(self.number("Q"))
        elif kind == ARRAY:
            inner, count = self.number("I"), self.number("Q")
            if inner in SIZES:
                self.take(SIZES[inner] * count)
            elif inner == STRING:
                for _ in range(count):  # ends with the file, whatever count says
                    self.take(self.number("Q"))
            else:
                refuse("hold arrays of numbers or strings", f"type {inner}", FIX)
        else:
            refuse("hold values of known types", f"type {kind}", FIX)


def read_file(path: Path) -> dict[str, Tensor | QuantizedWeight]:
    """Every tensor of a GGUF file by the file's names: QuantizedWeight of 4 and 5 bits, float32 of Q8_0 and Q6_K.

    Raises:
        ValueError: the file is damaged or holds a kind that is not read.
        OSError: it cannot be read.
    """
    if not path.stat().st_size:
        refuse("begin with GGUF", "an empty file", FIX)
    data = np.memmap(path, np.uint8, "r")
    return {
        name: _tensor(name, kind, shape, np.array(data[start : start + size]))
        for name, (kind, shape, size, start) in _layout(_Header(data)).items()
    }


def _layout(head: _Header) -> dict[str, tuple[int, list[int], int, int]]:
    """Kind, shape, bytes and place of each tensor."""
    magic, version = head.take(4), head.number("I")
    if magic != MAGIC or version not in VERSIONS:
        refuse(f"begin with GGUF and a version of {VERSIONS}", f"{magic!r} and {version}", FIX)
    tensors, entries = head.number("Q"), head.number("Q")
    alignment = 32
    for _ in range(entries):
        key, kind = head.string(), head.number("I")
        if key == ALIGNMENT and kind == U32:
            alignment = head.number("I")
        else:
            head.skip(kind)
    if not 0 < alignment <= 1 << 20:
        refuse(f"hold a small {ALIGNMENT}", alignment, FIX)
    listed: dict[str, tuple[int, list[int], int, int]] = {}
    for _ in range(tensors):
        name, dimensions = head.string(), head.number("I")
        if name in listed or not 1 <= dimensions <= MOST_DIMENSIONS:
            refuse(f"name each tensor once, of at most {MOST_DIMENSIONS} dimensions", f"{name!r:.80}", FIX)
        shape = [head.number("Q") for _ in range(dimensions)][::-1]
        if max(shape) >= MOST_SIZE:
            refuse(f"hold {name!r:.80} of sizes below {MOST_SIZE}", str(shape), FIX)
        kind, offset = head.number("I"), head.number("Q")
        if kind in PLAIN:
            block, size = 1, PLAIN[kind].itemsize
        elif kind in KINDS:
            block, size = KINDS[kind][:2]
        else:
            refuse(
                f"hold F32, F16, BF16, {', '.join(name_of.upper() for name_of in NAMES)} as its only kinds",
                f"kind {kind} as {name!r}",
                "quantise it to one of these",
            )
        if shape[-1] % block or offset % alignment:
            refuse(f"hold {name!r} in rows of whole blocks of {block}, aligned", f"{shape} at {offset}", FIX)
        listed[name] = (kind, shape, prod(shape) // block * size, offset)
    start = -(-head.at // alignment) * alignment
    for name, (_, _, size, offset) in listed.items():
        if start + offset + size > head.data.size:
            refuse(f"hold {size} bytes of {name!r}", f"{max(0, head.data.size - start - offset)}", FIX)
    if sum(size for _, _, size, _ in listed.values()) > head.data.size:  # each becomes a tensor of its own
        refuse("hold tensors that share no bytes", f"more than its {head.data.size} bytes in all", FIX)
    return {name: (kind, shape, size, start + offset) for name, (kind, shape, size, offset) in listed.items()}


def _tensor(name: str, kind: int, shape: list[int], raw: Array) -> Tensor | QuantizedWeight:
    if kind in PLAIN:
        dense = torch.empty(shape, dtype=PLAIN[kind])
        dense.flatten().view(torch.uint8).copy_(torch.from_numpy(raw))
        return dense
    _, size, read = KINDS[kind]
    with np.errstate(invalid="ignore", over="ignore"):
        codes, codebook = read(raw.reshape(-1, size))
    if not np.isfinite(codebook).all():
        refuse(f"hold finite scales of {name!r}", "NaN or infinity", FIX)
    table = torch.from_numpy(np.ascontiguousarray(codebook, np.float32))
    if codes is None or not raw.size:
        return table.reshape(shape)
    return QuantizedWeight(torch.from_numpy(codes).reshape(shape), table, 32)


def _float(blocks: Array, at: int) -> Array:
    """The f16 at a byte of each block, as float32 [blocks, 1]."""
    half: Array = blocks[:, at : at + 2].copy().view("<f2")
    return half.astype(np.float32)


def _nibbles(packed: Array) -> Array:
    """Codes [blocks, 2 bytes]: the low halves of the bytes, then the high ones."""
    return np.concatenate([packed & 15, packed >> 4], -1)


def _fifth(blocks: Array, at: int) -> Array:
    """16 where the bit of a weight is set, 0 elsewhere."""
    return np.unpackbits(blocks[:, at : at + 4], axis=1, bitorder="little") << 4


Read = tuple[Array | None, Array]
CODES = np.arange(32, dtype=np.float32)


def _q4_0(blocks: Array) -> Read:
    return _nibbles(blocks[:, 2:]), _float(blocks, 0) * (CODES[:16] - 8)


def _q4_1(blocks: Array) -> Read:
    return _nibbles(blocks[:, 4:]), _float(blocks, 0) * CODES[:16] + _float(blocks, 2)


def _iq4_nl(blocks: Array) -> Read:
    return _nibbles(blocks[:, 2:]), _float(blocks, 0) * np.array(IQ4, np.float32)


def _q5_0(blocks: Array) -> Read:
    return _nibbles(blocks[:, 6:]) | _fifth(blocks, 2), _float(blocks, 0) * (CODES - 16)


def _q5_1(blocks: Array) -> Read:
    return _nibbles(blocks[:, 8:]) | _fifth(blocks, 4), _float(blocks, 0) * CODES + _float(blocks, 2)


def _q8_0(blocks: Array) -> Read:
    return None, _float(blocks, 0) * blocks[:, 2:].view(np.int8)


def _q4_k(blocks: Array) -> Read:
    """The first four runs have s and t in 6 bits of bytes 0 to 3 and 4 to 7, the others in what is left of the 12."""
    first, second, third = (blocks[:, at : at + 4] for at in (4, 8, 12))
    scale = np.concatenate([first & 63, third & 15 | first >> 6 << 4], 1)
    least = np.concatenate([second & 63, third >> 4 | second >> 6 << 4], 1)
    step, low = _float(blocks, 0) * scale, _float(blocks, 2) * least
    codes = _nibbles(blocks[:, 16:].reshape(-1, 4, 32))
    return codes, step.reshape(-1, 1) * CODES[:16] - low.reshape(-1, 1)


def _q6_k(blocks: Array) -> Read:
    low = blocks[:, :128].reshape(-1, 2, 2, 32)
    four = np.concatenate([low & 15, low >> 4], 2)  # [blocks, half, quarter, 32]
    high = blocks[:, None, 128:192].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    codes = (four | high << 4).astype(np.float32).reshape(-1, 16, 16) - 32
    scale = _float(blocks, 208) * blocks[:, 192:208].view(np.int8)
    return None, scale[:, :, None] * codes


# Weights and bytes of a block, and what reads blocks: codes and tables of 32 weights each, or no codes and the weights.
KINDS: dict[int, tuple[int, int, Callable[[Array], Read]]] = {
    2: (32, 18, _q4_0),
    3: (32, 20, _q4_1),
    6: (32, 22, _q5_0),
    7: (32, 24, _q5_1),
    8: (32, 34, _q8_0),
    12: (256, 144, _q4_k),
    14: (256, 210, _q6_k),
    20: (32, 18, _iq4_nl),
}
NAMES = tuple(read.__name__[1:] for _, _, read in KINDS.values())
