"""Reads kernels from a library: registers and memory as cuobjdump reports them, instructions as nvdisasm does."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

# Instructions that are counted: products on tensor cores of every generation, and asynchronous copies.
WATCHED = r"[A-Z]*MMA[.\w]*|LDGSTS[.\w]*"
OF_SHARED_MEMORY = r"LDSM?|STSM?|ATOMS"
INSTRUCTION = re.compile(
    rf"^\.text\.(?P<name>\S+):|^\s*/\*\w+\*/\s+(?:@!?\w+\s+)?(?:(?P<opcode>{WATCHED})|(?P<shared>{OF_SHARED_MEMORY})\b)",
    re.MULTILINE,
)
RESOURCES = re.compile(r"Function (\S+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
THREADS = re.compile(
    r"^\.nv\.info\.(?P<name>\S+)|Attribute:\s*EIATTR_MAX_THREADS\s+Format:.*\s+Value:\s*(?P<sizes>0x.*)", re.MULTILINE
)
MADE_BY = re.compile(r"Tool Version:.*V([\d.]+)")
SYSTEM_SHARED = 1024  # bytes that sm_90 and later count in a kernel that uses shared memory


@dataclass(frozen=True)
class Kernel:
    """One kernel on one architecture."""

    name: str  # as the linker knows it
    architecture: int
    registers: int
    threads: int  # the most of a block, from __launch_bounds__; 0 is without
    shared: int  # static
    dynamic: bool  # it uses shared memory and declares none
    local: int  # bytes of stack and local memory, where spilled registers go
    opcodes: dict[str, int] = field(default_factory=dict)


def parse(architecture: int, resources: str, instructions: str) -> list[Kernel]:
    """The kernels in what `cuobjdump -elf -res-usage` and `nvdisasm -c` print of one file."""
    threads: dict[str, int] = {}
    name = ""
    for match in THREADS.finditer(resources):
        if match["name"]:
            name = match["name"]
        else:
            x, y, z = (int(size, 16) for size in match["sizes"].split())
            threads[name] = x * y * z
    opcodes: dict[str, Counter[str]] = {}
    uses_shared: set[str] = set()
    for match in INSTRUCTION.finditer(instructions):
        if match["name"]:
            name = match["name"]
        elif match["shared"]:
            uses_shared.add(name)
        else:
            opcodes.setdefault(name, Counter())[match["opcode"]] += 1
    kernels = []
    for name, registers, stack, shared, local in RESOURCES.findall(resources):
        own = int(shared) - (SYSTEM_SHARED if architecture >= 90 and int(shared) else 0)
        kernels.append(
            Kernel(
                name,
                architecture,
                int(registers),
                threads.get(name, 0),
                own,
                own == 0 and name in uses_shared,
                int(stack) + int(local),
                dict(sorted(opcodes.get(name, Counter()).items())),
            )
        )
    return kernels


@dataclass(frozen=True)
class Library:
    """What a library holds: kernels, architectures that have PTX for later ones, version of the compiler."""

    kernels: list[Kernel]
    ptx: list[int]
    nvcc: str


def read(library: Path, processes: int = 2) -> Library:
    """Every kernel of a library, in so many processes at a time."""
    cuobjdump, nvdisasm = (tool(name) for name in ("cuobjdump", "nvdisasm"))
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(processes) as pool:
        _output([cuobjdump, "-xelf", "all", str(library.resolve())], folder)
        cubins = sorted(Path(folder).glob("*.cubin"), key=lambda path: path.stat().st_size, reverse=True)

        def read_file(path: Path) -> tuple[list[Kernel], str]:
            resources = _output([cuobjdump, "-elf", "-res-usage", str(path)], folder)
            instructions = _output([nvdisasm, "-c", "-ndf", str(path)], folder)
            made_by = MADE_BY.search(resources)
            architecture = re.search(r"\.sm_(\d+)\w*\.cubin$", path.name)
            assert architecture is not None
            return parse(int(architecture[1]), resources, instructions), made_by[1] if made_by else ""

        found = list(pool.map(read_file, cubins))
        ptx = re.findall(r"\.sm_(\d+)", _output([cuobjdump, "-lptx", str(library.resolve())], folder))
    return Library(
        [kernel for kernels, _ in found for kernel in kernels],
        sorted(set(map(int, ptx))),
        ", ".join(sorted({version for _, version in found})),
    )


def holds_cuda(library: Path) -> bool:
    """Whether a library has code for GPUs, asked without NVIDIA's tools."""
    return b".nv_fatbin" in library.read_bytes()


def tool(name: str) -> str:
    """Path of cuobjdump or nvdisasm: on PATH, or from the package nvidia-cuda-NAME."""
    if on_path := shutil.which(name):
        return on_path
    try:
        found = [str(path.locate()) for path in files(f"nvidia-cuda-{name}") or () if path.name == name]
    except PackageNotFoundError:
        found = []
    if not found:
        raise SystemExit(f"check_cuda_kernels: {name} reads the built kernels, found none; pip install -e '.[dev]'")
    if not os.access(found[0], os.X_OK):
        os.chmod(found[0], 0o755)
    return found[0]


def readable(names: list[str]) -> dict[str, tuple[str, str]]:
    """(source without suffix, kernel without namespaces and parameters) of each mangled name."""
    text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    found = {}
    for name, line in zip(names, text.splitlines(), strict=True):
        source = re.search(r"_GLOBAL__N__.*?_\d+_(\w+?)_cu_", name)
        kernel = re.sub(r"\(anonymous namespace\)::|tersetorch::|^void ", "", line).replace("> >", ">>")
        found[name] = source[1] if source else "", kernel[: kernel.index("(")] if "(" in kernel else kernel
    return found


def _output(command: list[str], folder: str) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"check_cuda_kernels: {' '.join(command)} failed: {done.stderr.strip()}")
    return done.stdout
