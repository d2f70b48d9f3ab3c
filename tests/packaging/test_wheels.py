"""Wheels with and without CUDA, built from a copy of the tree, and what runs from them on this machine's torch.

Two builds, of which one with nvcc for one architecture: 160 s of CPU time where ccache has the C++ files, most of it
nvcc and doctor; 12 minutes beside ten other processes on two cores.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
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


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of what the repository holds, so that this tree's own build stays as it is."""
    copy = tmp_path_factory.mktemp("tree")
    for name in ("csrc", "python", "bench"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info"))
    for name in (
        "CMakeLists.txt",
        "LICENSE",
        "MANIFEST.in",
        "README.md",
        "constraints.txt",
        "pyproject.toml",
        "setup.py",
    ):
        shutil.copy(ROOT / name, copy)
    return copy


@pytest.fixture(scope="module", params=["0", "1"])
def wheel(request, tree, tmp_path_factory):
    """(whether with CUDA, path): what the documented command makes."""
    if request.param == "1" and not shutil.which("nvcc"):
        pytest.skip("no nvcc")
    folder = tmp_path_factory.mktemp("dist")
    environment = {"TERSETORCH_CUDA": request.param, "CUDAARCHS": "90"}
    if ccache := shutil.which("ccache"):
        environment |= {f"CMAKE_{language}_COMPILER_LAUNCHER": ccache for language in ("CXX", "CUDA")}
        environment |= {"CCACHE_BASEDIR": str(tree), "CCACHE_NOHASHDIR": "1"}
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", folder, tree]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.iterdir()
    return request.param == "1", path


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


def test_the_name_tells_the_wheels_apart(wheel):
    cuda, path = wheel
    assert re.fullmatch(r"tersetorch-\d+\.\d+\.\d+(\+cuda\d+)?-cp\d+-cp\d+-linux_\w+\.whl", path.name)
    assert ("+cuda" in path.name) == cuda


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


def test_it_needs_no_library_of_cuda_and_is_of_a_sane_size(wheel, installed):
    cuda, path = wheel
    pieces = sorted((installed / "tersetorch").glob("*.so"))
    assert len(pieces) == 3
    for piece in pieces:
        told = subprocess.run(["readelf", "-d", piece], capture_output=True, text=True, check=True).stdout
        needed = set(re.findall(r"\(NEEDED\).*\[([^\]]+?)\.so", told))
        assert needed <= ALLOWED, piece.name
        assert re.findall(r"\((?:RUNPATH|RPATH)\).*\[(.*)\]", told) == ["$ORIGIN"]
    assert path.stat().st_size < (12 if cuda else 5) * 2**20
    names = zipfile.ZipFile(path).namelist()
    assert not [name for name in names if not name.startswith(("tersetorch/", "tersetorch-"))]
