"""BlockedWeight and BlockedCodebookWeight lay out positions alike; what is said of those holds for both."""

from dataclasses import replace

import pytest
import torch

from tersetorch.formats import BlockedCodebookWeight, BlockedWeight, CsrWeight, SparseCodebookWeight
from tersetorch.formats.blocked_pattern import column_block_for
from tersetorch.ops import blocked_matmul


def sparse(rows, columns, density, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    kept = torch.rand(rows, columns, generator=g) < density
    values = torch.randn(100, generator=g)[torch.randint(100, (rows, columns), generator=g)]
    return torch.where(kept, values, 0.0).to(dtype)


SHAPES = [(0, 0), (0, 5), (5, 0), (1, 1), (1, 300), (255, 17), (256, 53), (257, 128), (600, 1009)]


@pytest.mark.parametrize("kind", [BlockedWeight, BlockedCodebookWeight])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("column_block", [1, 100, 32768])
def test_from_dense_and_back(kind, shape, density, column_block):
    dense = sparse(*shape, density)
    weight = kind.from_dense(dense, column_block=column_block)
    weight.validate()
    assert torch.equal(weight.to_dense(), dense)
    assert (weight.shape, weight.nnz) == (shape, int((dense != 0).sum()))
    blocks = -(-shape[0] // 256) * -(-shape[1] // column_block)
    positions = 4 * (blocks + 1) + 4 * shape[0] * -(-shape[1] // column_block) + 2 * weight.nnz
    values = 4 * weight.nnz if kind is BlockedWeight else weight.nnz + weight.codebook.nbytes
    assert weight.nbytes == positions + values


def test_bfloat16_values_stay_bfloat16():
    dense = sparse(37, 53, 0.2, dtype=torch.bfloat16)
    weight = BlockedWeight.from_dense(dense)
    weight.validate()
    assert weight.values.dtype == weight.to_dense().dtype == torch.bfloat16
    assert torch.equal(weight.to_dense(), dense)


def test_the_op_multiplies_by_the_dense_form():
    dense, x = sparse(300, 500, 0.2), torch.randn(70, 500, generator=torch.Generator().manual_seed(1))
    plain, shared = BlockedWeight.from_dense(dense), BlockedCodebookWeight.from_dense(dense)
    for weight, values, codebook in (
        (plain, plain.values, None),
        (shared, shared.codes, shared.codebook[0]),
    ):
        y = blocked_matmul(
            x,
            weight.block_offsets,
            weight.segments,
            weight.indices,
            values,
            None,
            codebook,
            out_features=weight.rows,
            column_block=weight.column_block,
        )
        torch.testing.assert_close(y, x @ dense.T, rtol=1e-5, atol=1e-4)


def test_rows_of_a_block_come_longest_first():
    weight = BlockedWeight.from_dense(sparse(256, 100, 0.3), column_block=100)
    counts = weight.segments & 0xFFFF
    assert (counts.diff() <= 0).all() and counts.max() > counts.min()


def test_sparser_weights_and_smaller_batches_get_wider_blocks():
    assert column_block_for(64, 0.03) > column_block_for(64, 0.1) > column_block_for(64, 0.35)
    assert column_block_for(8, 0.1) > column_block_for(16, 0.1) > column_block_for(64, 0.1)
    assert column_block_for(1, 0.1) == column_block_for(8, 0.1)
    assert column_block_for(500, 0.1) == column_block_for(64, 0.1)


def test_shares_no_memory_and_no_history_with_values():
    source = CsrWeight.from_dense(sparse(3, 4, 1.0))
    source.values.requires_grad_()
    weight = BlockedWeight.from_csr(source)
    assert not weight.values.requires_grad
    source.values.data.zero_()
    assert weight.values.abs().min() > 0


def test_the_codebook_is_the_one_of_the_rows():
    source = SparseCodebookWeight.from_dense(sparse(30, 40, 0.3))
    assert BlockedCodebookWeight.from_csr(source).codebook is source.codebook


GOOD = BlockedWeight.from_dense(sparse(300, 20, 0.5), column_block=16)


def changed(name, place, value):
    tensor = getattr(GOOD, name).clone()
    tensor[place] = value
    return {name: tensor}


@pytest.mark.parametrize(
    "bad,error,match",
    [
        ({"block_offsets": GOOD.block_offsets.long()}, TypeError, r"block_offsets must be torch\.int32"),
        ({"indices": GOOD.indices.int()}, TypeError, r"indices must be torch\.int16"),
        ({"segments": 3}, TypeError, "segments must be a tensor, got int"),
        ({"segments": GOOD.segments[1:]}, ValueError, r"segments must be \[600\], got shape \(599,\)"),
        ({"rows": 600}, ValueError, r"must be \["),
        ({"rows": 3.0}, TypeError, "rows must be an int, got 3.0"),
        ({"columns": -1}, ValueError, "columns must be at least 0, got -1"),
        ({"column_block": 0}, ValueError, "column_block must be 1 to 32768, got 0"),
        (changed("block_offsets", 1, 3), ValueError, "block_offsets must sum the segments' counts"),
        (changed("segments", 0, int(GOOD.segments[1])), ValueError, "must"),
        (changed("segments", 0, GOOD.segments[0] + (300 << 16)), ValueError, "segments must name each row"),
        (changed("segments", 0, (GOOD.segments[1] & ~0xFFFF) | (GOOD.segments[0] & 0xFFFF)), ValueError, "name each"),
        (changed("indices", 0, 16), ValueError, "indices must lie inside their block of 16 columns and inside 20"),
        (changed("indices", -1, 5), ValueError, "indices must lie inside their block of 16 columns and inside 20"),
        (changed("indices", 0, int(GOOD.indices[1])), ValueError, "indices must be different within a row"),
        ({"values": GOOD.values[1:]}, ValueError, r"values must be \["),
        ({"values": GOOD.values.double()}, TypeError, "values must be float32 or bfloat16"),
    ],
)
def test_validate_rejects(bad, error, match):
    with pytest.raises(error, match=f"BlockedWeight: .*{match}"):
        replace(GOOD, **bad).validate()


def test_codes_are_checked():
    good = BlockedCodebookWeight.from_dense(sparse(30, 40, 0.3))
    for bad, error, match in (
        ({"codes": torch.zeros_like(good.codes)}, ValueError, r"codes must lie in \[1, "),
        ({"codes": good.codes[1:]}, ValueError, "as indices is"),
        ({"codebook": good.codebook.double()}, TypeError, "codebook must be float32"),
    ):
        with pytest.raises(error, match=f"BlockedCodebookWeight: .*{match}"):
            replace(good, **bad).validate()


@pytest.mark.parametrize(
    "bad,error,match",
    [
        ({"samples": 0}, ValueError, "samples must be at least 1, got 0"),
        ({"samples": 6.4}, TypeError, "samples must be an int, got float"),
        ({"column_block": True}, TypeError, "column_block must be an int, got bool"),
        ({"column_block": 40000}, ValueError, "column_block must be 1 to 32768, got 40000"),
    ],
)
def test_from_csr_rejects(bad, error, match):
    with pytest.raises(error, match=match):
        BlockedWeight.from_csr(CsrWeight.from_dense(sparse(3, 4, 1.0)), **bad)
