"""Products of fragments: which element of a matrix a thread's register holds, as the PTX ISA's figures say.

Written from the section "Matrix Fragments for mma" alone, element by element; what the kernels say about their
fragments (tensor_cores.cuh) is not used. A warp's registers are arrays [warps, 32 lanes, registers].
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ptx_interpreter.parse import PtxError

LANES = np.arange(32)[:, None]
GROUP, THREAD = LANES >> 2, LANES & 3


@dataclass(frozen=True)
class Shape:
    """m16n8k: of how many elements a 32-bit register consists, and where element i of a lane lies."""

    k: int
    elements: int  # in a register

    def a(self) -> tuple[Any, Any]:
        """Rows and columns [lane, element]."""
        i = np.arange(16 * self.k // 32)
        register, part = i // self.elements, i % self.elements
        row = np.where(register % 2 == 0, GROUP, GROUP + 8)
        return row, THREAD * self.elements + part + np.where(register < 2, 0, self.k // 2)

    def b(self) -> tuple[Any, Any]:
        """Rows (k) and columns (n) [lane, element]."""
        i = np.arange(8 * self.k // 32)
        register, part = i // self.elements, i % self.elements
        return THREAD * self.elements + part + np.where(register == 0, 0, self.k // 2), GROUP + 0 * i


# Element i of C and D.
ROW_OF_SUM = np.where(np.arange(4) < 2, GROUP, GROUP + 8)
COLUMN_OF_SUM = THREAD * 2 + np.arange(4) % 2

Decode = Callable[[Any], Any]


def bfloat16(words: Any) -> Any:
    """Two elements of each register."""
    halves = words[..., None] >> np.array([0, 16], np.uint32) & np.uint32(0xFFFF)
    return (halves << np.uint32(16)).view(np.float32)


def float16(words: Any) -> Any:
    """Two elements of each register."""
    halves = words[..., None] >> np.array([0, 16], np.uint32) & np.uint32(0xFFFF)
    return halves.astype(np.uint16).view(np.float16).astype(np.float32)


def int8(words: Any) -> Any:
    """Four elements of each register."""
    return uint8(words).view(np.int8)


def uint8(words: Any) -> Any:
    """Four elements of each register."""
    return (words[..., None] >> np.arange(0, 32, 8, dtype=np.uint32)).astype(np.uint8)


def ones(words: Any) -> Any:
    """32 elements of each register."""
    return (words[..., None] >> np.arange(32, dtype=np.uint32) & np.uint32(1)).astype(np.uint8)


DECODE: dict[str, Decode] = {"bf16": bfloat16, "f16": float16, "s8": int8, "u8": uint8, "b1": ones}
SHAPES = {
    ("m16n8k16", 16): Shape(16, 2),
    ("m16n8k32", 8): Shape(32, 4),
    ("m16n8k256", 1): Shape(256, 32),
}
BITS = {"bf16": 16, "f16": 16, "s8": 8, "u8": 8, "b1": 1}


def matrix(words: Any, decode: Decode, rows: Any, columns: Any, shape: tuple[int, int]) -> Any:
    """Of the registers of all lanes."""
    elements = decode(words).reshape(len(words), 32, -1)
    if elements.shape[2] != rows.shape[1]:
        raise PtxError(f"a fragment must hold {rows.shape[1]} elements of a lane, got {elements.shape[2]}")
    result = np.empty((len(words), *shape), elements.dtype)
    result[:, rows, columns] = elements
    return result


def product(modifiers: list[str]) -> Callable[[Any, Any, Any], Any]:
    """The function of a, b and c [warps, 32, registers] that mma with these modifiers is; D in bits.

    Devices may add the products of one instruction in any order and precision; here pairs of neighbours in k are added
    in ascending order, each sum rounded to float32.
    """
    sync, aligned, size, *rest = modifiers
    if (sync, aligned, rest[:2]) != ("sync", "aligned", ["row", "col"]):
        raise PtxError(f"unknown mma.{'.'.join(modifiers)}")
    to, of_a, of_b, of_c, *how = rest[2:]
    shape = SHAPES.get((size, BITS.get(of_a, 0)))
    floats = to == of_c == "f32" and of_a == of_b and of_a in ("bf16", "f16") and not how
    integers = to == of_c == "s32" and {of_a, of_b} <= {"s8", "u8"} and not how
    bits = to == of_c == "s32" and of_a == of_b == "b1" and how in (["and", "popc"], ["xor", "popc"])
    if shape is None or not (floats or integers or bits):
        raise PtxError(f"unknown mma.{'.'.join(modifiers)}")

    def run(a: Any, b: Any, c: Any) -> Any:
        left = matrix(a, DECODE[of_a], *shape.a(), (16, shape.k))
        right = matrix(b, DECODE[of_b], *shape.b(), (shape.k, 8))
        sums = matrix(c, lambda words: words[..., None], ROW_OF_SUM, COLUMN_OF_SUM, (16, 8))
        if floats:
            sums = sums.view(np.float32)
            products = left[:, :, :, None] * right[:, None, :, :]  # warps, 16, k, 8
            for k in range(0, shape.k, 2):
                sums = sums + (products[:, :, k] + products[:, :, k + 1])
            sums = sums.view(np.uint32)
        elif integers:
            sums = sums + (left.astype(np.int32) @ right.astype(np.int32)).view(np.uint32)
        else:
            left, right = left.astype(np.int32), right.astype(np.int32)
            common = left @ right
            if how[0] == "xor":
                common = left.sum(2)[:, :, None] + right.sum(1)[:, None, :] - 2 * common
            sums = sums + common.astype(np.int32).view(np.uint32)
        return sums[:, ROW_OF_SUM, COLUMN_OF_SUM]

    return run
