"""tersetorch doctor: what this build and this machine have, and whether every op is right at every level."""

import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

import tersetorch
from tersetorch import _native
from tersetorch.ops.self_check import check_ops

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
EXTRAS = {
    "matplotlib": "pictures (pip install 'tersetorch[report]')",
    "scikit-learn": "the demo's data without a download (pip install 'tersetorch[demo]')",
    **{
        peer: "a peer of the benches (pip install 'tersetorch[bench]')"
        for peer in ("scipy", "onnxruntime", "openvino", "ai-edge-litert")
    },
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
    """Facts of the build and the machine, and the checks of every level."""
    present = _native.cpu_levels()
    flags = _cpu_flags()
    return {
        "tersetorch": tersetorch.__version__,
        "torch": torch.__version__,
        "built_against_torch": _native.build_facts()["torch"],
        "compiler": _native.build_facts()["compiler"],
        "threads": torch.get_num_threads(),
        "native_pieces": {piece.name: piece.stat().st_size for piece in Path(tersetorch.__file__).parent.glob("*.so")},
        "levels": present,
        "active_level": _native.cpu_active(),
        "missing_for_level": {
            level: [flag for flag in needed if flag not in flags]
            for level, needed in LEVEL_FLAGS.items()
            if level not in present
        },
        "cuda_architectures": _native.build_facts()["cuda_architectures"],
        "missing_for_cuda": _missing_for_cuda(),
        "missing_extras": {name: use for name, use in EXTRAS.items() if not _installed(name)},
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


def _installed(distribution: str) -> bool:
    try:
        version(distribution)
    except PackageNotFoundError:
        return False
    return True


def _print(facts: dict[str, Any]) -> None:
    console = Console()
    console.print(
        f"tersetorch {facts['tersetorch']} on torch {facts['torch']} (built against {facts['built_against_torch']}, "
        f"{facts['compiler']}), {facts['threads']} threads"
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
    console.print(f"cuda: kernels for {built or 'no device'}; {facts['missing_for_cuda'] or 'a device is there'}")
    for name, use in facts["missing_extras"].items():
        console.print(f"{name}: not installed; needed for {use}", markup=False)
