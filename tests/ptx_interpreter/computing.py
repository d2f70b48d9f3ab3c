"""Instructions that compute from registers alone: the rules of ``arithmetic``, comparisons, moves of parts."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ptx_interpreter import arithmetic
from ptx_interpreter.accesses import SPACES
from ptx_interpreter.arithmetic import TYPES
from ptx_interpreter.memory import SHARED_WINDOW
from ptx_interpreter.parse import Instruction, PtxError

if TYPE_CHECKING:
    from ptx_interpreter.machine import Blocks

Run = Callable[[Any], None]


def computation(blocks: "Blocks", i: Instruction) -> Run:
    """Of a rule of ``arithmetic``."""
    to, types, function = arithmetic.MAKERS[i.name](i.modifiers)
    if i.name == "fma" and not blocks.launch.fuses:
        function = arithmetic.unfused
    if len(i.operands) != 1 + len(types):
        raise PtxError(f"expected {1 + len(types)} operands")
    put = blocks.write(i.operands[0], to)
    reads = [blocks.read(operand, of) for operand, of in zip(i.operands[1:], types, strict=True)]
    if len(reads) == 1:
        (one,) = reads
        return lambda where: put(where, function(one(where)))
    if len(reads) == 2:
        first, second = reads
        return lambda where: put(where, function(first(where), second(where)))
    return lambda where: put(where, function(*[read(where) for read in reads]))


def comparison(blocks: "Blocks", i: Instruction) -> Run:
    """setp, perhaps combined with a predicate; p|q sets q to the opposite."""
    how, *combines, of = i.modifiers
    if len(combines) > 1 or not set(combines) <= {"and", "or", "xor"}:
        raise PtxError("unknown comparison")
    kind = "u" + of[1:] if of[0] == "b" else of
    try:
        compare = arithmetic.comparison(how, kind)
    except KeyError:
        raise PtxError(f"unknown comparison {how}") from None
    a, b = blocks.read(i.operands[1], kind), blocks.read(i.operands[2], kind)
    to, _, opposite = i.operands[0].partition("|")
    put, put_opposite = blocks.write(to, "pred"), blocks.write(opposite, "pred") if opposite else None
    if not combines and put_opposite is None:
        return lambda where: put(where, compare(a(where), b(where)))
    join = getattr(np, f"logical_{combines[0]}") if combines else lambda x, _: x
    negated = combines != [] and i.operands[3].startswith("!")
    other = blocks.read(i.operands[3].lstrip("!"), "pred") if combines else lambda where: False

    def run(where: Any) -> None:
        holds, with_this = compare(a(where), b(where)), other(where) ^ negated
        put(where, join(holds, with_this))
        if put_opposite is not None:
            put_opposite(where, join(~holds, with_this))

    return run


def pack(blocks: "Blocks", i: Instruction) -> Run:
    """Mov between one register and the parts of it, the lowest first."""
    bits = int(i.modifiers[0][1:])
    to, of = i.operands
    inside = (to if to.startswith("{") else of).strip("{}").split(",")
    parts = [name.strip() for name in inside]
    small = f"u{bits // len(parts)}"
    if to.startswith("{"):
        value, puts = blocks.read(of, f"u{bits}"), [blocks.write(name, small) for name in parts]

        def unpack(where: Any) -> None:
            whole = value(where)
            shift = bits // len(parts)
            pieces = [(whole >> whole.dtype.type(shift * k)).astype(TYPES[small]) for k in range(len(parts))]
            for put, piece in zip(puts, pieces, strict=True):
                put(where, piece)

        return unpack
    put, reads = blocks.write(to, f"u{bits}"), [blocks.read(name, small) for name in parts]
    wide = TYPES[f"u{bits}"]

    def join(where: Any) -> None:
        whole = wide.type(0)
        for k, read in enumerate(reads):
            whole = whole | read(where).astype(wide) << wide.type(bits // len(parts) * k)
        put(where, whole)

    return join


def generic(blocks: "Blocks", i: Instruction) -> Run:
    """Between addresses in a space and generic ones."""
    space = next(m for m in i.modifiers if m in SPACES)
    put, value = blocks.write(i.operands[0], "u64"), blocks.read(i.operands[1], "u64")
    if space == "param":
        raise PtxError("generic addresses of parameters")
    window = np.uint64(SHARED_WINDOW if space == "shared" else 0)
    if "to" in i.modifiers:
        return lambda where: put(where, value(where) - window)
    return lambda where: put(where, value(where) + window)
