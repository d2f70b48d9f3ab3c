import pytest
import torch
from torch import nn

import tersetorch as tt
from tersetorch.formats import CodebookWeight
from tersetorch.nn import CodebookConv2d, CodebookLinear


def shared(rows, columns, entries, column_block=0, seed=0):
    """A weight with a table for each row, or block of columns, of values that no other has."""
    draw = torch.Generator().manual_seed(seed)
    groups = torch.arange(columns) // column_block if column_block else torch.arange(rows)[:, None]
    tables = torch.randn(int(groups.max()) + 1, entries, generator=draw)
    codes = torch.randint(entries, (rows, columns), generator=draw)
    codes[:, :entries] = torch.arange(entries)
    return tables[groups.expand(rows, columns), codes]


@pytest.mark.parametrize("entries", [1, 3, 16, 17])
@pytest.mark.parametrize("columns", [64, 200])
def test_rows_with_tables_of_their_own_are_found(entries, columns):
    weight = shared(300, columns, entries)
    found = CodebookWeight.from_dense(weight)
    assert found.codebook.shape == (300, entries) and found.column_block == 0
    assert torch.equal(found.codebook, found.codebook.sort(1).values)
    assert torch.equal(found.to_dense(), weight)


@pytest.mark.parametrize(("columns", "column_block"), [(512, 128), (500, 256), (129, 128)])
def test_blocks_with_tables_of_their_own_are_found(columns, column_block):
    weight = shared(40, columns, 12, column_block)
    found = CodebookWeight.from_dense(weight)
    assert found.column_block == column_block and found.codebook.shape == (-(-columns // column_block), 12)
    assert torch.equal(found.to_dense(), weight)


def test_the_smallest_form_is_taken():
    assert CodebookWeight.from_dense(shared(1, 300, 7)).codebook.shape == (1, 7)
    assert CodebookWeight.from_dense(shared(100, 64, 15, 16)).codebook.shape == (1, 60)
    fewer = shared(9, 200, 5)
    fewer[2] = fewer[2, 0]
    found = CodebookWeight.from_dense(fewer.bfloat16())
    assert torch.equal(found.to_dense(), fewer.bfloat16().float())
    signed = torch.tensor([[0.0, -0.0] * 64, [float("inf"), float("-inf")] * 64])
    assert torch.equal(CodebookWeight.from_dense(signed).to_dense().view(torch.int32), signed.view(torch.int32))


@pytest.mark.parametrize("shape", [(100, 64), (3, 256), (300, 300), (1, 257), (4, 2000)])
def test_what_nobody_shared_is_refused(shape):
    assert CodebookWeight.find(torch.randn(shape)) is None
    with pytest.raises(ValueError, match="at most 256 distinct values, in all or in each row or block of columns"):
        CodebookWeight.from_dense(torch.randn(shape))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (0, 300)])
def test_empty_weights_have_a_form(shape):
    assert CodebookWeight.from_dense(torch.zeros(shape)).to_dense().shape == shape


@pytest.mark.parametrize(("per", "tables"), [("row", 100), (128, 4)])
@pytest.mark.parametrize("finalized", [False, True])
def test_convert_builds_layers_that_share_by_row_or_block(per, tables, finalized):
    model = tt.quantize.kmeans(nn.Sequential(nn.Linear(512, 100)), 4, per=per)
    x = torch.randn(3, 512)
    expected = model(x)
    built = tt.convert(tt.finalize(model) if finalized else model, x, plan="codebook")
    assert isinstance(built[0], CodebookLinear) and built[0].codebook.shape == (tables, 16)
    torch.testing.assert_close(built(x), expected)


def test_convert_builds_convolutions_that_share_by_row():
    model = tt.quantize.kmeans(nn.Sequential(nn.Conv2d(32, 64, 3)), 4, per="row")
    built = tt.convert(model, plan="codebook")
    assert isinstance(built[0], CodebookConv2d) and built[0].codebook.shape == (64, 16)
    assert torch.equal(built[0].weight, model[0].weight)
