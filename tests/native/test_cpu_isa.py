import pytest

from tersetorch import _native

LEVELS = ["scalar", "avx2", "avx512", "avx512bf16"]

# The level as each native piece sees it.
PROGRAM = """
import torch, tersetorch as tt
from tersetorch import _native
print(_native.cpu_active(), torch.ops.tersetorch.cpu_isa(), _native.cpu_forced())
"""


def test_levels_are_those_up_to_the_detected_one():
    assert _native.cpu_levels() == LEVELS[: LEVELS.index(_native.cpu_detected()) + 1]


@pytest.mark.parametrize("level", _native.cpu_levels())
def test_every_level_can_be_forced(run_python, level):
    done = run_python(PROGRAM, TERSETORCH_CPU_ISA=level)
    assert done.stdout.split() == [level, level, "True"], done.stderr


def test_unset_means_the_detected_level(run_python):
    done = run_python(PROGRAM, TERSETORCH_CPU_ISA="")
    assert done.stdout.split() == [_native.cpu_detected()] * 2 + ["False"], done.stderr


def test_unknown_level_stops_the_import(run_python):
    done = run_python("import tersetorch", TERSETORCH_CPU_ISA="sse9")
    assert done.returncode != 0
    assert "ImportError: tersetorch: TERSETORCH_CPU_ISA must be scalar, avx2, avx512 or avx512bf16, got 'sse9'" in (
        done.stderr
    )


def test_one_core_serves_both_pieces():
    with open("/proc/self/maps") as maps:
        mapped = {line.split()[-1] for line in maps if "libtersetorch_core" in line}
    assert len(mapped) == 1, mapped
