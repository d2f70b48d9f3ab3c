import dataclasses

import pytest
import torch

from tersetorch.bench.cases import CASES, Linear
from tersetorch.bench.coded_peers import CODED
from tersetorch.bench.implementations import Implementation, Packed
from tersetorch.bench.layers import Layers, Row
from tersetorch.bench.options import Options
from tersetorch.bench.suites import codebook
from tersetorch.bench.suites.codebook import BITS, Codebook, Group, groups

SMALL = Linear("small", 48, 96)


def test_groups_hold_every_row_that_is_asked_for():
    chosen = groups(Options())
    assert {group.batch for group in chosen} == {1, 8, 64, 256}
    assert {group.cache for group in chosen} == {"warm", "cold"}
    assert all(set(group.bits) <= set(BITS) for group in chosen)
    named = groups(Options(batches=(3,), cases=("fc7",)))
    assert [(group.case.name, group.batch, group.bits) for group in named] == [("alexnet fc7", 3, BITS)]
    assert {group.case.name for group in groups(Options(quick=True))} == {"alexnet fc7", "transformer ffn up"}
    assert len(groups(Options(full=True))) == 4 * sum(isinstance(case, Linear) for case in CASES.values())


def test_records_are_verified_and_whole(measured, monkeypatch):
    monkeypatch.setattr(codebook, "QUICK_SECONDS", 1e-4)
    suite = Codebook(Options(quick=True, peers=("F.linear",)), measured)
    records, left_out = suite.measure(Group(SMALL, 2, (3, 8)))
    assert not left_out
    dense = [record for record in records if record["family"] == "dense"]
    assert [record["pattern"] for record in dense] == ["3 bits", "8 bits"]  # timed once, shown twice
    assert dense[0]["p30_ms"] == dense[1]["p30_ms"] and dense[0]["ops"] == 2 * 2 * 48 * 96
    ours = {(record["pattern"], record["mode"]): record for record in records if record["family"] == "ours"}
    assert set(ours) == {(f"{bits} bits", mode) for bits in (3, 8) for mode in ("float32", "bfloat16", "int8")}
    assert ours["3 bits", "float32"]["max_error"] < 1e-6 and ours["3 bits", "int8"]["p30_ms"] > 0
    assert ours["8 bits", "float32"]["weight_bytes"] == 48 * 128 + 4 * 256


def measure_peer(measured, pack, **options):
    peer = Implementation("peer", "coded", "float32", pack, **options)
    layers = Layers("codebook", Options(quick=True), measured)
    return layers.measure(SMALL, 2, [Row(peer, torch.ones(48, 96), ("4 bits",))], "small, batch 2", 1e-4)


def test_a_peer_is_held_against_the_weight_that_it_holds(measured):
    def pack(case, weight, batch, threads):
        return Packed(lambda x: lambda: x @ (2 * weight).T, 1, held=2 * weight)

    (record,), left_out = measure_peer(measured, pack)
    assert record["max_error"] < 1e-6 and not left_out


def test_wrong_and_failing_peers_are_left_out_with_the_reason(measured):
    def fail(case, weight, batch, threads):
        raise RuntimeError("\nno such instruction\n")

    records, (wrong,) = measure_peer(measured, lambda *_: Packed(lambda x: lambda: x @ torch.zeros(96, 48), 1))
    assert not records and wrong.wrong and "must be within" in str(wrong)
    records, (failed,) = measure_peer(measured, fail)
    assert str(failed) == "peer is left out of small, batch 2: no such instruction"


def test_packed_weights_serve_the_next_batch_of_the_same_layer(measured):
    packed = []

    def pack(case, weight, batch, threads):
        packed.append(batch)
        return Packed(lambda x: lambda: x @ weight.T, 1)

    one = Implementation("peer", "coded", "float32", pack)
    layers = Layers("codebook", Options(quick=True), measured)
    row = Row(one, torch.ones(48, 96), ("4 bits",))
    for batch, one_row in ((1, row), (2, row), (2, dataclasses.replace(row, patterns=("2 bits",)))):
        layers.measure(SMALL, batch, [one_row], "", 1e-4)
    follows = Row(dataclasses.replace(one, follows_batch=True), torch.ones(48, 96), ("2 bits",))
    layers.measure(SMALL, 4, [follows], "", 1e-4)
    assert packed == [1, 2, 4]


@pytest.mark.parametrize("peer", CODED, ids=lambda row: row.name)
def test_coded_peers_compute_what_they_hold(measured, peer):
    """Where they are installed; CI does without them."""
    if peer.missing(1, 1):
        pytest.skip(peer.missing(1, 1))
    case = Linear("small", 64, 256)
    layers = Layers("codebook", Options(quick=True), measured)
    records, left_out = layers.measure(case, 1, [Row(peer, torch.randn(case.shape), ("4 bits",))], "", 1e-4)
    assert not left_out and len(records) == 1
