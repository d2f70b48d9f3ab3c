"""The CUDA bench without a GPU: the same rows on the CPU, with a clock that only calls."""

import json

import pytest
import torch

from tersetorch.bench.cases import Conv, Flat, Linear
from tersetorch.bench.cuda import problems, suite
from tersetorch.bench.cuda.problems import FAMILIES, Problem
from tersetorch.bench.cuda.rates import Rates, table
from tersetorch.bench.cuda.suite import Cuda
from tersetorch.bench.implementations import MAX_ERROR
from tersetorch.bench.options import Options
from tersetorch.cli.bench import bench

RATES = Rates("a GPU", 1000, 2000.0, {"float32": 5e4, "bfloat16": 8e5, "int8": 1.5e6}, 1e-3)
COPIES = {}


@pytest.fixture(autouse=True)
def small_layers(monkeypatch):
    small = (
        Linear("a linear", 24, 1024),
        Conv("a conv", 8, 6, 3, 5),
        Flat("a flat", 6, 6, 3, 5),
        problems.Table("an embedding", 30, 24),
        problems.Numbers("a rounding", 70),
    )
    monkeypatch.setattr(problems, "ALL_CASES", {case.name: case for case in small})
    layers = {family: (f"a {family.rpartition('_')[2]}",) for family in ("conv", "xnor_conv", "codebook_conv", "flat")}
    layers |= {"embedding": ("an embedding",), "rounding": ("a rounding",)}
    monkeypatch.setattr(problems, "LAYERS", {family: ("a linear",) for family in FAMILIES} | layers)


def clock(candidates, seconds):
    COPIES.update({name: len(calls) for name, calls in candidates.items()})
    for calls in candidates.values():
        assert all(torch.equal(call(), calls[0]()) for call in calls)
    times = {"min_ms": 1.0, "p30_ms": 2.0, "median_ms": 2.0, "spread_ms": 0.1, "samples": 7}
    return dict.fromkeys(candidates, times)


def measured(family, **options):
    asked = Options(**options)
    bench_of = Cuda(asked, RATES, "cpu", clock)
    return [bench_of.measure(group) for group in problems.groups(family, asked)]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_row_is_compared_and_recorded(family):
    ours, groups = {}, measured(family, batches=(1, 20))
    for records, left_out in groups:
        assert not any(reason.wrong for reason in left_out)
        for record in records:
            assert record["max_error"] is None or record["max_error"] <= MAX_ERROR[record["mode"]]
            assert record["fraction_of_limit"] == pytest.approx(record["limit_ms"] / 2.0)
            json.dumps(record)
        ours |= {r["implementation"]: r["mode"] for r in records if r["family"] == "ours"}
    names = {
        "codebook": {"codebook exact", "codebook bfloat16", "codebook int8"},
        "sparse": {"csr float32", "csr bfloat16", "bitmap float32", "bitmap bfloat16", "bitmap int8"},
        "product": {"product exact", "product int8"},
        "conv": {"conv exact", "conv bfloat16", "conv int8"},
        "xnor": {
            *(f"xnor{way}" for way in ("", " bfloat16", ", packed x", ", packed x, signs out")),
            "signs by float32",
            "signs by 8-bit pixels",
        },
        "xnor_conv": {f"xnor{way}" for way in ("", " bfloat16 channels_last", ", packed x", ", packed x, signs out")},
        "codebook_conv": {"conv exact", "conv bfloat16", "conv int8"},
        "embedding": {"embedding float32", "embedding bfloat16"},
        "flat": {f"flat {dtype}{order}" for dtype in ("float32", "bfloat16") for order in ("", " channels_last")},
        "fixed": {"fixed int8", "fixed int16"},
        "rounding": {"nearest", "stochastic", "stochastic, int16 out"},
    }
    assert ours.keys() == {f"tersetorch {name}" for name in names[family]}
    forms = {"codebook": 4, "sparse": 2, "product": 4, "codebook_conv": 2, "embedding": 2}
    assert len(groups) == 2 * forms.get(family, 1)


def test_copies_overflow_the_cache_but_not_the_memory():
    measured("sparse", batches=(1,), densities=(0.02,))
    assert COPIES["F.linear float32"] == 1 and COPIES["tersetorch bitmap int8"] == 2
    assert max(COPIES.values()) <= suite.MAX_COPIES


def test_a_wrong_result_of_ours_is_not_timed(monkeypatch):
    def other(group, device):
        problem = real(group, device)
        return Problem(**{**vars(problem), "codebook": problem.codebook + 1})

    real = problems.problem_of
    monkeypatch.setattr(suite, "problem_of", other)
    (records, left_out), *_ = measured("codebook", batches=(1,))
    assert all(record["family"] == "dense" for record in records)
    assert {reason.implementation for reason in left_out if reason.wrong} == {
        "tersetorch codebook exact",
        "tersetorch codebook bfloat16",
        "tersetorch codebook int8",
    }


def test_the_limit_is_the_larger_of_bytes_and_operations():
    assert RATES.limit_ms(0, 2 * 10**9, "int8") == (1.0, "bytes")
    assert RATES.limit_ms(5e10, 10**6, "float32") == (1.0, "arithmetic")
    assert table(RATES).row_count == 5


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_so():
    with pytest.raises(RuntimeError, match="--device cuda needs a GPU"):
        bench(device="cuda", json_file=None)
