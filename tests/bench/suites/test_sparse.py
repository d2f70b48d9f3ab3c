import dataclasses
import math

import pytest
import torch

from tersetorch.bench import peers, records
from tersetorch.bench.cases import CASES, Conv, Linear
from tersetorch.bench.implementations import Implementation, Packed, max_error_of
from tersetorch.bench.options import Options
from tersetorch.bench.ours import OURS
from tersetorch.bench.peers import PEERS
from tersetorch.bench.suites import sparse
from tersetorch.bench.suites.sparse import Group, Sparse, groups

FIELDS = {
    *("suite", "case", "kind", "shape", "density", "pattern", "row_variation", "batch", "active", "cache", "threads"),
    *("isa", "implementation", "family", "mode", "min_ms", "p30_ms", "median_ms", "spread_ms", "samples", "pack_ms"),
    *("weight_bytes", "bytes", "ops", "limit_ms", "limit", "fraction_of_limit", "max_error"),
}
LINEAR = Linear("small", 48, 96)
CONV = Conv("small conv", 8, 6, 3, 7, stride=2, groups=2)


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(sparse, "SECONDS", 1e-4)
    monkeypatch.setattr(sparse, "QUICK_SECONDS", 1e-4)


def test_linear_records_say_what_was_measured(fast, measured):
    group = Group(LINEAR, 5, (0.1, 0.5))
    records, left_out = Sparse(Options(), measured).measure(group)
    assert not [row for row in left_out if row.wrong]
    names = {record["implementation"] for record in records}
    assert names >= {"torch F.linear float32", "torch sparse CSR", "scipy CSR", "tersetorch csr", "tersetorch blocked"}
    assert len(records) == 2 * len(names)
    for record in records:
        assert set(record) >= FIELDS
        assert record["suite"] == "sparse" and record["threads"] == 1 and record["batch"] == 5
        assert 0 < record["p30_ms"] <= record["median_ms"] and record["fraction_of_limit"] > 0
        assert record["pack_ms"] >= 0 and 0 <= record["max_error"] < 0.05
    dense, csr = (
        {r["density"]: r for r in records if r["implementation"] == name}
        for name in ("torch F.linear float32", "tersetorch csr")
    )
    assert dense[0.1]["p30_ms"] == dense[0.5]["p30_ms"]  # timed once
    assert dense[0.1]["ops"] == 2 * 5 * 48 * 96 and dense[0.1]["weight_bytes"] == 4 * 48 * 96
    assert dense[0.1]["bytes"] == 4 * (48 * 96 + 5 * 96 + 5 * 48)
    assert csr[0.1]["weight_bytes"] == 49 * 4 + 8 * csr[0.1]["ops"] // 10
    assert csr[0.1]["ops"] < csr[0.5]["ops"] < dense[0.1]["ops"]


def test_conv_records_compare_every_layout(fast, measured):
    records, left_out = Sparse(Options(), measured).measure(Group(CONV, 2, (0.5,)))
    assert not [row for row in left_out if row.wrong]
    names = {record["implementation"] for record in records}
    assert names >= {"torch F.conv2d float32", "torch F.conv2d float32 channels_last", "torch static int8 conv"}
    assert all(record["ops"] == 2 * 2 * 8 * 3 * 9 * 16 for record in records if record["family"] == "dense")
    assert records[0]["shape"] == [8, 3, 3, 3] and records[0]["image"] == [7, 7]


def test_cold_trained_and_inactive_groups(fast, tiny, measured):
    group = Group(LINEAR, 1, (0.3,), "trained", "cold", 0.4)
    assert group.label == "small, batch 1, 30%, trained, cold, 40% active"
    records, _ = Sparse(Options(implementations=("tersetorch csr*",)), measured).measure(group)
    names = {record["implementation"] for record in records}
    assert names == {f"tersetorch {layout}{values}" for layout in ("csr", "csr16") for values in ("", " codebook")}
    assert all(r["cache"] == "cold" and r["evicted_bytes"] > 0 and r["active"] == 0.4 for r in records)
    x = sparse._samples(dataclasses.replace(group, batch=64))
    assert (x != 0).float().mean().item() == pytest.approx(0.4, abs=0.03) and bool((x >= 0).all())


def wrong_by(change):
    return Implementation(
        "liar", "dense", "float32", lambda case, w, batch, threads: Packed(lambda x: lambda: change(x @ w.T), 1)
    )


@pytest.mark.parametrize(
    "change,error",
    [
        (torch.zeros_like, "got 1"),
        (lambda y: y * 1.001, "got 0.001"),
        (lambda y: y[:, :-1], "got inf"),
        (lambda y: y * math.nan, "got nan"),
    ],
)
def test_a_wrong_result_is_never_timed(fast, measured, monkeypatch, change, error):
    monkeypatch.setitem(PEERS, "linear", (wrong_by(change), peers.LINEAR[0]))
    records, left_out = Sparse(Options(), measured).measure(Group(LINEAR, 3, (0.5,)))
    assert {r["implementation"] for r in records if r["family"] != "ours"} == {"torch F.linear float32"}
    (refused,) = left_out
    assert refused.wrong and refused.implementation == "liar"
    assert "must be within 0.0001 of float64" in str(refused) and error in str(refused)


def test_a_peer_that_cannot_run_is_named_and_ours_may_not_fail(fast, measured, monkeypatch):
    def pack(case, weight, batch, threads):
        raise RuntimeError("needs a better CPU\nbacktrace")

    monkeypatch.setitem(PEERS, "linear", (Implementation("weak", "dense", "float32", pack),))
    _, (left_out,) = Sparse(Options(), measured).measure(Group(LINEAR, 3, (0.5,)))
    assert str(left_out) == "weak is left out of small, batch 3, 50%: needs a better CPU" and not left_out.wrong
    monkeypatch.setitem(OURS, "linear", (Implementation("ours", "ours", "float32", pack),))
    with pytest.raises(RuntimeError, match="needs a better CPU"):
        Sparse(Options(), measured).measure(Group(LINEAR, 3, (0.5,)))


def test_weights_are_packed_once_for_a_layer(fast, measured, monkeypatch):
    packs = []

    def pack(case, weight, batch, threads):
        packs.append((case.name, batch))
        return Packed(lambda x: lambda: x @ weight.T, weight.nbytes)

    rows = tuple(
        Implementation(f"ours {follows}", "ours", "float32", pack, follows_batch=follows) for follows in (0, 1)
    )
    monkeypatch.setitem(OURS, "linear", rows)
    suite = Sparse(Options(peers=("none",)), measured)
    for batch in (1, 2, 2):
        suite.measure(Group(LINEAR, batch, (0.5,)))
    assert packs == [("small", 1), ("small", 1), ("small", 2)]
    suite.measure(Group(Linear("other", 8, 8), 2, (0.5,)))
    assert len(packs) == 5


def test_filters_choose_groups_and_rows():
    assert {g.case.name for g in groups(Options(cases=("fc6", "RESNET 512*")))} == {"alexnet fc6", "resnet 512 at 7"}
    chosen = groups(Options(densities=(0.5,), batches=(2,), cases=("fc8",)))
    assert chosen == [Group(CASES["alexnet fc8"], 2, (0.5,))]
    chosen = groups(Options(batches=(2,), cases=("fc8",), full=True))
    assert {(g.batch, g.pattern) for g in chosen} == {(2, "random"), (2, "trained")}
    assert len(groups(Options(quick=True))) < len(groups(Options())) < len(groups(Options(full=True)))
    order = [g.case.name for g in groups(Options())]
    assert len(set(order)) == sum(a != b for a, b in zip(order, ["", *order], strict=False))  # each layer in one go
    assert {g.case.name for g in groups(Options(full=True))} == set(CASES)
    options = Options(peers=("onednn*", "scipy"), implementations=())
    assert options.takes("oneDNN packed float32", ours=False) and options.takes("scipy CSR", ours=False)
    assert not options.takes("torch sparse CSR", ours=False) and options.takes("tersetorch csr", ours=True)
    assert not Options(implementations=("csr",)).takes("tersetorch blocked", ours=True)


def test_what_is_missing_is_said(monkeypatch):
    row = Implementation("x", "dense", "float32", None, needs=("nothing_of_the_kind",), threads=1, batches=(4, 8))
    assert row.missing(4, 1) == "nothing_of_the_kind not installed (pip install 'tersetorch[bench]' has most of them)"
    assert dataclasses.replace(row, needs=()).missing(4, 2) == "uses 1 thread"
    assert dataclasses.replace(row, needs=()).missing(3, 1) == "meant for 4 to 8 samples"
    assert dataclasses.replace(row, needs=()).missing(4, 1) is None
    assert "scipy CSR" in records.missing(2)


def test_errors_are_relative_to_the_largest_result():
    want = torch.tensor([1.0, -4.0], dtype=torch.float64)
    assert max_error_of(torch.tensor([1.0, -3.0]), want) == 0.25
    assert math.isinf(max_error_of(torch.zeros(3), want))
