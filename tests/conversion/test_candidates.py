from dataclasses import replace

import pytest
import torch

from tersetorch.conversion.candidates import CANDIDATES, density, distinct_values
from tersetorch.conversion.swap import build


def test_names_and_aliases_are_unique():
    assert all(name == row.name for name, row in CANDIDATES.items())
    assert len({row.alias for row in CANDIDATES.values()}) == len(CANDIDATES)
    assert "dense" not in CANDIDATES


@pytest.mark.parametrize("name", sorted(CANDIDATES))
def test_what_is_built_has_the_same_weight(name, sparse_linear):
    layer = sparse_linear(distinct=9)
    row = CANDIDATES[name]
    assert row.applies(layer) is None
    for samples in (None, 0, 1, 64):
        (built,) = build(row, [layer.eval()], samples)
        assert type(built) is row.layer
        assert torch.equal(built.weight, layer.weight)
        assert built.layout == row.layout
        assert row.layout == "csr" or torch.equal(built.packed_weight.to_dense(), layer.weight)


def test_blocks_are_for_many_samples(sparse_linear):
    row = CANDIDATES["blocked"]
    assert row.fits(7) == "made for 8 samples or more, and there are 7"
    assert row.fits(8) is None
    assert replace(row, max_samples=8).fits(9) == "made for 8 samples or fewer, and there are 9"
    few, many = (build(row, [sparse_linear().eval()], samples)[0] for samples in (8, 64))
    assert few.layout_options["column_block"] > many.layout_options["column_block"]


def test_codebook_wants_few_values(sparse_linear):
    applies = CANDIDATES["sparse_codebook"].applies
    assert applies(sparse_linear(80, 60, density=1)) == "more than 255 distinct non-zero values"
    assert applies(sparse_linear(80, 60, density=1, distinct=255)) is None


@pytest.mark.parametrize(
    ("weight", "share", "distinct"),
    [
        (torch.zeros(0, 3), 0, 0),
        (torch.zeros(2, 3), 0, 0),
        (torch.tensor([[0.0, -0.0], [1.0, 1.0]]), 0.5, 1),
        (torch.arange(256.0)[None], 255 / 256, 255),
        (torch.arange(257.0)[None], 256 / 257, None),
        (torch.arange(70000.0)[None], 69999 / 70000, None),
        (torch.cat([torch.ones(65536), torch.arange(300.0)])[None], 65835 / 65836, None),
    ],
)
def test_counts(weight, share, distinct):
    assert density(weight) == pytest.approx(share)
    assert distinct_values(weight) == distinct
