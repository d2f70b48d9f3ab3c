import pytest
import torch
from torch import nn

import tersetorch as tt
from tersetorch.conversion.candidates import CANDIDATES, FACTORED, density, distinct_values
from tersetorch.conversion.swap import build
from tersetorch.formats import FixedFormat, FixedFormats
from tersetorch.formats.fixed_format import note_formats
from tersetorch.nn import BinaryConv2d, BinaryLinear, FlattenedConv2d
from tersetorch.nn.fixed_module import FixedPointModule
from tersetorch.nn.product_module import ProductModule


def test_names_and_aliases_are_unique():
    assert all(name == row.name for name, row in CANDIDATES.items())
    several = [(row.alias, row.source) for row in CANDIDATES.values()]
    # Of two with one alias the smaller is taken.
    more = {pair for pair in several if several.count(pair) > 1}
    assert more == {(alias, source) for alias in ("codebook", "binary", "") for source in (nn.Linear, nn.Conv2d)}
    assert "dense" not in CANDIDATES


@pytest.mark.parametrize(
    "name", sorted(n for n, row in CANDIDATES.items() if not {row.source, row.layer} & FACTORED.keys())
)
def test_what_is_built_has_the_same_weight(name, sparse_linear):
    row = CANDIDATES[name]
    layer = sparse_linear(distinct=9).eval()
    if row.source is not nn.Linear:
        sizes = {nn.Conv1d: (10, 30, 4), nn.Conv2d: (10, 30, 2), nn.Embedding: (30, 40), FlattenedConv2d: (9, 9, 3)}
        other = row.source(*sizes[row.source]).eval()
        if row.source is not FlattenedConv2d:
            other.weight.data = layer.weight.data.reshape(other.weight.shape)
        layer = other
    if row.layer in (BinaryLinear, BinaryConv2d):
        assert "a row must hold +a and -a only" in row.applies(layer)
        layer.weight.data = torch.where(layer.weight >= 0, 0.5, -0.5)
    if row.alias == "fixed":
        assert "no formats known" in row.applies(layer)
        note_formats(layer, FixedFormats(*[FixedFormat(4, 12)] * 3))
        layer.weight.data = FixedFormat(4, 12).nearest(layer.weight.data)
    if issubclass(row.layer, ProductModule):
        assert "its rows " in row.applies(nn.Linear(40, 300) if row.source is nn.Linear else nn.Conv2d(10, 300, 2))
        residual = name.startswith("residual")
        quantized = tt.quantize.residual(layer, 2, 5) if residual else tt.quantize.product(layer, 6, sub_vector=5)
        tt.finalize(quantized)
    assert row.applies(layer) is None
    for samples in (None, 0, 1, 64):
        (built,) = build(row, [layer], samples)
        assert type(built) is row.layer
        assert torch.equal(built.weight, layer.weight)
        assert built.layout == row.layout
        packed = not issubclass(row.layer, BinaryLinear | FixedPointModule | ProductModule)
        if row.source is nn.Linear and row.layout != "csr" and packed:
            error = 0 if row.exact else 1e-2 * float(layer.weight.abs().max())
            torch.testing.assert_close(built.packed_weight.to_dense().float(), layer.weight, atol=error, rtol=0)


def test_samples_and_errors_decide_what_is_measured(sparse_linear):
    row = CANDIDATES["blocked"]
    assert row.fits(3, None) == "made for 4 samples or more, and there are 3"
    assert row.fits(4, None) is None
    assert CANDIDATES["bitmap"].fits(9, None) == "made for 8 samples or fewer, and there are 9"
    assert CANDIDATES["bitmap"].fits(8, None) is None
    assert CANDIDATES["bitmap_int8"].fits(1, None) == "it rounds, and max_error= allows no error"
    assert CANDIDATES["bitmap_int8"].fits(1, 0.01) is None
    few, many = (build(row, [sparse_linear().eval()], samples)[0] for samples in (8, 64))
    assert few.layout_options["column_block"] > many.layout_options["column_block"]


def test_narrow_columns_number_so_many(sparse_linear):
    applies = CANDIDATES["csr16"].applies
    assert applies(sparse_linear(65_537, 1)) == "more than 65536 columns"
    assert applies(sparse_linear(65_536, 1)) is None
    assert CANDIDATES["csr16_codebook"].applies(sparse_linear(80, 60, density=1)).startswith("more than 255 distinct")


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
