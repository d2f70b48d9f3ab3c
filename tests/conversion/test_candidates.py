import pytest
import torch

from tersetorch.conversion.candidates import CANDIDATES, density, distinct_values


def test_names_and_aliases_are_unique():
    assert all(name == row.name for name, row in CANDIDATES.items())
    assert len({row.alias for row in CANDIDATES.values()}) == len(CANDIDATES)
    assert "dense" not in CANDIDATES


@pytest.mark.parametrize("name", sorted(CANDIDATES))
def test_what_is_built_has_the_same_weight(name, sparse_linear):
    layer = sparse_linear(distinct=9)
    row = CANDIDATES[name]
    assert row.applies(layer) is None
    built = row.build(layer)
    assert type(built) is row.layer
    assert torch.equal(built.weight, layer.weight)


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
