import dataclasses

import torch

from tersetorch.bench.cases import Linear
from tersetorch.bench.options import Options
from tersetorch.bench.suites import fixed
from tersetorch.bench.suites.fixed import BATCHES, LAYERS, ROUNDINGS, Fixed, Group, groups


def test_groups_follow_the_options():
    assert len(groups(Options())) == 1 + len(LAYERS) * len(BATCHES)
    assert [group.label for group in groups(Options(cases=("round",)))] == ["round 16384 Ki floats to <4,12>"]
    assert [group.batch for group in groups(Options(cases=("fc7",), batches=(3,)))] == [3]


def test_products_are_exact(measured):
    suite = Fixed(Options(quick=True, peers=("torch F.",)), measured)
    records, left_out = suite.measure(Group(Linear("small", 70, 90), 3))
    assert not [each for each in left_out if each.wrong]
    found = {record["implementation"]: record for record in records}
    assert found["tersetorch fixed int8"]["max_error"] == found["tersetorch fixed int16"]["max_error"] == 0
    assert "torch F.linear float32" in found
    assert found["tersetorch fixed int16"]["ops"] == 2 * found["tersetorch fixed int8"]["ops"] == 4 * 70 * 90 * 3


def test_roundings_are_verified(measured, monkeypatch):
    monkeypatch.setattr(fixed, "QUICK_SECONDS", 1e-3)
    records, left_out = Fixed(Options(quick=True), measured).measure(Group(size=3000))
    assert not left_out and {record["implementation"] for record in records} == set(ROUNDINGS)
    assert all(record["p30_ms"] > 0 and record["max_error"] < 1 for record in records)
    wrong = {"tersetorch nearest": ("ours", torch.floor)}
    monkeypatch.setattr(fixed, "ROUNDINGS", wrong)
    records, left_out = Fixed(Options(quick=True), measured).measure(Group(size=3000))
    assert not records and "rounds to something else" in str(left_out[0])
    assert dataclasses.replace(Group(), size=1024).label == "round 1 Ki floats to <4,12>"
