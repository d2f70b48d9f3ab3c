import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tersetorch import _native


def floats(seed, count):
    return np.random.default_rng(seed).normal(0, 0.02, count).astype(np.float32).view(np.uint32).astype(np.uint64)


def check(patterns, width):
    data = _native.numbers_encode(patterns, width)
    np.testing.assert_array_equal(_native.numbers_decode(data, width, len(patterns)), patterns)
    return len(data)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from([8, 16, 32, 64]).flatmap(
        lambda width: st.tuples(st.just(width), st.lists(st.integers(0, (1 << width) - 1), min_size=1, max_size=50))
    ),
    st.integers(0, 63),
    st.booleans(),
)
def test_any_numbers_round_trip(case, zeros, rising):
    width, numbers = case
    kept = [number >> min(zeros, width - 1) << min(zeros, width - 1) for number in numbers]
    check(np.array(sorted(kept) if rising else kept, np.uint64), width)


def test_what_trained_numbers_take():
    assert check(floats(0, 1000), 32) < 0.89 * 4000  # an exponent's 8 bits as 3
    rounded = floats(0, 1000) >> np.uint64(16) << np.uint64(16)
    assert check(rounded, 32) < 0.78 * 2000  # no more than the bfloat16 numbers that they are
    assert check(np.sort(floats(0, 256)), 32) < 0.68 * 1024  # the order is not written
    assert check(np.full(1000, 0x3F800000, np.uint64), 32) < 16


def test_no_numbers():
    assert len(_native.numbers_decode(_native.numbers_encode(np.zeros(0, np.uint64), 32), 32, 0)) == 0


@pytest.mark.parametrize("rising", [False, True])
def test_damaged_streams_are_refused(rising):
    numbers = np.sort(floats(1, 50)) if rising else floats(1, 50)
    data = _native.numbers_encode(numbers, 32)
    for end in range(len(data) - 4):
        with pytest.raises(ValueError, match=r"range coder: data must hold every bit|numbers: |items a byte"):
            _native.numbers_decode(data[:end], 32, 50)
    with pytest.raises(ValueError, match="must end after the last bit"):
        _native.numbers_decode(data + bytes(5), 32, 50)
    with pytest.raises(ValueError, match="items a byte"):
        _native.numbers_decode(data, 32, 1 << 60)
    with pytest.raises(ValueError, match=r"width must lie in \[8, 64\], got 65"):
        _native.numbers_decode(data, 65, 50)
    with pytest.raises(ValueError, match="patterns must fit 16 bits, got more"):
        _native.numbers_encode(numbers, 16)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=100), st.sampled_from([8, 16, 32, 64]), st.integers(0, 300))
def test_noise_is_refused_or_decodes(data, width, count):
    try:
        found = _native.numbers_decode(data, width, count)
    except ValueError:
        return
    assert len(found) == count and (width == 64 or (found >> np.uint64(width) == 0).all())
