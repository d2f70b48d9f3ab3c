import pytest

from tersetorch import _native
from tersetorch.bench import rates


def test_rates_are_positive_and_consistent(tiny):
    found = rates.measure(threads=2, quick=True)
    assert found.threads == 2
    assert list(found.arithmetic) == _native.cpu_levels()
    assert all(rate > 0 for level in found.arithmetic.values() for rate in level.values())
    assert all("float32" in level for level in found.arithmetic.values())
    sizes, speeds = zip(*found.reads, strict=True)
    assert sizes == (2**14, 2**15, 2**16)
    assert list(speeds) == sorted(speeds, reverse=True) and speeds[-1] == found.memory > 0
    assert rates.table(found).row_count == sum(map(len, found.arithmetic.values())) + 3


def test_limits_take_the_slower_of_arithmetic_and_bytes(measured):
    assert measured.peak("bfloat16", "avx2") == 20  # as float32, where the level has no bfloat16
    assert measured.peak("int8", "avx2") == 40
    assert [measured.read(size) for size in (1, 2**14, 2**20 - 1, 2**20, 2**30)] == [100, 100, 100, 50, 10]
    assert measured.limit_ms(20e6, 100, "float32", "avx2", cold=False) == (pytest.approx(1.0), "arithmetic")
    assert measured.limit_ms(1, 2**20, "float32", "avx2", cold=False) == (pytest.approx(2**20 / 50e6), "bytes")
    assert measured.limit_ms(1, 2**20, "float32", "avx2", cold=True) == (pytest.approx(2**20 / 10e6), "bytes")


def test_an_evictor_reads_more_than_the_last_cache(tiny, monkeypatch):
    monkeypatch.setattr(rates, "caches_kib", lambda: {"L1 data": 1, "L2 unified": 24})
    evict = rates.Evictor(2)
    assert evict.nbytes == 2**16  # the most it may be
    evict()
    monkeypatch.setattr(rates, "LARGEST", 2**30)
    monkeypatch.setattr(rates, "caches_kib", lambda: {"L3 unified": 2**14 + 2**13})
    assert rates.Evictor(1).nbytes == 2**24 * 15 // 8
