import pytest
import torch

from tersetorch.bench.cases import FLATS, Flat, flat_weight
from tersetorch.bench.flat_peers import FLAT, layer_of
from tersetorch.bench.options import Options
from tersetorch.bench.suites.flat import KEPT, LARGE, OURS, USUAL, Flattened, Group, groups

SMALL = Flat("small", 20, 20, 3, 7)


def test_groups_follow_the_options():
    assert [group.label for group in groups(Options(quick=True))] == ["flat 128 5x5 at 14, batch 1"]
    assert {(group.case.name, group.batch) for group in groups(Options(cases=("at 56",), batches=(3,)))} == {
        (name, 3) for name in FLATS if "at 56" in name
    }
    usual, full = groups(Options()), groups(Options(full=True))
    assert {(group.case.name, group.batch) for group in usual} == set(USUAL)
    assert set(usual) < set(full) and len([group for group in full if not group.kept]) == 2 * len(FLATS)
    assert [group.label for group in usual if group.kept] == ["flat 128 5x5 at 56, batch 32, pages kept"]
    assert all(4 * group.case.numbers_out(group.batch) >= LARGE for group in full if group.kept)


def test_records_are_right_and_whole(measured):
    suite = Flattened(Options(quick=True, peers=("torch chain", "torch F.conv2d")), measured)
    records, left_out = suite.measure(Group(SMALL, 2))
    assert not [each for each in left_out if each.wrong]
    found = {record["implementation"]: record for record in records}
    assert found.keys() >= {one.name for one in OURS} | {"torch chain float32", "torch F.conv2d float32"}
    assert found["tersetorch flat"]["ops"] == 2 * 2 * 2 * 49 * 20 * 26
    assert found["torch F.conv2d float32"]["ops"] == 2 * 2 * 49 * 20 * 180


def test_kept_pages_are_a_form_of_their_own(measured):
    suite = Flattened(Options(quick=True, implementations=("flat channels_last",)), measured)
    records, _ = suite.measure(Group(SMALL, 2, kept=True))
    assert [record["pattern"] for record in records] == [KEPT]


@pytest.mark.parametrize("peer", [one for one in FLAT if "compile" not in one.name], ids=lambda one: one.name)
def test_others_agree_where_they_are_installed(peer):
    if missing := peer.missing(2, 1):
        pytest.skip(missing)
    weight, x = flat_weight(SMALL), SMALL.samples(2)
    with torch.inference_mode():
        found = peer.result(peer.pack(SMALL, weight, 2, 1).bind(x)())
        want = SMALL.reference(x, weight)
        tolerance = 1e-4 if peer.mode == "float32" else 5e-2
        assert (found.double() - want).abs().max() <= tolerance * want.abs().max()
        torch.testing.assert_close(layer_of(SMALL, weight)(x).double(), want, rtol=1e-3, atol=1e-3)
