import numpy as np
import pytest

from tersetorch import _native


def test_every_level_multiplies_and_reads():
    for level in _native.cpu_levels():
        rates = {name: _native.arithmetic_rate(name, level, 1e-4) for name in ("float32", "bfloat16", "int8", "binary")}
        assert rates["float32"] > 0
        assert (rates["bfloat16"] > 0) == (level == "avx512bf16")
        assert rates["binary"] > 0
        assert (rates["int8"] > 0) == (level != "scalar")
        assert _native.read_rate(np.ones(5000, np.uint8), level, 1e-4) > 0
    _native.read(np.ones(5000, np.uint8))
    _native.read(np.ones(1, np.uint8))


@pytest.mark.parametrize(
    "call,match",
    [
        (lambda: _native.arithmetic_rate("float64", "scalar", 1e-4), "float32, bfloat16, int8 or binary, got float64"),
        (lambda: _native.arithmetic_rate("int8", "sse9", 1e-4), r"level must be one of cpu_levels\(\), got sse9"),
        (lambda: _native.arithmetic_rate("int8", "scalar", 0), r"seconds must lie in \(0, 60\], got 0"),
        (lambda: _native.arithmetic_rate("int8", "scalar", float("nan")), r"seconds must lie in \(0, 60\], got"),
        (lambda: _native.read_rate(np.ones(1023, np.uint8), "scalar", 1e-4), "at least 1024 bytes, got 1023"),
        (lambda: _native.read_rate(np.ones(2048, np.uint8), "scalar", 61), r"seconds must lie in \(0, 60\], got 61"),
    ],
)
def test_wrong_arguments_give_a_sentence(call, match):
    with pytest.raises(ValueError, match=match):
        call()
