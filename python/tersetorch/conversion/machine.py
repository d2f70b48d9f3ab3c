"""What a measurement depends on that is not the model."""

import hashlib
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import TypedDict

import torch

from tersetorch._native import cpu_active, cpu_forced


class MachineFacts(TypedDict):
    """The machine and the software a decision was made on; cpu_flags is a digest of the features the CPU lists."""

    cpu: str
    cpu_flags: str
    caches: list[str]
    isa: str
    isa_forced: bool
    threads: int
    torch: str
    tersetorch: str


def machine_facts() -> MachineFacts:
    """The facts of this process, now."""
    model, flags = _cpu()
    return MachineFacts(
        cpu=model,
        cpu_flags=hashlib.sha256(flags.encode()).hexdigest()[:12],
        caches=_caches(),
        isa=cpu_active(),
        isa_forced=cpu_forced(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        tersetorch=version("tersetorch"),
    )


def load() -> float:
    """Processes that wanted to run during the last minute, on average."""
    return os.getloadavg()[0]


def is_busy() -> bool:
    """Whether others compete for the CPUs: what is measured meanwhile is worth no more than this one run."""
    return load() > (os.cpu_count() or 1)


def _cpu() -> tuple[str, str]:
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        first = ""
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
    names = [fields[key] for key in ("model name", "cpu family", "model", "stepping") if key in fields]
    flags = fields.get("flags", fields.get("Features", ""))
    return " ".join(names) or platform.processor() or platform.machine(), flags


def _caches() -> list[str]:
    sizes = []
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        except OSError:
            continue
        sizes.append(f"L{level} {kind} {size}")
    return sizes
