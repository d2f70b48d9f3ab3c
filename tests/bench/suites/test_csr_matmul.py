import pytest
import torch

from tersetorch.bench.suites import csr_matmul as suite


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(suite, "SHAPES", [(64, 96), (32, 40), (16, 16)])
    monkeypatch.setattr(suite, "BATCHES", [1, 3])
    monkeypatch.setattr(suite, "QUICK_SECONDS", 0.001)


def test_records_say_what_was_measured(small):
    threads = torch.get_num_threads()
    records = suite.run(1, quick=True)
    assert torch.get_num_threads() == threads
    names = {r["implementation"] for r in records}
    assert names >= {"torch F.linear fp32", "torch sparse csr", "tersetorch csr", "tersetorch csr codebook"}
    assert len(records) == 2 * 2 * len(names)
    for record in records:
        assert record["suite"] == "csr_matmul" and record["threads"] == 1 and record["density"] == 0.1
        assert 0 < record["p30_ms"] <= record["median_ms"]
        assert 0 <= record["max_error"] <= suite.MAX_ERROR
        assert record["fraction_of_limit"] > 0
    dense, ours = (
        next(r for r in records if r["implementation"] == name and r["shape"] == [64, 96])
        for name in ("torch F.linear fp32", "tersetorch csr")
    )
    assert dense["bytes"] == 64 * 96 * 4 and dense["ops"] == 2 * 64 * 96
    assert ours["bytes"] == 65 * 4 + 8 * ours["ops"] // 2


def test_a_wrong_result_is_never_timed(small, monkeypatch):
    monkeypatch.setattr(suite, "csr_matmul_inference", lambda x, offsets, *rest: x.new_zeros(len(x), len(offsets) - 1))
    with pytest.raises(RuntimeError, match=r"tersetorch csr must be within 0\.0001 of float64, got 1\.0"):
        suite.run(1, quick=True)
