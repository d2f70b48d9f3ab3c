import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tersetorch import _native

CODERS = ("gaps", "gaps-huffman", "gaps-rans")


def random_positions(seed, size, density):
    return np.flatnonzero(np.random.default_rng(seed).random(size) < density).astype(np.int64)


def all_gap_sizes(positions):
    return {
        (coder, width): len(_native.encode_gaps(positions, coder, width)) for width in range(1, 16) for coder in CODERS
    }


@pytest.mark.parametrize("width", [1, 2, 5, 15])
@pytest.mark.parametrize("coder", CODERS)
@pytest.mark.parametrize(
    "size,density", [(0, 0), (1, 0), (1, 1), (8, 1), (9, 1), (1009, 0.02), (1009, 0.9), (99991, 1e-3)]
)
def test_gaps_round_trip(width, coder, size, density):
    positions = random_positions(0, size, density)
    data = _native.encode_gaps(positions, coder, width)
    decoded = _native.decode_gaps(data, coder, width, len(positions), size)
    np.testing.assert_array_equal(decoded, positions)


@pytest.mark.parametrize("size,density", [(0, 0), (1, 0), (1, 1), (7, 0.5), (8, 1), (9, 1), (1009, 0.3)])
def test_bitmaps_round_trip(size, density):
    positions = random_positions(1, size, density)
    data = _native.encode_bitmap(positions, size)
    assert len(data) == (size + 7) // 8
    np.testing.assert_array_equal(_native.decode_bitmap(data, len(positions), size), positions)
    expected = np.packbits(np.isin(np.arange(size), positions), bitorder="little")
    assert data == expected.tobytes()


def test_gap_symbols_of_the_eie_example():
    # Han et al., EIE (2016), section 3: [0,0,1,2,0 x18,3] has zero runs [2,0,15,2], the 15 a padding zero. There the
    # padding is an entry of its own, so it stands for 16 positions; a filler here stands for its 15 zeros only.
    positions = np.array([2, 3, 22], dtype=np.int64)
    symbols = _native.read_bits(_native.encode_gaps(positions, "gaps", 4), 4, 4)
    assert symbols.tolist() == [2, 0, 15, 3]


@pytest.mark.parametrize("size,density", [(1, 0), (500, 0.5), (5000, 0.08), (20000, 0.003), (300, 1.0)])
def test_best_gaps_is_the_smallest_and_its_size_exact(size, density):
    positions = random_positions(2, size, density)
    sizes = all_gap_sizes(positions)
    coder, width, expected = _native.best_gaps(positions)
    found = sizes[coder, width]
    # The size of rANS is an estimate.
    assert abs(found - expected) <= (8 if coder == "gaps-rans" else 0)
    assert found <= min(sizes.values()) + 8


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 200_000), unique=True, max_size=60), st.integers(1, 15), st.sampled_from(CODERS))
def test_any_positions_round_trip(values, width, coder):
    positions = np.array(sorted(values), dtype=np.int64)
    size = 200_001
    decoded = _native.decode_gaps(_native.encode_gaps(positions, coder, width), coder, width, len(values), size)
    np.testing.assert_array_equal(decoded, positions)
    decoded = _native.decode_bitmap(_native.encode_bitmap(positions, size), len(values), size)
    np.testing.assert_array_equal(decoded, positions)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=64), st.integers(1, 6), st.sampled_from(CODERS), st.integers(0, 600), st.integers(0, 2000))
def test_any_bytes_decode_to_rising_positions_or_are_refused(data, width, coder, count, size):
    for decode in (
        lambda: _native.decode_gaps(data, coder, width, count, size),
        lambda: _native.decode_bitmap(data, count, size),
    ):
        try:
            positions = decode()
        except ValueError:
            continue
        assert len(positions) == count
        assert (np.diff(positions) > 0).all()
        assert not count or (positions[0] >= 0 and positions[-1] < size)


@pytest.mark.parametrize("coder", CODERS)
def test_damaged_gaps_are_refused(coder):
    positions = random_positions(3, 500, 0.2)
    count = len(positions)
    data = _native.encode_gaps(positions, coder, 3)
    for end in range(len(data)):
        with pytest.raises(ValueError, match=r"positions|huffman|count codes|rans|range coder|items a byte"):
            _native.decode_gaps(data[:end], coder, 3, count, 500)
    with pytest.raises(ValueError, match="must end after the last"):
        _native.decode_gaps(data + b"\0", coder, 3, count, 500)
    with pytest.raises(ValueError, match=rf"must lie in \[0, {positions[-1]}\), got one beyond"):
        _native.decode_gaps(data, coder, 3, count, int(positions[-1]))
    with pytest.raises(ValueError, match=r"must hold count codes|items a byte"):
        _native.decode_gaps(data, coder, 3, 2**61, 2**47)
    with pytest.raises(ValueError, match="coder must be gaps, gaps-huffman or gaps-rans, got bitmap"):
        _native.decode_gaps(data, "bitmap", 3, count, 500)
    with pytest.raises(ValueError, match=r"width must lie in \[1, 15\], got 16"):
        _native.decode_gaps(data, coder, 16, count, 500)


def test_a_run_of_fillers_past_the_end_is_refused():
    data = _native.write_bits(np.full(800, 3, dtype=np.uint32), 2)
    with pytest.raises(ValueError, match=r"must lie in \[0, 10\), got one beyond"):
        _native.decode_gaps(data, "gaps", 2, 1, 10)


@pytest.mark.parametrize(
    "data,count,size,match",
    [
        (b"\x01", 1, 9, "must be whole, got 1 bytes"),
        (b"\x01\x00", 1, 8, "must be whole, got 2 bytes"),
        (b"\x80", 1, 7, "must mark 1 positions below 7, got another"),
        (b"\x03", 1, 8, "must mark 1 positions below 8, got another"),
        (b"\x01", 2, 8, "must mark 2 positions, got 1"),
        (b"\x01", 9, 8, "must hold count codes"),
        (b"\x01", -1, 8, "must hold count codes"),
        (b"", 0, -1, "size must lie in"),
    ],
)
def test_damaged_bitmaps_are_refused(data, count, size, match):
    with pytest.raises(ValueError, match=match):
        _native.decode_bitmap(data, count, size)


@pytest.mark.parametrize("values", [[3, 3], [4, 2], [-1]])
def test_positions_that_do_not_rise_are_refused(values):
    positions = np.array(values, dtype=np.int64)
    for encode in (
        lambda: _native.encode_gaps(positions, "gaps", 4),
        lambda: _native.encode_bitmap(positions, 10),
        lambda: _native.best_gaps(positions),
    ):
        with pytest.raises(ValueError, match="must rise from 0"):
            encode()


def test_positions_outside_a_bitmap_are_refused():
    with pytest.raises(ValueError, match=r"must lie in \[0, 8\), got 8"):
        _native.encode_bitmap(np.array([8], dtype=np.int64), 8)
