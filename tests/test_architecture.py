"""The rooms of the project and who may use whom."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "python" / "tersetorch"
KERNELS = ROOT / "csrc" / "kernels"

# A room imports itself and the rooms before it.
ORDER = [
    "ops",
    "formats",
    "nn",
    "methods",
    "costs",
    "conversion",
    "storage",
    "zoo",
    "recipes",
    "reports",
    "bench",
    "cli",
]
FOLDERS = {room: ROOT / "bench" if room == "bench" else PACKAGE / room for room in ORDER}

# Headers that a native room never includes.
FRAMEWORKS = r"torch|ATen|c10|Python|pybind11"
FORBIDDEN_INCLUDES = {
    "kernels": FRAMEWORKS + r"|codec|native|thread|mutex|string>|vector|memory|stdexcept|iostream|new>",
    "codec": FRAMEWORKS + r"|native",
    "torch": r"Python|pybind11|ATen|c10|native|codec"
    r"|torch/(?!csrc/stable|headeronly|codebook_weight|common|cuda|fixed|fixed_product|images|samples|signs|sign_tables)",
    "native": r"torch|ATen|c10",
}


def imported_modules(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def includes(file):
    return re.findall(r'^\s*#include\s+([<"][^>"]+[>"])', file.read_text(), re.MULTILINE)


def ops():
    """Folders of kernels, but for what all of them share and what is no op: loops for benches, clusters for methods."""
    shared = ("common", "panels", "planes", "machine_rates", "line_kmeans", "vector_kmeans")
    return sorted(folder.name for folder in KERNELS.iterdir() if folder.name not in shared)


def test_every_folder_is_a_room_with_its_question():
    found = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert found == set(ORDER) - {"bench"}
    for folder in FOLDERS.values():
        docstring = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
        assert docstring and "?" in docstring, f"{folder}/__init__.py must open with the room's question"


@pytest.mark.parametrize("room", ORDER)
def test_room_imports_only_rooms_before_it(room):
    allowed = ORDER[: ORDER.index(room) + 1]
    for file in FOLDERS[room].rglob("*.py"):
        used = {m.split(".")[1] for m in imported_modules(file) if m.startswith("tersetorch.")} & set(ORDER)
        assert used <= set(allowed), f"{file.relative_to(ROOT)} imports {sorted(used - set(allowed))}"


def test_only_ops_calls_the_dispatcher():
    for file in PACKAGE.rglob("*.py"):
        if PACKAGE / "ops" not in file.parents:
            assert "torch.ops.tersetorch" not in file.read_text(), f"{file.relative_to(ROOT)}: use tersetorch.ops"


def test_no_room_hides_a_public_function():
    public = {
        alias.asname or alias.name
        for node in ast.parse((PACKAGE / "__init__.py").read_text()).body
        if isinstance(node, ast.ImportFrom) and node.module != "tersetorch"
        for alias in node.names
    }
    assert not public & set(ORDER)


@pytest.mark.parametrize("room", FORBIDDEN_INCLUDES)
def test_native_room_includes_only_what_it_may(room):
    forbidden = re.compile(f'[<"]({FORBIDDEN_INCLUDES[room]})')
    for file in (ROOT / "csrc" / room).rglob("*.*"):
        for header in includes(file):
            assert not forbidden.match(header), f"{file.relative_to(ROOT)} includes {header}"


def test_instruction_set_files_include_only_intrinsics_and_their_contract():
    # An op's _simd.h holds what its levels share, local to each file; .ci/check_isa_objects sees that it stays so.
    files = [f for f in KERNELS.rglob("*.*") if re.search(r"_(avx2|avx512|avx512bf16)\.cpp$|_simd\.h$", f.name)]
    assert files
    for file in files:
        op = file.parent.name
        names = ("vectors", "code_vectors", "fixed_sums", "philox", "sign_counts", "sign_tiles")
        shared = {f'"kernels/common/{name}.h"' for name in names}
        allowed = {"<immintrin.h>", "<cstdint>", *shared}
        allowed |= {f'"kernels/{op}/{op}.h"', f'"kernels/{op}/{op}_simd.h"'}
        assert set(includes(file)) <= allowed, f"{file.relative_to(ROOT)} may include only {sorted(allowed)}"


@pytest.mark.parametrize("op", ops())
def test_one_name_all_the_way_down(op):
    for path in (
        f"csrc/kernels/{op}/{op}.h",
        f"csrc/kernels/{op}/{op}.cpp",
        f"csrc/kernels/{op}/{op}_scalar.cpp",
        f"csrc/torch/{op}.cpp",
        f"python/tersetorch/ops/{op}.py",
        f"tests/kernels/test_{op}.cpp",
        f"tests/ops/test_{op}.py",
    ):
        assert (ROOT / path).is_file(), f"{op} needs {path}"
    assert re.search(rf'm\.def\(\s*"{op}\(', (ROOT / "csrc/torch/library.cpp").read_text())


def test_every_cuda_contract_says_what_the_card_allows_and_what_was_reached():
    """Its two numbers, bytes and operations, beside the card's limits."""
    for op in ops():
        contract = (KERNELS / op / f"{op}_cuda.h").read_text().partition("#pragma once")[0]
        cost = " ".join(contract.partition("// Cost:")[2].replace("//", "").split())
        assert re.search(r"\bus\b", cost) and re.search("took|ot measured", cost), f"{op}_cuda.h must say its cost"
