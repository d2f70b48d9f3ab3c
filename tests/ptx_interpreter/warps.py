"""Instructions that the lanes of a warp execute together: shuffles, votes, sums, products of fragments."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ptx_interpreter import accesses, fragments
from ptx_interpreter.parse import Instruction, PtxError

if TYPE_CHECKING:
    from ptx_interpreter.machine import Blocks

WARP = 32
Lanes = Any  # sorted numbers of lanes
Run = Callable[[Lanes], None]


def warp_instruction(blocks: "Blocks", i: Instruction) -> Any:
    """Runs where all lanes of the mask have come; else these wait for the others."""
    holds = blocks.guard(i)
    make, mask = warp_operation(blocks, i)

    def run(pc: int, lanes: Lanes) -> None:
        on = holds(lanes)
        blocks.enter(pc + 1, lanes[~on])
        lanes = lanes[on]
        if pc in blocks.parked:
            lanes = np.union1d(lanes, blocks.parked.pop(pc))
        if not len(lanes):
            return
        warp, lane = lanes // WARP, lanes % WARP
        masks = mask(lanes)
        bit = np.uint32(1) << lane.astype(np.uint32)
        if not (masks & bit).all():
            raise PtxError(f"{i.text}: a lane is not in its own mask")
        # The lanes that are here with each one's mask.
        here = np.zeros(blocks.count * blocks.pitch // WARP, np.uint32)
        np.bitwise_or.at(here, warp, bit)
        missing = masks & ~here[warp]
        if not missing.any():
            first = np.zeros(len(here), np.uint32)
            first[warp] = masks
            if (first[warp] != masks).any() and disagree(warp, masks):
                raise PtxError(f"{i.text}: lanes of a warp give different masks")
            make(lanes)
            blocks.enter(pc + 1, lanes)
            return
        alive = np.zeros(len(here), np.uint32)
        living = np.flatnonzero(blocks.alive)
        np.bitwise_or.at(alive, living // WARP, np.uint32(1) << (living % WARP).astype(np.uint32))
        if (masks & ~alive[warp]).any():
            raise PtxError(f"{i.text}: the mask names lanes that have exited or do not exist")
        incomplete = np.unique(warp[missing != 0])
        waits = np.isin(warp, incomplete)
        blocks.parked[pc] = lanes[waits]
        if not waits.all():
            make(lanes[~waits])
            blocks.enter(pc + 1, lanes[~waits])

    return run


def disagree(warp: Any, masks: Any) -> bool:
    """Whether two masks of a warp overlap without being equal."""
    for w in np.unique(warp):
        different = np.unique(masks[warp == w])
        if any(a & b for k, a in enumerate(different) for b in different[k + 1 :]):
            return True
    return False


def warp_operation(blocks: "Blocks", i: Instruction) -> tuple[Run, Callable[[Lanes], Any]]:
    """What it does to lanes whose masks are complete, and the masks."""

    def whole(lanes: Lanes) -> Any:
        return np.full(len(lanes), 0xFFFFFFFF, np.uint32)

    if i.name == "bar":
        if i.modifiers != ["warp", "sync"]:
            raise PtxError("unknown barrier")
        return lambda lanes: None, blocks.read(i.operands[0], "u32")
    if i.name == "shfl":
        return shuffle(blocks, i)
    if i.name == "vote":
        return vote(blocks, i)
    if i.name == "redux":
        return reduction(blocks, i)
    if i.name == "mma":
        return multiply(blocks, i), whole
    return load_matrix(blocks, i), whole


def shuffle(blocks: "Blocks", i: Instruction) -> tuple[Run, Callable[[Lanes], Any]]:
    """Lane values change places; one whose source lies outside its segment keeps its own."""
    if i.modifiers[0] != "sync" or i.modifiers[2:] != ["b32"]:
        raise PtxError("unknown shuffle")
    mode = i.modifiers[1]
    to, _, valid = i.operands[0].partition("|")
    put, put_valid = blocks.write(to, "b32"), blocks.write(valid, "pred") if valid else None
    value, by, clamp, mask = (blocks.read(operand, "u32") for operand in i.operands[1:])

    def run(lanes: Lanes) -> None:
        lane, b, c = lanes % WARP, by(lanes).astype(np.int64) & 31, clamp(lanes).astype(np.int64)
        limit, segment = c & 31, c >> 8 & 31
        last, first = lane & segment | limit & ~segment, lane & segment
        if mode == "up":
            source, inside = lane - b, lane - b >= last
        elif mode == "down":
            source, inside = lane + b, lane + b <= last
        elif mode == "bfly":
            source, inside = lane ^ b, (lane ^ b) <= last
        elif mode == "idx":
            source = first | b & ~segment
            inside = source <= last
        else:
            raise PtxError(f"unknown: {i.text}")
        source = np.where(inside, source, lane)
        if not (mask(lanes) >> source.astype(np.uint32) & np.uint32(1)).all():
            raise PtxError(f"{i.text}: reads a lane that is not in the mask")
        everyone = np.zeros(blocks.count * blocks.pitch, np.uint32)
        everyone[lanes] = value(lanes)
        put(lanes, everyone[lanes - lane + source])
        if put_valid is not None:
            put_valid(lanes, inside)

    return run, mask


def vote(blocks: "Blocks", i: Instruction) -> tuple[Run, Callable[[Lanes], Any]]:
    """Of a predicate of the lanes of the mask."""
    if i.modifiers[0] != "sync" or i.modifiers[1:] not in (
        ["ballot", "b32"],
        ["any", "pred"],
        ["all", "pred"],
        ["uni", "pred"],
    ):
        raise PtxError("unknown vote")
    put, mask = blocks.write(i.operands[0], i.modifiers[2]), blocks.read(i.operands[2], "u32")
    negated, predicate = i.operands[1].startswith("!"), blocks.read(i.operands[1].lstrip("!"), "pred")

    def run(lanes: Lanes) -> None:
        votes = np.zeros(blocks.count * blocks.pitch // WARP, np.uint32)
        holds = predicate(lanes) ^ negated
        np.bitwise_or.at(votes, lanes // WARP, holds.astype(np.uint32) << (lanes % WARP).astype(np.uint32))
        masks = mask(lanes)
        ballot = votes[lanes // WARP] & masks
        put(
            lanes,
            {
                "ballot": ballot,
                "any": ballot != 0,
                "all": ballot == masks,
                "uni": (ballot == 0) | (ballot == masks),
            }[i.modifiers[1]],
        )

    return run, mask


def reduction(blocks: "Blocks", i: Instruction) -> tuple[Run, Callable[[Lanes], Any]]:
    """One number of the integers of all lanes of the mask."""
    of = {
        "add": np.add,
        "min": np.minimum,
        "max": np.maximum,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
    }
    if i.modifiers[0] != "sync" or i.modifiers[1] not in of or i.modifiers[2] not in ("s32", "u32", "b32"):
        raise PtxError("unknown reduction")
    put, value, mask = (
        blocks.write(i.operands[0], i.modifiers[2]),
        blocks.read(i.operands[1], i.modifiers[2]),
        blocks.read(i.operands[2], "u32"),
    )

    def run(lanes: Lanes) -> None:
        values, keys = value(lanes), (lanes // WARP).astype(np.uint64) << np.uint64(32) | mask(lanes)
        result = values.copy()
        for key in np.unique(keys):
            result[keys == key] = of[i.modifiers[1]].reduce(values[keys == key])
        put(lanes, result)

    return run, mask


def multiply(blocks: "Blocks", i: Instruction) -> Run:
    """Mma of whole warps."""
    multiply = fragments.product(i.modifiers)
    to, *operands = ([name.strip() for name in operand.strip("{}").split(",")] for operand in i.operands)
    puts = [blocks.write(name, "b32") for name in to]
    gets = [[blocks.read(name, "u32") for name in names] for names in operands]

    def run(lanes: Lanes) -> None:
        zeros = np.zeros(len(lanes), np.uint32)
        a, b, c = (np.stack([get(lanes) + zeros for get in of], 1).reshape(-1, WARP, len(of)) for of in gets)
        result = multiply(a, b, c)
        for number, put in enumerate(puts):
            put(lanes, result[..., number].reshape(-1))

    return run


def load_matrix(blocks: "Blocks", i: Instruction) -> Run:
    """Lane 8 m + r names row r of 8x8 matrix m; lane 4 g + t gets elements 2 t and 2 t + 1 of row g of each."""
    modifiers = [m for m in i.modifiers if not m.startswith("shared")]
    transposes = "trans" in modifiers
    modifiers = [m for m in modifiers if m != "trans"]
    if (
        modifiers[:3] != ["sync", "aligned", "m8n8"]
        or modifiers[3] not in ("x1", "x2", "x4")
        or modifiers[4:] != ["b16"]
    ):
        raise PtxError("unknown ldmatrix")
    number = int(modifiers[3][1:])
    puts = [blocks.write(name.strip(), "b32") for name in i.operands[0].strip("{}").split(",")]
    address = accesses.address_of(blocks, i.operands[1])

    def run(lanes: Lanes) -> None:
        at = address(lanes).reshape(-1, WARP)
        group, thread = np.arange(WARP) >> 2, np.arange(WARP) & 3
        for matrix, put in enumerate(puts[:number]):
            result = np.zeros((len(at), WARP), np.uint32)
            for half in range(2):
                row, column = (2 * thread + half, group) if transposes else (group, 2 * thread + half)
                places = at[:, 8 * matrix + row] + (2 * column).astype(np.uint64)
                if (at[:, 8 * matrix : 8 * matrix + 8] % np.uint64(16)).any():
                    raise PtxError(f"{i.text}: a row must begin at a multiple of 16")
                read = accesses.load_numbers(blocks, "shared", places.reshape(-1), 2, lanes, i.text).astype(np.uint32)
                result |= read.reshape(-1, WARP) << np.uint32(16 * half)
            put(lanes, result.reshape(-1))

    return run
