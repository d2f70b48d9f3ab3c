"""What this machine can do at most: multiply-adds of every level and reads from every cache, measured in the same run.

The loops are csrc/kernels/machine_rates; threads run them side by side, each on a buffer of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from tersetorch import _native

ARITHMETICS = ("float32", "bfloat16", "int8", "binary")
SMALLEST, LARGEST = 2**14, 2**29
SECONDS, QUICK_SECONDS = 0.02, 0.005
TRIES = 3
_PAGE = 4096


@dataclass(frozen=True)
class Rates:
    """The measured rates.

    Attributes:
        threads: how many ran side by side; every rate is that of all together.
        arithmetic: giga-operations a second by level, then by arithmetic (float32, bfloat16, int8, binary); a multiply
            and an add are two. Left out where the level has no such instruction.
        reads: (bytes, gigabytes a second) for buffers that hold so many bytes altogether, read again and again.
    """

    threads: int
    arithmetic: dict[str, dict[str, float]]
    reads: list[tuple[int, float]]

    def peak(self, mode: str, level: str) -> float:
        """Giga-operations a second of a mode at a level: bfloat16 is at least float32, which it can be computed in."""
        own = self.arithmetic[level]
        return max(own.get(mode, 0.0), own["float32"])

    def read(self, size: int) -> float:
        """Gigabytes a second at which size bytes that were just used can be read again, at most."""
        fitting = [rate for nbytes, rate in self.reads if nbytes <= size]
        return fitting[-1] if fitting else self.reads[0][1]

    @property
    def memory(self) -> float:
        """Gigabytes a second of the largest buffer: beyond the caches, as far as the buffer is larger than they are."""
        return self.reads[-1][1]

    def limit_ms(self, operations: float, nbytes: int, mode: str, level: str, cold: bool) -> tuple[float, str]:
        """The least time for that many operations and bytes, and which of the two it is."""
        arithmetic = 1e-6 * operations / self.peak(mode, level)
        reading = 1e-6 * nbytes / (self.memory if cold else self.read(nbytes))
        return (arithmetic, "arithmetic") if arithmetic > reading else (reading, "bytes")

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a record."""
        gops = {
            level: {name: round(rate, 1) for name, rate in found.items()} for level, found in self.arithmetic.items()
        }
        reads = {str(size): round(rate, 1) for size, rate in self.reads}
        return {"threads": self.threads, "gops": gops, "read_gbytes_per_s": reads}


def measure(threads: int = 1, quick: bool = False) -> Rates:
    """Measures with that many threads, in one to two seconds (quick: a third of it).

    Of three tries the fastest counts: a neighbour can only slow a loop down.
    """
    seconds = QUICK_SECONDS if quick else SECONDS
    with ThreadPoolExecutor(threads) as pool:

        def together(run: Callable[[int], float]) -> float:
            ready = Barrier(threads)

            def one(thread: int) -> float:
                ready.wait()
                return run(thread)

            return max(sum(pool.map(one, range(threads))) for _ in range(TRIES))

        arithmetic: dict[str, dict[str, float]] = {}
        for level in _native.cpu_levels():
            found = {
                name: 1e-9 * together(lambda _, n=name, v=level: _native.arithmetic_rate(n, v, seconds))  # type: ignore[misc]
                for name in ARITHMETICS
            }
            arithmetic[level] = {name: rate for name, rate in found.items() if rate > 0}
        reads = []
        level = _native.cpu_detected()
        buffers = [_aligned(max(SMALLEST, LARGEST // threads)) for _ in range(threads)]
        size = SMALLEST
        while size <= LARGEST:
            parts = [buffer[: max(1024, size // threads)] for buffer in buffers]
            rate = together(lambda thread, p=parts: _native.read_rate(p[thread], level, seconds))  # type: ignore[misc]
            reads.append((size, 1e-9 * rate))
            size *= 2
    # A larger buffer is never faster: where it seemed so, the smaller one was disturbed.
    best = 0.0
    rising = []
    for size, rate in reversed(reads):
        best = max(best, rate)
        rising.append((size, best))
    return Rates(threads, arithmetic, rising[::-1])


def table(rates: Rates) -> Table:
    """The rates as a person reads them."""
    result = Table("rate", "level or bytes", f"{rates.threads} thread{'s' * (rates.threads > 1)}")
    for level, found in rates.arithmetic.items():
        for name, rate in found.items():
            result.add_row(f"multiply-adds {name}", level, f"{rate:,.0f} Gop/s")
    for size, rate in rates.reads:
        result.add_row("read", _bytes(size), f"{rate:,.1f} GB/s")
    return result


class Evictor:
    """Reads a buffer a quarter larger than the last cache (at most 512 MiB): nothing else is in the caches after it."""

    def __init__(self, threads: int) -> None:
        self.nbytes = min(LARGEST, max(2**24, _last_cache() * 5 // 4))
        self._parts = [_aligned(self.nbytes // threads) for _ in range(threads)]
        self._pool = ThreadPoolExecutor(threads)

    def __call__(self) -> None:
        """Evicts: every thread reads its part, through its core's caches."""
        list(self._pool.map(_native.read, self._parts))


def _aligned(size: int) -> NDArray[np.uint8]:
    memory = np.ones(size + _PAGE, dtype=np.uint8)
    offset = -memory.ctypes.data % _PAGE
    return memory[offset : offset + size]


def caches_kib() -> dict[str, int]:
    """The sizes of one core's caches, by level and kind."""
    caches = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind = ((index / name).read_text().strip() for name in ("level", "type"))
        caches[f"L{level} {kind.lower()}"] = int((index / "size").read_text().strip().removesuffix("K"))
    return caches


def _last_cache() -> int:
    return 1024 * max(caches_kib().values(), default=32 * 1024)


def _bytes(size: int) -> str:
    return f"{size >> 20} MiB" if size >= 2**20 else f"{size >> 10} KiB"
