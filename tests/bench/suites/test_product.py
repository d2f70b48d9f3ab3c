import pytest

from tersetorch.bench.cases import Linear
from tersetorch.bench.options import Options
from tersetorch.bench.suites import product
from tersetorch.bench.suites.product import Group, Product, groups


def test_groups_follow_the_options():
    assert {group.batch for group in groups(Options())} == {1, 8, 64, 256}
    assert [group.batch for group in groups(Options(quick=True))] == [1] * len(product.SETTINGS)
    assert {group.case.name for group in groups(Options(cases=("fc7",), batches=(3,)))} == {"alexnet fc7"}


@pytest.mark.parametrize("entries", [16, 256])
def test_records_are_verified_and_whole(measured, entries):
    suite = Product(Options(quick=True, peers=("F.linear", "faiss")), measured)
    records, left_out = suite.measure(Group(Linear("small", 300, 40), 2, 4, entries))
    assert not left_out
    found = {record["implementation"]: record for record in records}
    assert {"torch F.linear float32", "tersetorch product", "tersetorch product int8"} <= found.keys()
    ours = found["tersetorch product"]
    assert ours["max_error"] < 1e-5 and ours["suite"] == "product" and ours["p30_ms"] > 0
    assert ours["weight_bytes"] == 320 * (8 if entries == 16 else 10) + 10 * 4 * 4 * entries
    assert ours["ops"] == 2 * (2 * 40 * entries + 300 * 10)


def test_segments_may_share_a_codebook(measured):
    suite = Product(Options(quick=True, peers=("faiss", "AQLM")), measured)
    records, left_out = suite.measure(Group(Linear("small", 304, 64), 2, 8, 256, shared=True))
    assert not left_out and {record["pattern"] for record in records} == {"8 columns, 256 entries, shared"}
    assert {"tersetorch product", "tersetorch product int8"} <= {record["implementation"] for record in records}
