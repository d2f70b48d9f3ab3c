import torch

from tersetorch.bench.cases import CASES, Conv, Linear
from tersetorch.bench.options import Options
from tersetorch.bench.suites import fixed
from tersetorch.bench.suites.fixed import BATCHES, CONVOLUTIONS, KEPT, LAYERS, ROUNDINGS, Fixed, Group, groups


def test_groups_follow_the_options():
    layers = [(name, batch) for name in (*LAYERS, *CONVOLUTIONS) for batch in BATCHES[CASES[name].kind]]
    assert [(group.case.name, group.batch) for group in groups(Options()) if group.case] == layers
    labels = ["round 16384 Ki floats to <4,12>", "round 16384 Ki floats to <4,12>, pages kept"]
    assert [group.label for group in groups(Options(cases=("round",)))] == labels
    assert len(groups(Options(quick=True))) == 3
    assert [group.batch for group in groups(Options(cases=("fc7",), batches=(3,)))] == [3]


def test_products_are_exact(measured):
    suite = Fixed(Options(quick=True, peers=("torch F.",)), measured)
    records, left_out = suite.measure(Group(Linear("small", 70, 90), 3))
    assert not [each for each in left_out if each.wrong]
    found = {record["implementation"]: record for record in records}
    assert found["tersetorch fixed int8"]["max_error"] == found["tersetorch fixed int16"]["max_error"] == 0
    assert "torch F.linear float32" in found
    assert found["tersetorch fixed int16"]["ops"] == 2 * found["tersetorch fixed int8"]["ops"] == 4 * 70 * 90 * 3


def test_convolutions_are_exact(measured):
    suite = Fixed(Options(quick=True, peers=("torch F.conv2d",)), measured)
    records, left_out = suite.measure(Group(Conv("small", 6, 4, 3, 7, groups=2), 3))
    assert not left_out
    found = {record["implementation"]: record for record in records}
    assert found["tersetorch fixed int8"]["max_error"] == found["tersetorch fixed int16"]["max_error"] == 0
    assert found["tersetorch fixed int8"]["weight_bytes"] * 2 == found["tersetorch fixed int16"]["weight_bytes"]
    assert "torch F.conv2d float32" in found


def test_roundings_are_verified(measured, monkeypatch):
    monkeypatch.setattr(fixed, "QUICK_SECONDS", 1e-3)
    options = Options(quick=True, peers=("fake_quantize", "clone"))  # a compiler takes its time
    records, left_out = Fixed(options, measured).measure(Group(size=3000, kept=True))
    names = {name for name in ROUNDINGS if "compile" not in name}
    assert not left_out and {record["implementation"] for record in records} == names
    assert {(record["case"], record["pattern"]) for record in records} == {("round 2 Ki floats to <4,12>", KEPT)}
    assert all(record["p30_ms"] > 0 and record["max_error"] < 1 for record in records)
    wrong = {"tersetorch nearest": ("ours", torch.floor)}
    monkeypatch.setattr(fixed, "ROUNDINGS", wrong)
    records, left_out = Fixed(Options(quick=True), measured).measure(Group(size=3000))
    assert not records and "rounds to something else" in str(left_out[0])


def test_the_formulas_that_torch_compiles_are_right():
    x = torch.tensor([-9.0, -0.3 * 2**-12, 0.0, 0.7 * 2**-12, 1.0, 9.0])
    assert fixed._nearest(x).tolist() == [-8.0, 0.0, 0.0, 2**-12, 1.0, 8 - 2**-12]
    assert ((fixed._stochastic(x) - x.clamp(-8, 8 - 2**-12)).abs() < 2**-12).all()
