"""BlockedInt8Weight and BlockedBFloat16Weight lay out words alike; what is said of those holds for both."""

from dataclasses import replace

import pytest
import torch

from tersetorch.formats import BitmapInt8Weight, BlockedBFloat16Weight, BlockedInt8Weight, CsrWeight
from tersetorch.ops import blocked_bfloat16_matmul, blocked_int8_matmul

KINDS = [BlockedInt8Weight, BlockedBFloat16Weight]


def sparse(rows, columns, density, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    kept = torch.rand(rows, columns, generator=g) < density
    return torch.where(kept, torch.randn(rows, columns, generator=g), 0.0).to(dtype)


def rounded(kind, dense):
    return BitmapInt8Weight.from_dense(dense).to_dense() if kind is BlockedInt8Weight else dense.bfloat16()


SHAPES = [(0, 0), (0, 5), (5, 0), (1, 1), (1, 300), (255, 17), (256, 54), (257, 128), (600, 1009)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("column_block", [4, 100, 32768])
def test_from_dense_and_back(kind, shape, density, column_block):
    dense = sparse(*shape, density)
    weight = kind.from_dense(dense, column_block=column_block)
    weight.validate()
    assert torch.equal(weight.to_dense(), rounded(kind, dense))
    assert (weight.shape, weight.nnz) == (shape, int((weight.to_dense() != 0).sum()))
    blocks = -(-shape[0] // 256) * -(-shape[1] // column_block)
    padded = torch.nn.functional.pad(dense, (0, -shape[1] % kind.GROUP)).unflatten(1, (-1, kind.GROUP))
    words = int((padded != 0).any(-1).sum())
    positions = 4 * (blocks + 1) + 4 * shape[0] * -(-shape[1] // column_block) + 2 * words
    assert weight.nbytes == positions + 4 * words + (8 * shape[0] if kind is BlockedInt8Weight else 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("samples", [1, 8, 16, 32, 64, 500])
@pytest.mark.parametrize("density", [0.03, 0.1, 0.35])
def test_blocks_for_any_batch_are_whole_words(kind, samples, density):
    weight = kind.from_dense(sparse(30, 5000, density), samples)
    weight.validate()
    assert weight.column_block % kind.GROUP == 0


def test_the_ops_multiply_by_the_dense_form():
    dense, x = sparse(300, 500, 0.2), torch.randn(70, 500, generator=torch.Generator().manual_seed(1))
    eight, half = BlockedInt8Weight.from_dense(dense), BlockedBFloat16Weight.from_dense(dense)
    y = blocked_bfloat16_matmul(
        x,
        half.block_offsets,
        half.segments,
        half.indices,
        half.values,
        out_features=300,
        column_block=half.column_block,
    )
    torch.testing.assert_close(y, x.bfloat16().float() @ half.to_dense().float().T, rtol=1e-5, atol=1e-4)
    y = blocked_int8_matmul(
        x,
        eight.block_offsets,
        eight.segments,
        eight.indices,
        eight.values,
        eight.scales,
        eight.row_sums,
        out_features=300,
        column_block=eight.column_block,
    )
    step = x.abs().amax(1, keepdim=True) / 127
    used = (x / step).round() * step
    torch.testing.assert_close(y, used @ eight.to_dense().T, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_no_history_of_values(kind):
    source = CsrWeight.from_dense(sparse(3, 4, 1.0))
    source.values.requires_grad_()
    assert not kind.from_csr(source).values.requires_grad


def test_int8_refuses_what_is_not_finite():
    dense = sparse(3, 4, 1.0)
    dense[1, 2] = torch.inf
    with pytest.raises(ValueError, match="BlockedInt8Weight: weight must be finite"):
        BlockedInt8Weight.from_dense(dense)


GOOD = BlockedInt8Weight.from_dense(sparse(300, 22, 0.5), column_block=16)


def changed(name, place, value):
    tensor = getattr(GOOD, name).clone()
    tensor[place] = value
    return {name: tensor}


LAST = int((GOOD.words.positions[1] == 5).nonzero()[0])


@pytest.mark.parametrize(
    "bad,error,match",
    [
        ({"block_offsets": GOOD.block_offsets.long()}, TypeError, r"block_offsets must be torch\.int32"),
        ({"segments": GOOD.segments[1:]}, ValueError, r"segments must be \[600\], got shape \(599,\)"),
        ({"rows": 600}, ValueError, r"must be \["),
        ({"columns": 3.0}, TypeError, "columns must be an int, got 3.0"),
        ({"column_block": 6}, ValueError, "column_block must be a multiple of 4, got 6"),
        (changed("indices", 0, 4), ValueError, "indices must lie inside their block of 4 columns"),
        ({"values": GOOD.values[1:]}, ValueError, r"values must be \["),
        ({"values": GOOD.values.int()}, TypeError, r"values must be torch\.int8"),
        (changed("values", (LAST, 2), 1), ValueError, "values must be 0 beyond column 22"),
        (changed("values", (0, 0), -128), ValueError, r"values must lie in \[-127, 127\]"),
        ({"scales": GOOD.scales.double()}, TypeError, r"scales must be torch\.float32"),
        ({"scales": GOOD.scales[1:]}, ValueError, r"scales must be \[300\], got shape \(299,\)"),
        (changed("row_sums", 7, 10**6), ValueError, "row_sums must be the sums"),
    ],
)
def test_validate_rejects(bad, error, match):
    with pytest.raises(error, match=f"BlockedInt8Weight: .*{match}"):
        replace(GOOD, **bad).validate()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "bad,error,match",
    [
        ({"samples": 0}, ValueError, "samples must be at least 1, got 0"),
        ({"samples": 6.4}, TypeError, "samples must be an int, got float"),
        ({"column_block": True}, TypeError, "column_block must be an int, got bool"),
        ({"column_block": 3}, ValueError, "column_block must be a multiple of"),
        ({"column_block": 40000}, ValueError, "up to 32768, got 40000"),
    ],
)
def test_from_csr_rejects(kind, bad, error, match):
    with pytest.raises(error, match=match):
        kind.from_csr(CsrWeight.from_dense(sparse(3, 4, 1.0)), **bad)
