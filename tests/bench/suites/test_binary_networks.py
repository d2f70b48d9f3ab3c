import torch

from tersetorch.bench.options import Options
from tersetorch.bench.suites import binary_networks
from tersetorch.bench.suites.binary_networks import OURS, BinaryNetworks, Group, groups


def test_groups_follow_the_options():
    assert [(group.width, group.batch) for group in groups(Options())] == [(4096, 1), (4096, 100)]
    assert [group.batch for group in groups(Options(batches=(3,)))] == [3]
    assert groups(Options(cases=("alexnet",))) == []


def test_decisions_agree_and_records_are_whole(measured, monkeypatch):
    monkeypatch.setattr(binary_networks, "QUICK_SECONDS", 1e-3)
    records, left_out = BinaryNetworks(Options(quick=True), measured).measure(Group(70, 3))
    assert not left_out
    found = {record["implementation"]: record for record in records}
    assert found.keys() == {"torch F.linear float32", "oneDNN packed float32", "torch dynamic int8", OURS}
    assert found[OURS]["max_error"] == 0 and found[OURS]["mode"] == "binary"
    assert found[OURS]["ops"] == 2 * 3 * (784 * 70 + 2 * 70 * 70 + 700)
    assert found[OURS]["bytes"] < found["torch F.linear float32"]["bytes"] / 8


def test_other_decisions_are_never_timed(measured, monkeypatch):
    monkeypatch.setattr(binary_networks, "QUICK_SECONDS", 1e-3)
    monkeypatch.setattr(binary_networks, "_converted", lambda signs, x: ((lambda y: -signs(y)), 1))
    records, left_out = BinaryNetworks(Options(quick=True), measured).measure(Group(40, 1))
    assert OURS not in {record["implementation"] for record in records}
    assert [row.implementation for row in left_out] == [OURS] and left_out[0].wrong
    assert torch.is_grad_enabled()
