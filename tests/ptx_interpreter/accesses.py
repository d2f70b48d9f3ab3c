"""Instructions that access memory: loads, stores, atomics, and copies that nobody waits for until told to."""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ptx_interpreter.arithmetic import TYPES
from ptx_interpreter.memory import LOCAL_WINDOW, SHARED_WINDOW, UNSIGNED, Range
from ptx_interpreter.parse import BYTES, Instruction, PtxError

if TYPE_CHECKING:
    from ptx_interpreter.machine import Blocks

Lanes = Any  # sorted numbers of lanes
Run = Callable[[Lanes], None]

SPACES = ("global", "shared", "local", "param", "const")
# How caches and the order of memory are used: nothing that one thread after the other could see.
HINTS = re.compile(
    r"nc|volatile|relaxed|acquire|release|acq_rel|weak|cta|gpu|sys|ca|cg|cs|lu|cv|wb|wt|L[12](::.*)?|evict_\w+|no_allocate"
)


def address_of(blocks: "Blocks", operand: str) -> Callable[[Lanes], Any]:
    """Of every lane: [%rd1+8], [variable+4]."""
    match = re.match(r"\[\s*([\w$%.]+)\s*(?:\+\s*(-?\w+))?\s*\]$", operand)
    if match is None:
        raise PtxError(f"unknown address {operand}")
    offset = np.uint64(int(match[2] or "0", 0) & (1 << 64) - 1)
    if match[1].startswith("%") and blocks.register(match[1]).dtype.itemsize == 4:
        narrow = blocks.read(match[1], "u32")
        return lambda lanes: narrow(lanes).astype(np.uint64) + offset & np.uint64(0xFFFFFFFF)
    base = blocks.read(match[1], "u64")
    return lambda lanes: base(lanes) + offset + np.zeros(len(lanes), np.uint64)


def places_of(
    blocks: "Blocks", space: str, at: Any, size: int, lanes: Lanes, write: bool, what: str
) -> list[tuple[Range, Any, Any]]:
    """Where numbers of this size lie: range, indices in its view, and which of the lanes."""
    if space == "global":
        return blocks.launch.memory.place(at, size, write, what)
    if space == "shared":
        return blocks.shared.place(blocks.block_of[lanes], at, size, what)
    if space == "local":
        return blocks.local.place(lanes, at - np.uint64(LOCAL_WINDOW), size, what)
    windows = at >> np.uint64(56)
    found = []
    for window in np.unique(windows).tolist():
        of = np.flatnonzero(windows == window)
        inner = {1: "shared", 2: "local"}.get(window, "global")
        moved = at[of] - np.uint64(SHARED_WINDOW) if inner == "shared" else at[of]
        for memory, indices, some in places_of(blocks, inner, moved, size, lanes[of], write, what):
            found.append((memory, indices, of[some]))
    return found


def load_numbers(blocks: "Blocks", space: str, at: Any, size: int, lanes: Lanes, what: str) -> Any:
    """Numbers of 1 to 8 bytes."""
    places = places_of(blocks, space, at, size, lanes, False, what)
    if len(places) == 1:
        return places[0][0].views[size][places[0][1]]
    result = np.empty(len(lanes), UNSIGNED[size])
    for memory, indices, of in places:
        result[of] = memory.views[size][indices]
    return result


def store_numbers(blocks: "Blocks", space: str, at: Any, values: Any, lanes: Lanes, what: str) -> None:
    """Numbers of 1 to 8 bytes, the later lane's where two agree in the place."""
    size = values.dtype.itemsize
    values = np.broadcast_to(values, at.shape)
    for memory, indices, of in places_of(blocks, space, at, size, lanes, True, what):
        memory.views[size][indices] = values[of]


def space_of(blocks: "Blocks", i: Instruction) -> tuple[str, int, str]:
    """Space, numbers in a vector, and type of an access; nothing else may be in its modifiers but hints."""
    *modifiers, of = i.modifiers
    space, vector = "generic", 1
    for modifier in modifiers:
        if modifier.split("::")[0] in SPACES:
            space = modifier.split("::")[0]
        elif modifier in ("v2", "v4", "v8"):
            vector = int(modifier[1:])
        elif not HINTS.fullmatch(modifier):
            raise PtxError(f"unknown modifier {modifier}")
    if of not in BYTES:
        raise PtxError(f"unknown type {of}")
    return "global" if space == "const" else space, vector, of


def memory_instruction(blocks: "Blocks", i: Instruction) -> Run:
    """Loads, stores and atomics."""
    if i.name in ("atom", "red"):
        return atomic(blocks, i)
    space, vector, of = space_of(blocks, i)
    size = BYTES[of]
    place, numbers = (i.operands[1], i.operands[0]) if i.name == "ld" else i.operands
    names = [name.strip() for name in numbers.strip("{}").split(",")]
    if len(names) != vector:
        raise PtxError(f"expected {vector} registers")
    address = address_of(blocks, place)
    text, alignment = i.text, np.uint64(size * vector - 1)
    if i.name == "st":
        reads = [blocks.read(name, "u" + of[1:]) for name in names]

        def store(lanes: Lanes) -> None:
            at = address(lanes)
            if vector > 1 and (at & alignment).any():
                raise PtxError(f"{text}: not a multiple of {size * vector}")
            for k, read in enumerate(reads):
                store_numbers(blocks, space, at + np.uint64(k * size), read(lanes), lanes, text)

        return store
    kind = of if of[0] == "s" else "u" + of[1:]
    puts = [blocks.write(name, kind) for name in names]
    if space == "param":
        parameters = blocks.launch.parameters

        def load_parameter(lanes: Lanes) -> None:
            at = address(lanes).astype(np.int64)
            for k, put in enumerate(puts):
                offsets = at + k * size
                if (offsets < 0).any() or (offsets + size > parameters.size).any() or (offsets % size).any():
                    raise PtxError(f"{text}: outside the parameters")
                put(lanes, parameters.views[size][offsets // size].view(TYPES[kind]))

        return load_parameter

    def load(lanes: Lanes) -> None:
        at = address(lanes)
        if vector > 1 and (at & alignment).any():
            raise PtxError(f"{text}: not a multiple of {size * vector}")
        for k, put in enumerate(puts):
            put(lanes, load_numbers(blocks, space, at + np.uint64(k * size), size, lanes, text).view(TYPES[kind]))

    return load


def atomic(blocks: "Blocks", i: Instruction) -> Run:
    """Lane after lane."""
    *modifiers, name, of = [m for m in i.modifiers if m != "noftz"]
    space, _, of = space_of(blocks, Instruction(None, i.name, [*modifiers, of], [], i.text))
    steps: dict[str, Callable[..., Any]] = {
        "add": lambda old, x: old + x,
        "min": np.minimum,
        "max": np.maximum,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
        "exch": lambda old, x: x,
        "cas": lambda old, x, y: np.where(old == x, y, old),
        "inc": lambda old, x: np.where(old >= x, 0, old + 1).astype(old.dtype),
        "dec": lambda old, x: np.where((old == 0) | (old > x), x, old - 1).astype(old.dtype),
    }
    if name not in steps:
        raise PtxError(f"unknown atomic {name}")
    step, size = steps[name], BYTES[of]
    *to, place = i.operands[:2] if i.name == "atom" else i.operands[:1]
    put = blocks.write(to[0], of) if to else None
    address, reads = address_of(blocks, place), [blocks.read(operand, of) for operand in i.operands[len(to) + 1 :]]

    def run(lanes: Lanes) -> None:
        at = address(lanes)
        values = [np.broadcast_to(read(lanes), at.shape) for read in reads]
        old = np.empty(len(lanes), TYPES[of])
        for memory, indices, some in places_of(blocks, space, at, size, lanes, True, i.text):
            numbers = memory.views[size].view(TYPES[of])
            inputs, result = [value[some] for value in values], np.empty(len(indices), TYPES[of])
            if len(np.unique(indices)) == len(indices):
                result[:] = numbers[indices]
                numbers[indices] = step(result, *inputs)
            else:
                for k, index in enumerate(indices):
                    result[k] = numbers[index]
                    numbers[index] = step(numbers[index], *[value[k] for value in inputs])
            old[some] = result
        if put is not None:
            put(lanes, old)

    return run


def copy(blocks: "Blocks", i: Instruction) -> Run:
    """Shared memory holds nothing of use between a copy's begin and the wait for it."""
    rest = [m for m in i.modifiers[1:] if not HINTS.fullmatch(m)]
    if rest == ["commit_group"]:
        return lambda lanes: blocks.group.__setitem__(lanes, blocks.group[lanes] + 1)
    if rest == ["wait_group"]:
        unfinished = int(i.operands[0])
        return lambda lanes: finish_copies(blocks, lanes, blocks.group[lanes] - unfinished)
    if rest == ["wait_all"]:
        return lambda lanes: finish_copies(blocks, lanes, blocks.group[lanes] + 1)
    if len(rest) != 2 or not rest[0].startswith("shared") or rest[1] != "global":
        raise PtxError("unknown copy")
    to, of = address_of(blocks, i.operands[0]), address_of(blocks, i.operands[1])
    size = int(i.operands[2])
    some = blocks.read(i.operands[3], "u32") if len(i.operands) > 3 else None
    if size not in (4, 8, 16) or ("cg" in i.modifiers and size != 16):
        raise PtxError("a copy must be of 4, 8 or 16 bytes")

    def run(lanes: Lanes) -> None:
        target, source = to(lanes), of(lanes)
        if (target % np.uint64(size)).any() or (source % np.uint64(size)).any():
            raise PtxError(f"{i.text}: not a multiple of {size}")
        data = np.zeros((len(lanes), size // 4), np.uint32)
        length = np.full(len(lanes), size) if some is None else np.broadcast_to(some(lanes), lanes.shape).astype(int)
        for k in range(size // 4):
            reads = length > 4 * k
            if reads.any():
                data[reads, k] = load_numbers(
                    blocks, "global", source[reads] + np.uint64(4 * k), 4, lanes[reads], i.text
                )
            store_numbers(blocks, "shared", target + np.uint64(4 * k), np.array([0xCBCBCBCB], np.uint32), lanes, i.text)
        blocks.copies.append((lanes, blocks.group[lanes], target, data, size))

    return run


def finish_copies(blocks: "Blocks", lanes: Lanes, before: Any) -> None:
    """Of these lanes, those of earlier groups than the given ones."""
    limit = np.full(blocks.count * blocks.pitch, -1)
    limit[lanes] = before
    left = []
    for owners, groups, target, data, size in blocks.copies:
        done = groups < limit[owners]
        for k in range(size // 4):
            if done.any():
                store_numbers(
                    blocks, "shared", target[done] + np.uint64(4 * k), data[done, k], owners[done], "cp.async"
                )
        if not done.all():
            left.append((owners[~done], groups[~done], target[~done], data[~done], size))
    blocks.copies = left
