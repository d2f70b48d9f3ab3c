"""tersetorch doctor: what this build and this machine have, and whether every op is right at every level."""

import json
import os
import platform
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

import tersetorch
from tersetorch import _native
from tersetorch.conversion.machine import machine_facts
from tersetorch.ops.self_check import check_ops
from tersetorch.storage.container import VERSION, VERSIONS

PACKAGE = Path(tersetorch.__file__).parent

# What /proc/cpuinfo calls the instructions of each level.
LEVEL_FLAGS = {
    "scalar": [],
    "avx2": ["avx2", "fma", "f16c", "popcnt"],
    "avx512": [
        "avx512f",
        "avx512bw",
        "avx512vl",
        "avx512dq",
        "avx512vbmi",
        "avx512_vbmi2",
        "avx512_vnni",
        "avx512_bitalg",
        "avx512_vpopcntdq",
    ],
    "avx512bf16": ["avx512_bf16"],
}
# What needs the packages of each optional dependency; those of "dev" and "docs" are for who changes the project.
EXTRAS = {
    "report": "pictures and pages of reports",
    "demo": "tersetorch demo",
    "bench": "peers of tersetorch bench",
    "larq": "tersetorch.storage.read_larq",
    "onnx": "tersetorch.storage.export_onnx",
}
CHECK_PROGRAM = "import json, sys; from tersetorch.ops.self_check import check_ops; json.dump(check_ops(), sys.stdout)"


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the facts as JSON instead of tables.")] = False,
) -> None:
    """Runs every op at every level this CPU has against the reference; exit code 1 when one is wrong."""
    facts = examine()
    if as_json:
        print(json.dumps(facts, indent=1))
    else:
        _print(facts)
    if not all(check["ok"] for checks in facts["checks"].values() for check in checks):
        raise typer.Exit(1)


def examine() -> dict[str, Any]:
    """Facts of the build and the machine, and the checks of every level; public names, which stay."""
    build = _native.build_facts()
    present = _native.cpu_levels()
    flags = _cpu_flags()
    return {
        "tersetorch": tersetorch.__version__,
        "package_folder": str(PACKAGE),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": machine_facts()["cpu"],
        "cpus": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "built_against_torch": build["torch"],
        "torch_abi": build["torch_abi"],
        "compiler": build["compiler"],
        "build_type": build["build_type"],
        "native_pieces": {piece.name: piece.stat().st_size for piece in sorted(PACKAGE.glob("*.so"))},
        "file_versions_read": [int(each) for each in VERSIONS],
        "file_version_written": VERSION,
        "compiled_levels": list(LEVEL_FLAGS),
        "levels": present,
        "active_level": _native.cpu_active(),
        "level_is_forced": _native.cpu_forced(),
        "missing_for_level": {
            level: [flag for flag in needed if flag not in flags]
            for level, needed in LEVEL_FLAGS.items()
            if level not in present
        },
        "cuda_architectures": build["cuda_architectures"],
        "cuda_compiler": build["cuda_compiler"] or None,
        "torch_cuda": torch.version.cuda,
        "missing_for_cuda": _missing_for_cuda(),
        "packages": _packages(),
        "checks": {level: _check(level) for level in present},
    }


def _check(level: str) -> list[dict[str, Any]]:
    """The ops' checks at a level, which a process chooses once, at its start."""
    if level == _native.cpu_active():
        return check_ops()
    environment = os.environ | {"TERSETORCH_CPU_ISA": level}
    done = subprocess.run(
        [sys.executable, "-c", CHECK_PROGRAM], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return [{"op": "all", "case": f"process ended: {reason}", "max_error": None, "bound": None, "ok": False}]
    checks: list[dict[str, Any]] = json.loads(done.stdout)
    return checks


def _missing_for_cuda() -> str | None:
    """Why no op runs on a CUDA device here; None where they do."""
    if not _native.build_facts()["cuda_architectures"]:
        return "the kernels were not built; install nvcc and build again with TERSETORCH_CUDA=1"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; install one with it"
    if not torch.cuda.is_available():
        return "torch finds no device; it needs a GPU and NVIDIA's driver"
    return None


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.split(":")[1].split()) for line in lines if line.startswith("flags")), set())


def _packages() -> dict[str, dict[str, Any]]:
    """Versions of what the package asks for, None for what is missing, and the extras that need it; none: all of it."""
    found: dict[str, dict[str, Any]] = {}
    for requirement in requires("tersetorch") or []:
        name = re.split(r"[^\w.-]", requirement)[0]
        extra = re.search(r"extra == ['\"](\w+)['\"]", requirement)
        if extra is not None and extra[1] not in EXTRAS:
            continue
        package = found.setdefault(name, {"version": _version(name), "extras": []})
        package["extras"] += [extra[1]] if extra else []
    return found


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _print(facts: dict[str, Any]) -> None:
    console = Console()
    console.print(
        f"tersetorch {facts['tersetorch']} in {facts['package_folder']}: files of version "
        f"{' and '.join(map(str, facts['file_versions_read']))} are read, {facts['file_version_written']} written",
        markup=False,
    )
    console.print(
        f"torch {facts['torch']}; built against {facts['built_against_torch']} for {facts['torch_abi']} and later by "
        f"{facts['compiler']}, {facts['build_type']}",
        markup=False,
    )
    console.print(
        f"Python {facts['python']}, {facts['platform']}, {facts['cpu']}: {facts['cpus']} CPUs, "
        f"{facts['threads']} threads",
        markup=False,
    )
    table = Table("level", "op", "case", "largest error", "allowed", "")
    for level, checks in facts["checks"].items():
        name = f"{level} (in use)" if level == facts["active_level"] else level
        for check in checks:
            error, bound = (
                f"{value:.2g}" if value is not None else "-" for value in (check["max_error"], check["bound"])
            )
            table.add_row(name, check["op"], check["case"], error, bound, "ok" if check["ok"] else "[bold red]WRONG")
    console.print(table)
    for level, missing in facts["missing_for_level"].items():
        reason = f"this CPU lacks {', '.join(missing)}" if missing else "the level before it is missing"
        console.print(f"{level}: not run, {reason}")
    built = ", ".join(f"sm_{architecture}" for architecture in facts["cuda_architectures"])
    compiler = f" by {facts['cuda_compiler']}" if facts["cuda_compiler"] else ""
    console.print(
        f"cuda: kernels for {built or 'no device'}{compiler}; {facts['missing_for_cuda'] or 'a device is there'}"
    )
    found = {name: package["version"] for name, package in facts["packages"].items() if package["version"]}
    console.print(f"installed: {', '.join(f'{name} {number}' for name, number in found.items())}", markup=False)
    absent: dict[tuple[str, ...], list[str]] = {}
    for name, package in facts["packages"].items():
        if name not in found:
            absent.setdefault(tuple(package["extras"]), []).append(name)
    for extras, names in absent.items():
        uses = " and ".join(f"{EXTRAS[extra]} (pip install 'tersetorch[{extra}]')" for extra in extras)
        console.print(f"not installed: {', '.join(names)}; needed for {uses or 'tersetorch itself'}", markup=False)
