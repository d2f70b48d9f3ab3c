import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tersetorch import _native


def counts_of(symbols, alphabet):
    return np.bincount(symbols, minlength=alphabet).astype(np.uint64)


def entropy_bytes(counts):
    share = counts[counts > 0] / counts.sum()
    return -(share * np.log2(share)).sum() * counts.sum() / 8


def laplacian(seed, alphabet, count):
    drawn = np.random.default_rng(seed).laplace(alphabet / 2, max(1, alphabet / 12), count)
    return drawn.round().clip(0, alphabet - 1).astype(np.uint16)


@pytest.mark.parametrize("alphabet", [1, 2, 3, 17, 256, 4096, 65536])
# Around the four states taking turns, and where one state becomes four.
@pytest.mark.parametrize("count", [0, 1, 2, 5, 1009, 2047, 2048, 2049, 2050, 2051, 5003])
def test_decode_inverts_encode_and_size_is_close(alphabet, count):
    symbols = laplacian(alphabet + count, alphabet, count)
    data = _native.rans_encode(symbols, alphabet)
    assert abs(len(data) - _native.rans_size(counts_of(symbols, alphabet))) <= 8
    np.testing.assert_array_equal(_native.rans_decode(data, alphabet, count), symbols)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(0, n - 1), max_size=400))))
def test_any_symbols_round_trip(case):
    alphabet, symbols = case[0], np.array(case[1], dtype=np.uint16)
    data = _native.rans_encode(symbols, alphabet)
    np.testing.assert_array_equal(_native.rans_decode(data, alphabet, len(symbols)), symbols)


@pytest.mark.parametrize("skew", [0, 1, 2, 4])
@pytest.mark.parametrize("alphabet", [4, 300, 8192])
def test_any_counts_round_trip(alphabet, skew):
    """All used once and some very often: frequencies of 1, and what they take from the others."""
    rng = np.random.default_rng(alphabet)
    symbols = np.concatenate([np.arange(alphabet), (rng.random(20000) ** (1 + skew) * alphabet)]).astype(np.uint16)
    for order in (symbols, symbols[::-1].copy(), alphabet - 1 - symbols):
        data = _native.rans_encode(order.astype(np.uint16), alphabet)
        np.testing.assert_array_equal(_native.rans_decode(data, alphabet, len(order)), order)


@pytest.mark.parametrize("alphabet", [16, 32, 256])
def test_the_codes_are_within_a_thousandth_of_the_entropy(alphabet):
    symbols = laplacian(0, alphabet, 200_000)
    data = _native.rans_encode(symbols, alphabet)
    counts = counts_of(symbols, alphabet)
    table = _native.rans_table_size(data, alphabet)
    assert len(data) - table - 16 <= 1.001 * entropy_bytes(counts)
    assert table <= 10 + alphabet / 3
    assert len(data) < _native.huffman_size(counts)


def test_one_symbol_alone_costs_nothing_but_is_bounded():
    symbols = np.full(30_000, 3, np.uint16)
    data = _native.rans_encode(symbols, 5)
    assert len(data) <= 24
    np.testing.assert_array_equal(_native.rans_decode(data, 5, 30_000), symbols)
    with pytest.raises(ValueError, match="at most 4096 items a byte, got"):
        _native.rans_decode(data, 5, 4096 * len(data) + 1)


def test_too_many_symbols_are_refused():
    with pytest.raises(ValueError, match="at most 8192 symbols may be used, got 8193; write them in Huffman code"):
        _native.rans_encode(np.arange(8193, dtype=np.uint16), 65536)


def test_damaged_streams_are_refused():
    symbols = laplacian(0, 16, 3000)
    data = _native.rans_encode(symbols, 16)
    for end in range(len(data)):
        with pytest.raises(ValueError, match=r"rans|range coder"):
            _native.rans_decode(data[:end], 16, 3000)
    for more in (b"\0", b"\0\0", data):
        with pytest.raises(ValueError, match="must end after the last symbol"):
            _native.rans_decode(data + more, 16, 3000)
    for count in (2999, 2990, 0):
        with pytest.raises(ValueError, match="must end after the last symbol"):
            _native.rans_decode(data, 16, count)
    with pytest.raises(ValueError, match="items a byte"):
        _native.rans_decode(data, 16, 2**62)
    with pytest.raises(ValueError, match="items a byte"):
        _native.rans_decode(data, 16, -1)
    with pytest.raises(ValueError, match=r"alphabet must lie in \[0, 65536\], got 65537"):
        _native.rans_decode(data, 65537, 3000)


@settings(max_examples=400, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 300), st.data())
def test_no_damage_goes_unnoticed_or_crashes(seed, alphabet, draw):
    """Flipped bits are refused, or give other symbols of the alphabet; never a crash, a hang or a large allocation."""
    symbols = laplacian(seed, alphabet, 60)
    data = bytearray(_native.rans_encode(symbols, alphabet))
    for _ in range(draw.draw(st.integers(1, 4))):
        data[draw.draw(st.integers(0, len(data) - 1))] = draw.draw(st.integers(0, 255))
    try:
        found = _native.rans_decode(bytes(data), alphabet, 60)
    except ValueError:
        return
    assert len(found) == 60 and found.max() < alphabet


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=80), st.integers(0, 400), st.integers(0, 4000))
def test_noise_is_refused_or_decodes(data, alphabet, count):
    try:
        found = _native.rans_decode(data, alphabet, count)
    except ValueError:
        return
    assert len(found) == count and (count == 0 or found.max() < alphabet)
