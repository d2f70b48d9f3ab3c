import pytest
import torch

from tersetorch.bench.binary_peers import BINARY
from tersetorch.bench.cases import Conv, Linear
from tersetorch.bench.options import Options
from tersetorch.bench.suites.binary import Binary, Group, groups, pixels, signs, weight_of

OURS = {
    "tersetorch xnor",
    "tersetorch xnor packed",
    "tersetorch xnor, signs out",
    "tersetorch xnor packed, signs out",
}


def test_groups_follow_the_options():
    chosen = groups(Options())
    assert {group.batch for group in chosen if group.case.name == "alexnet fc7"} == {1, 64, 1024}
    assert {group.samples for group in chosen} == {"signs", "reals", "pixels"}
    assert {group.case.kind for group in chosen} == {group.case.kind for group in groups(Options(quick=True))}
    assert {group.case.name for group in groups(Options(cases=("fc7",), batches=(3,)))} == {"alexnet fc7"}


@pytest.mark.parametrize(
    "case,peer",
    [
        (Linear("small", 70, 90), "torch F.linear float32"),
        (Conv("small", 40, 70, 3, 5), "torch F.conv2d float32"),
        (Conv("small", 64, 128, 3, 6, stride=2, groups=2), "torch F.conv2d float32"),
    ],
)
def test_records_are_exact_and_whole(measured, case, peer):
    suite = Binary(Options(quick=True, peers=("torch F.",)), measured)
    records, left_out = suite.measure(Group(case, 2))
    assert not [each for each in left_out if each.wrong]
    found = {record["implementation"]: record for record in records}
    assert found.keys() >= OURS and peer in found
    assert all(found[name]["max_error"] == 0 and found[name]["mode"] == "binary" for name in OURS)
    assert found["tersetorch xnor"]["ops"] == 2 * case.multiplies(2, 1.0)


@pytest.mark.parametrize(
    "case,samples,ours",
    [
        (Linear("small", 70, 90), "reals", "tersetorch sign matmul"),
        (Linear("small", 70, 90), "pixels", "tersetorch bitplane"),
        (Conv("small", 40, 3, 3, 6, stride=2), "pixels", "tersetorch bitplane"),
    ],
)
def test_reals_and_pixels_meet_signs_too(measured, case, samples, ours):
    suite = Binary(Options(quick=True, peers=("torch F.",)), measured)
    records, left_out = suite.measure(Group(case, 3, samples))
    assert not [each for each in left_out if each.wrong]
    found = {record["implementation"]: record for record in records}
    assert found.keys() > {ours} and {record["pattern"] for record in records} == {samples}
    assert found[ours]["max_error"] < 1e-6 and (samples == "reals" or found[ours]["max_error"] == 0)


def test_samples_and_weights_are_signs():
    case = Linear("small", 9, 7)
    assert pixels(torch.tensor([-9.0, 0.0, 9.0])).tolist() == [0, 128, 255]
    assert set(weight_of(case).unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(signs(torch.tensor([-1.0, 0.0, 2.0])), torch.tensor([-1.0, 1.0, 1.0]))


@pytest.mark.parametrize(
    ("case", "peer"),
    [(case, peer) for case in (Linear("small", 20, 128), Conv("small", 20, 32, 3, 5)) for peer in BINARY[case.kind]],
    ids=lambda one: getattr(one, "name", None),
)
def test_others_agree_where_they_are_installed(case, peer):
    if missing := peer.missing(3, 1):
        pytest.skip(missing)
    weight, x = weight_of(case), signs(case.samples(3))
    found = peer.result(peer.pack(case, weight, 3, 1).bind(x)())
    assert torch.equal(found.double(), case.reference(x, weight))
