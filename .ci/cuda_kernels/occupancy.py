"""How much of a multiprocessor a kernel's blocks can fill, by NVIDIA's rules (cuda_occupancy.h of the CUDA runtime)."""

from __future__ import annotations

from dataclasses import dataclass

WARP = 32
# The same on every architecture here: 65,536 registers in four parts, each given to warps 256 at a time.
PARTS, REGISTERS_OF_PART, REGISTER_UNIT = 4, 16384, 256


@dataclass(frozen=True)
class Multiprocessor:
    """The most warps and blocks at once, bytes of shared memory, what a block takes besides its own, and the unit."""

    warps: int
    blocks: int
    shared: int
    of_block: int = 1024
    unit: int = 128


MULTIPROCESSORS = {
    75: Multiprocessor(32, 16, 64 * 1024, of_block=0, unit=256),
    80: Multiprocessor(64, 32, 164 * 1024),
    86: Multiprocessor(48, 16, 100 * 1024),
    89: Multiprocessor(48, 24, 100 * 1024),
    90: Multiprocessor(64, 32, 228 * 1024),
    100: Multiprocessor(64, 32, 228 * 1024),
}


@dataclass(frozen=True)
class Occupancy:
    """Blocks at once on a multiprocessor, the share of its warps that they are, and what stops more."""

    blocks: int
    share: float
    limit: str


def occupancy(architecture: int, threads: int, registers: int, shared: int) -> Occupancy:
    """Of blocks with so many threads, registers a thread and bytes of shared memory."""
    sm = MULTIPROCESSORS[architecture]
    warps = _up(threads, WARP) // WARP
    of_part = REGISTERS_OF_PART // max(_up(registers * WARP, REGISTER_UNIT), REGISTER_UNIT)
    room = {
        "warps": sm.warps // warps,
        "blocks": sm.blocks,
        "registers": PARTS * of_part // warps,
        "shared memory": sm.shared // _up(shared + sm.of_block, sm.unit) if shared + sm.of_block else sm.blocks,
    }
    limit = min(room, key=lambda name: room[name])  # the first of equals: a full multiprocessor is limited by its warps
    return Occupancy(room[limit], room[limit] * warps / sm.warps, limit)


def _up(size: int, unit: int) -> int:
    return -(-size // unit) * unit
