"""What `make dist` makes, once for all tests."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
BUILT = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
FILES = ("CHANGELOG.md", "CMakeLists.txt", "LICENSE", "MANIFEST.in", "README.md", "constraints.txt", "pyproject.toml")


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    """A copy of what the repository holds, so that this tree's own build stays as it is; its path has a space."""
    copy = tmp_path_factory.mktemp("a tree")
    for name in ("csrc", "python", "bench"):
        shutil.copytree(ROOT / name, copy / name, ignore=BUILT)
    for name in (*FILES, "setup.py", "Makefile"):
        shutil.copy(ROOT / name, copy)
    (copy / ".venv").symlink_to(sys.prefix)
    return copy


@pytest.fixture(scope="session")
def building(tmp_path_factory):
    """The environment that builds run in: one CUDA architecture, and C++ files from ccache where there is one."""
    folder = tmp_path_factory.mktemp("temporary")
    environment = os.environ | {"CUDAARCHS": "90", "TMPDIR": str(folder)}
    if ccache := shutil.which("ccache"):
        environment |= {f"CMAKE_{language}_COMPILER_LAUNCHER": ccache for language in ("CXX", "CUDA")}
        environment |= {"CCACHE_BASEDIR": str(tmp_path_factory.getbasetemp()), "CCACHE_NOHASHDIR": "1"}
    return environment


@pytest.fixture(scope="session")
def dist(tree, building):
    """The folder of what the documented command makes."""
    command = ["make", "--old-file", "venv", "dist"]
    done = subprocess.run(command, cwd=tree, env=building, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return tree / "dist"


@pytest.fixture(scope="session")
def sdist(dist):
    (path,) = dist.glob("*.tar.gz")
    return path
