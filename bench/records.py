"""What a bench stores: the suites there are, the machine they ran on, and their records, group after group."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator, Mapping
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.table import Table

from tersetorch import _native

from .binary_peers import BINARY
from .coded_peers import CODED
from .cuda import problems
from .cuda.rates import Rates as CudaRates
from .cuda.suite import Cuda
from .flat_peers import FLAT
from .implementations import LeftOut
from .options import Options
from .peers import PEERS
from .rates import Rates, caches_kib
from .suites import binary, binary_networks, codebook, coders, fixed, flat, networks, product, production, sparse

Record = dict[str, Any]


class Group(Protocol):
    """What is measured at one go."""

    @property
    def label(self) -> str:
        """One line for a person."""


class Suite(Protocol):
    """What measures the groups of a suite."""

    def measure(self, group: Any) -> tuple[list[Record], list[LeftOut]]:
        """The records of a group, and what was left out."""


SUITES: dict[str, tuple[Any, type[Any]]] = {
    "sparse": (sparse.groups, sparse.Sparse),
    "codebook": (codebook.groups, codebook.Codebook),
    "product": (product.groups, product.Product),
    "binary": (binary.groups, binary.Binary),
    "binary_networks": (binary_networks.groups, binary_networks.BinaryNetworks),
    "fixed": (fixed.groups, fixed.Fixed),
    "flat": (flat.groups, flat.Flattened),
    "coders": (coders.groups, coders.Coders),
    "networks": (networks.groups, networks.Networks),
    "production": (production.groups, production.Production),
}
# With --device cuda.
CUDA_SUITES: dict[str, tuple[Any, type[Any]]] = {
    family: (partial(problems.groups, family), Cuda) for family in problems.FAMILIES
}
# What peers are versions of.
PACKAGES = (
    "tersetorch", "torch", "numpy", "scipy", "onnxruntime", "openvino", "ai-edge-litert", "faiss-cpu", "bitsandbytes",
    "torchao", "llama-cpp-python", "gguf", "aqlm", "numba", "numkong",
    "larq-compute-engine",
)  # fmt: skip


class Run:
    """Measures the groups of some suites and stores what it has after each."""

    def __init__(
        self,
        names: list[str],
        options: Options,
        rates: Rates | CudaRates,
        path: Path | None = None,
        suites: Mapping[str, tuple[Any, type[Any]]] = SUITES,
    ) -> None:
        """Chooses the groups; nothing is measured yet.

        Args:
            names: of suites.
            options: what is asked of them.
            rates: of this machine, measured just now.
            path: the file to store into, or None.
            suites: those that the names are of.
        """
        self.groups: list[tuple[str, Group]] = [(name, group) for name in names for group in suites[name][0](options)]
        self.records: list[Record] = []
        self.left_out: list[LeftOut] = []
        self._suites: dict[str, Suite] = {name: suites[name][1](options, rates) for name in names}
        self._machine = machine_facts() | {"rates": rates.to_dict()}
        self._missing = missing(options.threads) if suites is SUITES else {}
        self._threads = options.threads
        self._path = path
        self._store()

    def steps(self) -> Iterator[None]:
        """Measures one group at each step, with the threads asked for; the count of before is put back at the end."""
        before = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        try:
            for name, group in self.groups:
                records, left_out = self._suites[name].measure(group)
                self.records += records
                self.left_out += left_out
                self._store()
                yield
        finally:
            torch.set_num_threads(before)

    def _store(self) -> None:
        """Writes the file anew beside the old one and puts it in its place: an interruption leaves one of the two."""
        if self._path is None:
            return
        content = {"machine": self._machine, "missing": self._missing, "left_out": list(map(str, self.left_out))}
        lines = ",\n".join(json.dumps(_rounded(record)) for record in self.records)
        part = self._path.with_name(self._path.name + ".part")
        part.write_text(f'{json.dumps(content, indent=1)[:-2]},\n "records": [\n{lines}\n ]\n}}\n')
        part.replace(self._path)


def missing(threads: int) -> dict[str, str]:
    """Peers that cannot run here, and why."""
    rows = (*PEERS["linear"], *PEERS["conv"], *CODED, *product.peers(), *BINARY["linear"], *BINARY["conv"], *FLAT)
    reasons = {row.name: row.missing(row.batches[0], threads) for row in rows}
    return {name: reason for name, reason in reasons.items() if reason}


def machine_facts() -> dict[str, Any]:
    """What a figure depends on besides the code."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "caches_kib": caches_kib(),
        "load_average": list(os.getloadavg()),
        "isa": _native.cpu_active(),
        "isa_detected": _native.cpu_detected(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "compiler": _native.build_facts()["compiler"],
        **{name: found for name in PACKAGES if (found := _version(name))},
    }


def table(records: list[Record]) -> Table:
    """One row for each record, the fastest of its case marked."""
    columns = (
        "suite",
        "case",
        "weight",
        "density",
        "batch",
        "threads",
        "cache",
        "implementation",
        "p30 ms",
        "spread ms",
    )
    result = Table(*columns, "of its limit", "")
    fastest: dict[tuple[Any, ...], float] = {}
    for record in records:
        case = case_of(record)
        fastest[case] = min(fastest.get(case, float("inf")), record["p30_ms"])
    for record in records:
        row = [record["suite"], record["case"], record["pattern"], f"{record['density']:.2f}", str(record["batch"])]
        row += [str(record["threads"]), record["cache"], record["implementation"]]
        row += [f"{record['p30_ms']:.4g}", f"{record['spread_ms']:.2g}", f"{record['fraction_of_limit']:.0%}"]
        result.add_row(*row, "fastest" if record["p30_ms"] == fastest[case_of(record)] else "")
    return result


def case_of(record: Record) -> tuple[Any, ...]:
    """What records must have in common to be compared."""
    return tuple(
        record[name] for name in ("suite", "case", "pattern", "density", "batch", "active", "cache", "threads")
    )


def _rounded(record: Record) -> Record:
    return {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in record.items()}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
