"""What this GPU reaches in torch's own hands: a copy of memory, and large products of each arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from . import timing

COPIED = 2**30
SIZE, QUICK_SIZE = 8192, 2048
SECONDS, QUICK_SECONDS = 0.5, 0.05


@dataclass(frozen=True)
class Rates:
    """The measured rates.

    Attributes:
        device: the GPU's name.
        cache: bytes of its L2 cache.
        copy: gigabytes a second of a device-to-device copy of a GiB, bytes read and bytes written both counted.
        arithmetic: giga-operations a second of a product of square matrices by mode; a multiply and an add are two.
        launch_ms: what an all but empty kernel takes inside a graph.
    """

    device: str
    cache: int
    copy: float
    arithmetic: dict[str, float]
    launch_ms: float

    def limit_ms(self, operations: float, nbytes: int, mode: str) -> tuple[float, str]:
        """The least time for that many operations and bytes, and which of the two it is."""
        arithmetic, moving = 1e-6 * operations / self.arithmetic[mode], 1e-6 * nbytes / self.copy
        return (arithmetic, "arithmetic") if arithmetic > moving else (moving, "bytes")

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a record."""
        gops = {name: round(rate, 1) for name, rate in self.arithmetic.items()}
        return {
            "gpu": self.device,
            "l2_bytes": self.cache,
            "cuda": torch.version.cuda,
            "copy_gbytes_per_s": round(self.copy, 1),
            "gops": gops,
            "launch_ms": self.launch_ms,
        }


def measure(quick: bool = False) -> Rates:
    """Measures for about two seconds (quick: a fifth of it, with smaller matrices).

    Raises:
        RuntimeError: there is no CUDA device.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("bench: --device cuda needs a GPU that this torch can use, got none; leave --device out")
    size, seconds = (QUICK_SIZE, QUICK_SECONDS) if quick else (SIZE, SECONDS)
    times = {"copy": _median_ms(_copy(), seconds=seconds)}
    for mode in ("float32", "bfloat16", "int8"):
        times[mode] = _median_ms(_product(mode, size), seconds=seconds)
    one = torch.zeros(1, device="cuda")
    launch_ms = _median_ms(one.zero_, *[one.zero_] * 19, seconds=seconds)
    gops = {mode: 2e-6 * size**3 / times[mode] for mode in ("float32", "bfloat16", "int8")}
    facts = torch.cuda.get_device_properties("cuda")
    return Rates(facts.name, facts.L2_cache_size, 2e-6 * COPIED / times["copy"], gops, launch_ms)


def _copy() -> Callable[[], Tensor]:
    source = torch.empty(COPIED, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _product(mode: str, size: int) -> Callable[[], Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    if mode == "int8":
        q = torch.randint(-127, 128, (size, size), generator=generator, device="cuda", dtype=torch.int8)
        return lambda: torch._int_mm(q, q.T)
    a = torch.randn(size, size, generator=generator, device="cuda").to(getattr(torch, mode))
    return lambda: a @ a


def _median_ms(*calls: Callable[[], object], seconds: float) -> float:
    return timing.interleave({"": calls}, seconds)[""]["median_ms"]


def table(rates: Rates) -> Table:
    """The rates, one a row."""
    result = Table(rates.device, "rate")
    result.add_row("copy", f"{rates.copy:.0f} GB/s")
    for mode, rate in rates.arithmetic.items():
        result.add_row(f"product, {mode}", f"{rate / 1e3:.1f} TOP/s")
    result.add_row("an all but empty kernel", f"{1e3 * rates.launch_ms:.2f} us")
    return result
