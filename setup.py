"""Builds csrc/ with CMake; everything about the package itself is in pyproject.toml."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.egg_info import egg_info

ROOT = Path(__file__).parent.resolve()


def torch_version() -> str:
    """Version of the torch to build against; stops the build with one sentence when it is missing or too old."""
    try:
        found = version("torch") if find_spec("torch") else "none"
    except PackageNotFoundError:
        found = "none"
    if found == "none" or tuple(map(int, found.split(".")[:2])) < (2, 13):
        raise SystemExit(
            f"tersetorch: the build needs torch >= 2.13 in this environment, found {found}; run "
            "'pip install torch==2.13.0 setuptools cmake ninja pybind11', then install again with --no-build-isolation"
        )
    return found


def require_compiler() -> None:
    """Stops the build with one sentence when there is no C++ compiler."""
    requested = os.environ.get("CXX")
    # CXX may carry a wrapper or flags: "ccache g++ -O2".
    names = shlex.split(requested)[:1] if requested else ["c++", "g++", "clang++"]
    if not any(shutil.which(name) for name in names):
        raise SystemExit(
            f"tersetorch: the build needs a C++20 compiler, found none ({requested or 'c++, g++ or clang++'}); "
            "install one (Debian: 'apt-get install g++') or name it in CXX"
        )


def cuda_option() -> str:
    """Whether CMake builds the CUDA kernels; AUTO does where it finds a working nvcc."""
    requested = os.environ.get("TERSETORCH_CUDA", "AUTO")
    if requested not in ("AUTO", "0", "1"):
        raise SystemExit(
            f"tersetorch: TERSETORCH_CUDA must be 0, 1 or AUTO, got {requested!r}; unset it to build the CUDA kernels "
            "where nvcc is found"
        )
    return requested


def installed_nvcc() -> str | None:
    """Path of an nvcc that CMake finds by itself."""
    places = [os.environ.get("PATH", os.defpath), f"{os.environ.get('CUDA_PATH', '')}/bin"]
    return os.environ.get("CUDACXX") or shutil.which("nvcc", path=os.pathsep.join(places))


def packaged_nvcc() -> Path | None:
    """Path of the package nvidia-cuda-nvcc's, where it is installed in this environment."""
    spec = find_spec("nvidia")
    places = spec.submodule_search_locations if spec else None
    return next((path for place in places or () for path in sorted(Path(place).glob("cu*/bin/nvcc"))), None)


def cuda_environment() -> dict[str, str]:
    """What makes CMake find the packaged nvcc where it finds no other."""
    nvcc = packaged_nvcc()
    if installed_nvcc() or nvcc is None:
        return {}
    # The package has its libraries in lib; its nvcc looks in lib64.
    folders = [str(nvcc.parent.parent / "lib"), *filter(None, [os.environ.get("LIBRARY_PATH")])]
    return {"CUDACXX": str(nvcc), "LIBRARY_PATH": os.pathsep.join(folders)}


def version_suffix() -> str:
    """+cuda13 where CUDA kernels of that generation are asked for by name, so that their wheel is told from others."""
    if cuda_option() != "1":
        return ""
    nvcc = installed_nvcc() or packaged_nvcc()
    try:
        told = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout if nvcc else ""
    except OSError:
        told = ""
    release = re.search(r"release (\d+)", told)
    if release is None:
        raise SystemExit(
            f"tersetorch: TERSETORCH_CUDA=1 needs a working nvcc, found {nvcc or 'none'}; install the CUDA toolkit or "
            "the packages that docs/gpu.md names, or set TERSETORCH_CUDA=0"
        )
    return f"+cuda{release[1]}"


class EggInfo(egg_info):
    """Adds the suffix to the version that pyproject.toml names."""

    def finalize_options(self) -> None:
        """Sets it here: the setup.cfg inside an sdist, which asks for none, is read after setup()'s own options."""
        self.tag_build = SUFFIX
        super().finalize_options()


class CMakeBuild(build_ext):
    """Puts the three native pieces into the package. TERSETORCH_CUDA=1 or 0 builds or leaves out the CUDA kernels."""

    def run(self) -> None:
        """Configures and builds; the build folder is kept, so that the next build compiles only what changed."""
        require_compiler()
        missing = [tool for tool in ("cmake", "ninja") if shutil.which(tool) is None]
        missing += [] if find_spec("pybind11") else ["pybind11"]
        if missing:
            raise SystemExit(
                f"tersetorch: the build needs cmake, ninja and pybind11, found no {', '.join(missing)}; "
                f"run 'pip install {' '.join(missing)}'"
            )
        import pybind11

        editable = self.inplace or self.editable_mode
        package = (ROOT / "python" if editable else Path(self.build_lib).resolve()) / "tersetorch"
        # Where it really lies: GCC names its headers so, and that name is kept out of what is built.
        torch_dir = Path(find_spec("torch").origin).resolve().parent
        build = ROOT / "build" / sys.implementation.cache_tag
        options = {
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": package,
            "CMAKE_MAKE_PROGRAM": shutil.which("ninja"),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "TERSETORCH_TORCH_DIR": torch_dir,
            "TERSETORCH_TORCH_VERSION": torch_version(),
            "TERSETORCH_CUDA": cuda_option(),
        }
        defines = [f"-D{name}={value}" for name, value in options.items()]
        targets = ["--target", "tersetorch_ops", "_native"]  # not the kernel tests, which make puts there too
        for command in (["-S", ROOT, "-B", build, "-G", "Ninja", *defines], ["--build", build, *targets]):
            if subprocess.run(["cmake", *command], env=os.environ | cuda_environment(), check=False).returncode != 0:
                raise SystemExit("tersetorch: the native pieces did not compile; the compiler's message stands above")


torch_version()
SUFFIX = version_suffix()
setup(
    packages=[
        *find_packages("python"),
        "tersetorch.bench",
        *(f"tersetorch.bench.{package}" for package in find_packages("bench")),
    ],
    package_dir={"": "python", "tersetorch.bench": "bench"},
    ext_modules=[Extension("tersetorch._native", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "egg_info": EggInfo},
)
