import numpy as np
import pytest

from tersetorch.bench.reproduce.accounting import fixed_bytes, gap_counts, huffman_bytes


def test_gaps_of_eie():
    # The column 0 0 1 2 (18 zeros) 3 is stored with the zeros 2, 0, 15, 2 (EIE, section III.B).
    counts, fillers = gap_counts(np.array([2, 3, 22]), 4)
    assert fillers == 1
    assert {gap: int(count) for gap, count in enumerate(counts) if count} == {0: 1, 2: 2, 15: 1}


@pytest.mark.parametrize("bits", [1, 3, 5])
def test_gaps_lead_back_to_the_positions(bits):
    rng = np.random.default_rng(0)
    positions = np.flatnonzero(rng.random(5_000) < 0.05)
    counts, fillers = gap_counts(positions, bits)
    assert counts.sum() == len(positions) + fillers
    assert (counts * (np.arange(1 << bits) + 1)).sum() == positions[-1] + 1


def test_nothing_kept():
    counts, fillers = gap_counts(np.array([], np.int64), 4)
    assert fillers == 0 and not counts.any() and len(counts) == 16


def test_bytes():
    # 16 weights of 2 bits and 4 values: Deep Compression's example of 3.2 times less.
    assert 16 * 4 / fixed_bytes(16, 2, 0, 4) == pytest.approx(3.2)
    assert huffman_bytes(np.array([800, 100, 100])) == pytest.approx(1200 / 8, abs=8)
