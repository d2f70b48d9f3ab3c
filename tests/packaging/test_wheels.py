"""The wheels with and without CUDA, what is in them, and what runs from them on this machine's torch.

Two builds, of which one with nvcc for one architecture: 160 s of CPU time where ccache has the C++ files, most of it
nvcc and doctor; 12 minutes beside ten other processes on two cores.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow
# What any Linux with a C++ runtime has, torch, and our own pieces.
ALLOWED = {"libtersetorch_core", "libtorch_cpu", "libstdc++", "libgcc_s", "libm", "libc", "ld-linux-x86-64"}
PROGRAM = """
import json, torch, tersetorch as tt
from tersetorch import _native
linear, x = torch.nn.Linear(64, 32), torch.randn(3, 64)
keys = ("CPU", "CUDA")
print(json.dumps({
    "file": tt.__file__,
    "version": tt.__version__,
    "architectures": _native.build_facts()["cuda_architectures"],
    "error": float((tt.nn.SparseLinear.from_dense(linear)(x) - linear(x)).abs().max()),
    "registered": [torch._C._dispatch_has_kernel_for_dispatch_key("tersetorch::xnor_matmul", key) for key in keys],
}))
"""


@pytest.fixture(scope="module", params=[False, True], ids=["cpu", "cuda"])
def wheel(request, dist):
    """(whether with CUDA, path)."""
    found = [path for path in dist.glob("*.whl") if ("+cuda" in path.name) == request.param]
    if request.param and not found and not shutil.which("nvcc"):
        pytest.skip("no nvcc")
    (path,) = found
    return request.param, path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Where the wheel lies installed: a folder that comes before this environment's own packages."""
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, wheel[1]], check=True
    )
    return folder


def run(installed, *arguments):
    environment = os.environ | {"PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=installed, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_name_says_what_it_runs_on(wheel):
    """_native is built for one version of Python, everything for this processor and glibc from some version on."""
    cuda, path = wheel
    this = f"cp{sys.version_info.major}{sys.version_info.minor}"
    version = r"\d+\.\d+\.\d+" + (r"\+cuda\d+" if cuda else "")
    assert re.fullmatch(rf"tersetorch-{version}-{this}-{this}-manylinux_\d+_\d+_{platform.machine()}\.whl", path.name)


def test_it_holds_the_package_and_nothing_else(wheel, tree):
    _, path = wheel
    with zipfile.ZipFile(path) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        metadata = archive.read(next(name for name in names if name.endswith("/METADATA"))).decode()
    info = {name for name in names if name.partition("/")[0].endswith(".dist-info")}
    package = {f.relative_to(tree / "python").as_posix() for f in (tree / "python").rglob("*") if f.is_file()}
    bench = {f"tersetorch/bench/{f.relative_to(tree / 'bench').as_posix()}" for f in (tree / "bench").rglob("*.py")}
    egg = {name for name in package if ".egg-info/" in name}
    native = {name for name in names if name.endswith(".so")}
    results = {name for name in names if name.startswith("tersetorch/bench/") and not name.endswith(".py")}
    assert {Path(name).name for name in info} >= {"METADATA", "WHEEL", "RECORD", "LICENSE", "entry_points.txt"}
    assert names - info - native - results == package - egg | bench
    assert len(native) == 3
    assert re.search(r"^Requires-Dist: torch>=2\.13$", metadata, re.MULTILINE) and "Requires-Python: >=3.11" in metadata


def test_it_runs_on_this_torch(wheel, installed):
    cuda, path = wheel
    found = run(installed, "-c", PROGRAM)
    assert Path(found["file"]).parent.parent == installed
    assert found["version"] == path.name.split("-")[1]
    assert found["architectures"] == (["90"] if cuda else [])
    assert found["registered"] == [True, True]  # without CUDA kernels by a function that says so
    assert found["error"] < 1e-5


def test_doctor_says_what_was_built(wheel, installed):
    cuda, _ = wheel
    facts = run(installed, "-c", "from tersetorch.cli import main; main()", "doctor", "--json")
    assert facts["cuda_architectures"] == (["90"] if cuda else [])
    assert ("the kernels were not built" in (facts["missing_for_cuda"] or "")) == (not cuda)
    assert all(check["ok"] for checks in facts["checks"].values() for check in checks)


def test_it_needs_no_library_of_cuda_names_no_path_and_is_of_a_sane_size(wheel, installed, tree, building):
    pieces = sorted((installed / "tersetorch").glob("*.so"))
    assert len(pieces) == 3
    for piece in pieces:
        told = subprocess.run(["readelf", "-d", piece], capture_output=True, text=True, check=True).stdout
        needed = set(re.findall(r"\(NEEDED\).*\[([^\]]+?)\.so", told))
        assert needed <= ALLOWED, piece.name
        assert re.findall(r"\((?:RUNPATH|RPATH)\).*\[(.*)\]", told) == ["$ORIGIN"]
        content = piece.read_bytes()
        for path in (tree, building["TMPDIR"], torch.__path__[0]):
            assert str(path).encode() not in content, f"{piece.name} contains {path}"
    assert wheel[1].stat().st_size < (12 if wheel[0] else 5) * 2**20
