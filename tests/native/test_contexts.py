import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tersetorch import _native

# rows, channels, kernel, width of the kernel
GRIDS = [(1, 1, 1, 1), (1, 7, 1, 1), (5, 1, 9, 3), (7, 3, 6, 2), (13, 11, 1, 1), (4, 3, 49, 7), (101, 17, 9, 3)]


def sizes_of(grid):
    return int(np.prod(grid[:3])), *grid[1:]


def kept_of(grid, density, seed=0):
    rng = np.random.default_rng(seed)
    return np.flatnonzero(rng.random(int(np.prod(grid[:3]))) < density).astype(np.int64)


def symbols_of(count, width, seed=0):
    middle = 1 << (width - 1)
    drawn = np.random.default_rng(seed).laplace(middle, middle / 4, count)
    return drawn.round().clip(0, 2 * middle - 1).astype(np.uint8)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("density", [0, 0.02, 0.4, 1])
def test_positions_round_trip(grid, density):
    positions = kept_of(grid, density)
    data = _native.contexts_encode_positions(positions, *sizes_of(grid))
    if len(positions) <= 4096 * len(data):
        found = _native.contexts_decode_positions(data, len(positions), *sizes_of(grid))
        np.testing.assert_array_equal(found, positions)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("density", [0.02, 0.4, 1])
@pytest.mark.parametrize("width", [1, 2, 5, 8])
@pytest.mark.parametrize("center", [0, 1])
def test_symbols_round_trip(grid, density, width, center):
    positions = kept_of(grid, density)
    if not len(positions):
        positions = np.array([0], np.int64)
    symbols = symbols_of(len(positions), width)
    arguments = (*sizes_of(grid), width, center << (width - 1))
    data = _native.contexts_encode_symbols(symbols, positions, *arguments)
    if not data:  # of a few symbols; save writes them by another coder
        return
    found = _native.contexts_decode_symbols(data, len(symbols), positions, *arguments)
    np.testing.assert_array_equal(found, symbols)
    if density == 1:  # no positions mean all
        everywhere = np.zeros(0, np.int64)
        assert _native.contexts_encode_symbols(symbols, everywhere, *arguments) == data
        found = _native.contexts_decode_symbols(data, len(symbols), everywhere, *arguments)
        np.testing.assert_array_equal(found, symbols)


def test_noise_costs_its_entropy_and_structure_less():
    grid = (64, 64, 9, 3)
    positions = kept_of(grid, 0.3)
    bits = 64 * 64 * 9 * 0.8813  # of a share of 0.3
    assert len(_native.contexts_encode_positions(positions, *sizes_of(grid))) < 1.01 * bits / 8
    crosses = np.zeros((64, 64, 3, 3), bool)
    crosses[:, :, 1, :] = True
    crosses[::5] = False
    structured = np.flatnonzero(crosses).astype(np.int64)
    assert len(_native.contexts_encode_positions(structured, *sizes_of(grid))) < 0.02 * bits / 8
    symbols = symbols_of(len(positions), 8)
    counts = np.bincount(symbols, minlength=256).astype(np.uint64)
    plain = len(_native.contexts_encode_symbols(symbols, positions, *sizes_of(grid), 8, 128))
    assert plain < 1.02 * _native.rans_size(counts)
    scaled = np.where(positions // 576 % 2, 128 + (symbols.astype(int) - 128) // 8, symbols).astype(np.uint8)
    counts = np.bincount(scaled, minlength=256).astype(np.uint64)
    by_rows = len(_native.contexts_encode_symbols(scaled, positions, *sizes_of(grid), 8, 128))
    assert by_rows < 0.95 * _native.rans_size(counts)


def test_damaged_streams_are_refused_or_give_positions_inside():
    grid = (20, 10, 9, 3)
    positions = kept_of(grid, 0.3)
    data = _native.contexts_encode_positions(positions, *sizes_of(grid))
    for end in range(0, len(data) - 4):
        with pytest.raises(
            ValueError, match=r"contexts: data must mark|range coder: data must hold every bit|items a byte"
        ):
            _native.contexts_decode_positions(data[:end], len(positions), *sizes_of(grid))
    with pytest.raises(ValueError, match="data must end after the last bit"):
        _native.contexts_decode_positions(data + bytes(5), len(positions), *sizes_of(grid))
    for count in (len(positions) - 1, len(positions) + 1, 0):
        with pytest.raises(ValueError, match="must mark"):
            _native.contexts_decode_positions(data, count, *sizes_of(grid))
    with pytest.raises(ValueError, match="items a byte"):
        _native.contexts_decode_positions(data, 1 << 60, *sizes_of(grid))


@settings(max_examples=300, deadline=None)
@given(
    st.binary(max_size=60),
    st.sampled_from(GRIDS[:6]),
    st.floats(0, 1),
    st.integers(1, 8),
    st.integers(0, 256),
)
def test_noise_is_refused_or_decodes_to_what_may_stand_there(data, grid, density, width, center):
    positions = kept_of(grid, density)
    try:
        found = _native.contexts_decode_positions(data, len(positions), *sizes_of(grid))
        assert (np.diff(found) > 0).all() and (not len(found) or 0 <= found[0] <= found[-1] < np.prod(grid[:3]))
    except ValueError:
        pass
    try:
        found = _native.contexts_decode_symbols(data, len(positions), positions, *sizes_of(grid), width, center)
        assert len(found) == len(positions) and (found >> width == 0).all()
    except ValueError:
        pass


@pytest.mark.parametrize(
    ("grid", "positions", "match"),
    [
        ((0, 1, 1, 1), [0], "size must lie in"),
        ((12, 0, 1, 1), [0], "channels must lie in"),
        ((12, 5, 1, 1), [0], "size must be rows of channels of kernels, got 12 for 5 channels of 1 places"),
        ((12, 1, 4, 3), [0], "size must be rows of channels of kernels"),
        ((12, 1, 2, 4), [0], "kernel_width must lie in"),
        ((12, 3, 1, 1), [3, 3], r"must rise in \[0, 12\), got 3"),
        ((12, 3, 1, 1), [12], r"must rise in \[0, 12\), got 12"),
        ((12, 3, 1, 1), [-1], r"must rise in \[0, 12\), got -1"),
    ],
)
def test_bad_arguments_are_refused(grid, positions, match):
    places = np.array(positions, np.int64)
    with pytest.raises(ValueError, match=match):
        _native.contexts_encode_positions(places, *grid)
    with pytest.raises(ValueError, match=match):
        _native.contexts_encode_symbols(np.zeros(len(places), np.uint8), places, *grid, 4, 8)
    with pytest.raises(ValueError, match=match):
        _native.contexts_decode_symbols(b"\1\2\3\4", len(places), places, *grid, 4, 8)


def test_symbols_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"symbols must lie in \[0, 3\], got 4"):
        _native.contexts_encode_symbols(np.array([4], np.uint8), np.array([0], np.int64), 1, 1, 1, 1, 2, 2)
    with pytest.raises(ValueError, match=r"a symbol for each of 1 places, got 2"):
        _native.contexts_encode_symbols(np.array([1, 1], np.uint8), np.array([0], np.int64), 4, 4, 1, 1, 2, 2)
    with pytest.raises(ValueError, match=r"width must lie in \[1, 8\], got 9"):
        _native.contexts_decode_symbols(b"", 0, np.zeros(0, np.int64), 1, 1, 1, 1, 9, 2)
