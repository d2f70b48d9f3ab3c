"""What a bench stores: the suites there are, the machine they ran on, and the table of their records."""

import os
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from tersetorch import _native
from tersetorch.bench.suites import csr_matmul

SUITES: dict[str, Callable[[int, bool], list[dict[str, Any]]]] = {"csr_matmul": csr_matmul.run}


def run_suite(name: str, threads: int, quick: bool) -> list[dict[str, Any]]:
    """The records of a suite, with that many threads for ours and every peer; today's count is put back after it."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        return SUITES[name](threads, quick)
    finally:
        torch.set_num_threads(before)


def machine_facts() -> dict[str, Any]:
    """What a figure depends on besides the code."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "caches_kib": _caches(),
        "load_average": list(os.getloadavg()),
        "isa": _native.cpu_active(),
        "isa_detected": _native.cpu_detected(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tersetorch": version("tersetorch"),
        "compiler": _native.build_facts()["compiler"],
    }


def table(records: list[dict[str, Any]]) -> Table:
    """One row for each record, the fastest of its case marked."""
    result = Table("suite", "case", "shape", "density", "batch", "threads", "implementation", "p30 ms", "spread ms", "")
    fastest: dict[tuple[Any, ...], float] = {}
    for record in records:
        case = _case(record)
        fastest[case] = min(fastest.get(case, float("inf")), record["p30_ms"])
    for record in records:
        row = [record["suite"], record["case"], "x".join(map(str, record["shape"])), f"{record['density']:.2f}"]
        row += [str(record["batch"]), str(record["threads"]), record["implementation"]]
        row += [f"{record['p30_ms']:.3f}", f"{record['spread_ms']:.3f}"]
        result.add_row(*row, "fastest" if record["p30_ms"] == fastest[_case(record)] else "")
    return result


def _case(record: dict[str, Any]) -> tuple[Any, ...]:
    return (record["suite"], record["case"], *record["shape"], record["density"], record["batch"], record["threads"])


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def _caches() -> dict[str, int]:
    caches = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind = ((index / name).read_text().strip() for name in ("level", "type"))
        caches[f"L{level} {kind.lower()}"] = int((index / "size").read_text().strip().removesuffix("K"))
    return caches
