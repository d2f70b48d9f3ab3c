import heapq

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tersetorch import _native


def counts_of(symbols, alphabet):
    return np.bincount(symbols, minlength=alphabet).astype(np.uint64)


def unlimited_bits(counts):
    """Bits of an optimal code without a length limit, by Huffman's own construction."""
    heap = [int(count) for count in counts if count]
    if len(heap) == 1:
        return heap[0]
    heapq.heapify(heap)
    bits = 0
    while len(heap) > 1:
        pair = heapq.heappop(heap) + heapq.heappop(heap)
        bits += pair
        heapq.heappush(heap, pair)
    return bits


def limited_bits(counts, limit=15):
    """Bits of an optimal code of at most `limit` bits, by dynamic programming over the leaves of each level."""
    weights = sorted((int(count) for count in counts if count), reverse=True)
    n = len(weights)
    prefix = np.concatenate([[0], np.cumsum(weights)])
    # best[done, slots]: `done` heaviest symbols have codes, `slots` nodes are open at this level.
    best = {(0, 1): 0}
    for _ in range(limit):
        following = {}
        for (done, slots), bits in best.items():
            opened = min(2 * slots, n - done)
            cost = bits + int(prefix[n] - prefix[done])
            for leaves in range(opened + 1):
                key = (done + leaves, opened - leaves)
                if cost < following.get(key, 1 << 62):
                    following[key] = cost
        best = following
    return min(bits for (done, _), bits in best.items() if done == n)


@pytest.mark.parametrize("alphabet", [1, 2, 3, 17, 256, 4096, 65536])
@pytest.mark.parametrize("count", [0, 1, 2, 7, 1009])
def test_decode_inverts_encode_and_size_is_exact(alphabet, count):
    rng = np.random.default_rng(alphabet + count)
    symbols = np.minimum(rng.geometric(0.1, count) - 1, alphabet - 1).astype(np.uint16)
    data = _native.huffman_encode(symbols, alphabet)
    assert len(data) == _native.huffman_size(counts_of(symbols, alphabet))
    np.testing.assert_array_equal(_native.huffman_decode(data, alphabet, count), symbols)


@pytest.mark.parametrize("count", [4095, 4096, 4097, 20011])
@pytest.mark.parametrize("chance", [0.9, 0.5, 0.1, 0.002])
def test_many_symbols_of_short_and_long_codes(chance, count):
    # From the 4,096th on, runs of codes are looked up together; codes of more than 11 bits are not among them.
    rng = np.random.default_rng(count)
    symbols = np.minimum(rng.geometric(chance, count) - 1, 2999).astype(np.uint16)
    data = _native.huffman_encode(symbols, 3000)
    np.testing.assert_array_equal(_native.huffman_decode(data, 3000, count), symbols)
    with pytest.raises(ValueError, match="data must hold every code, got fewer"):
        _native.huffman_decode(data[:-8], 3000, count)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(0, n - 1), max_size=400))))
def test_any_symbols_round_trip(case):
    alphabet, symbols = case[0], np.array(case[1], dtype=np.uint16)
    data = _native.huffman_encode(symbols, alphabet)
    assert len(data) == _native.huffman_size(counts_of(symbols, alphabet))
    np.testing.assert_array_equal(_native.huffman_decode(data, alphabet, len(symbols)), symbols)


@pytest.mark.parametrize("seed", range(5))
def test_codes_are_as_short_as_an_unlimited_huffman_code(seed):
    symbols = (np.random.default_rng(seed).normal(32, 8, 5000).clip(0, 63)).astype(np.uint16)
    data = _native.huffman_encode(symbols, 64)
    payload = len(data) - _native.huffman_table_size(data, 64)
    assert payload == (unlimited_bits(counts_of(symbols, 64)) + 7) // 8


@pytest.mark.parametrize("symbols", [16, 18, 20])
def test_limited_codes_are_optimal_under_the_limit(symbols):
    counts = np.ones(symbols, dtype=np.uint64)
    for i in range(2, symbols):
        counts[i] = counts[i - 1] + counts[i - 2]  # Fibonacci: the deepest tree there is, symbols - 1 levels
    data = _native.huffman_encode(np.repeat(np.arange(symbols, dtype=np.uint16), counts.astype(int)), symbols)
    payload = len(data) - _native.huffman_table_size(data, symbols)
    assert payload == (limited_bits(counts) + 7) // 8
    assert limited_bits(counts) >= unlimited_bits(counts)


def test_one_symbol_alone_costs_one_bit_each():
    data = _native.huffman_encode(np.zeros(80, dtype=np.uint16), 1)
    assert len(data) == _native.huffman_table_size(data, 1) + 10
    with pytest.raises(ValueError, match="must hold every code"):
        _native.huffman_decode(data, 1, 81)


def test_every_symbol_of_the_largest_code():
    symbols = np.arange(32768, dtype=np.uint16)
    data = _native.huffman_encode(symbols, 65536)
    assert len(data) - _native.huffman_table_size(data, 65536) == 32768 * 15 // 8
    np.testing.assert_array_equal(_native.huffman_decode(data, 65536, 32768), symbols)
    with pytest.raises(ValueError, match="tell 32768 symbols apart, got 32769"):
        _native.huffman_encode(np.arange(32769, dtype=np.uint16), 65536)


def test_a_smooth_table_costs_about_two_bits_a_symbol():
    symbols = np.random.default_rng(0).normal(32, 10, 20000).clip(0, 63).astype(np.uint16)
    assert _native.huffman_table_size(_native.huffman_encode(symbols, 64), 64) <= 20


@pytest.mark.parametrize(
    "table,alphabet,match",
    [
        ("111", 3, "whole code table"),
        ("", 1, "code table of 1 symbols, got 0 bits"),
        ("000", 3, "fill the code exactly, got 49152 of 32768"),
        ("10000", 3, "fill the code exactly, got 24576 of 32768"),
        ("1111111" + "100", 2, r"must lie in \[0, 15\], got 16"),
        ("00" + "000001", 2, "must end in zero bits"),
    ],
)
def test_tables_that_are_no_prefix_code_are_refused(table, alphabet, match):
    data = np.packbits(np.array(list(table), dtype=str) == "1", bitorder="little").tobytes()
    with pytest.raises(ValueError, match=match):
        _native.huffman_decode(data, alphabet, 0)


def test_damaged_streams_are_refused():
    symbols = np.random.default_rng(0).integers(0, 5, 100).astype(np.uint16)
    data = _native.huffman_encode(symbols, 5)
    for end in range(len(data)):
        with pytest.raises(ValueError, match="huffman"):
            _native.huffman_decode(data[:end], 5, 100)
    with pytest.raises(ValueError, match="must end after the last code"):
        _native.huffman_decode(data + b"\0", 5, 100)
    with pytest.raises(ValueError, match="must end after the last code"):
        _native.huffman_decode(data, 5, 90)
    with pytest.raises(ValueError, match="must hold count codes"):
        _native.huffman_decode(data, 5, 2**62)
    with pytest.raises(ValueError, match=r"alphabet must lie in \[0, 65536\], got 65537"):
        _native.huffman_decode(data, 65537, 1)
    with pytest.raises(ValueError, match="code table of 60000 symbols"):
        _native.huffman_decode(data, 60000, 1)
    with pytest.raises(ValueError, match=r"symbols must lie in \[0, 3\], got 4"):
        _native.huffman_encode(symbols, 4)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=64), st.integers(0, 300), st.integers(0, 600))
def test_any_bytes_decode_or_are_refused(data, alphabet, count):
    try:
        symbols = _native.huffman_decode(data, alphabet, count)
    except ValueError:
        return
    assert len(symbols) == count
    assert not count or symbols.max() < alphabet
