import itertools

import pytest
import torch

from tersetorch.ops import csr_matmul, csr_matmul_inference

OPS = torch.ops.tersetorch
EPSILON = 2.0**-24  # half a unit of float32


def random_weight(rows, columns, density, seed=0):
    """Offsets, columns and values of a random weight, and the same weight dense."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(rows, columns, generator=generator) < density
    dense = torch.where(kept, torch.randn(rows, columns, generator=generator), 0.0)
    counts = kept.sum(1)
    row_offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).int()
    return row_offsets, kept.nonzero()[:, 1].int(), dense[kept], dense


def random(*shape, seed=1, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rows_of(row_offsets):
    return torch.repeat_interleave(torch.arange(row_offsets.numel() - 1), row_offsets.diff().long())


def assert_close_sum(got, left, right, extra=None):
    """got must be left @ right (+ extra) but for what float32 sums may lose: (terms + 1) * 2^-24 * sum |terms|."""
    left, right = left.double(), right.double()
    want, size = left @ right, left.abs() @ right.abs()
    if extra is not None:
        want, size = want + extra.double(), size + extra.double().abs()
    allowed = (left.shape[-1] + 2) * EPSILON * size
    if got.dtype == torch.bfloat16:
        allowed = allowed + 2.0**-8 * want.abs()
    assert got.shape == want.shape
    assert ((got.double() - want).abs() <= allowed).all()


SHAPES = [(1, 1), (10, 17), (300, 784), (64, 8), (65, 100), (5, 4096), (127, 1009), (64, 0), (0, 5)]


@pytest.mark.parametrize("rows,columns", SHAPES)
@pytest.mark.parametrize("batch", [0, 1, 2, 7, 8, 9, 33, 64, 65, 130])
def test_equals_the_dense_product(rows, columns, batch):
    row_offsets, col_indices, values, dense = random_weight(rows, columns, 0.3)
    x, bias = random(batch, columns), random(rows, seed=2)
    y = csr_matmul(x, row_offsets, col_indices, values, bias)
    assert y.dtype == torch.float32
    assert_close_sum(y, x, dense.T, bias)
    assert torch.equal(csr_matmul_inference(x, row_offsets, col_indices, values, bias), y)
    x, values = x.bfloat16(), values.bfloat16()
    y = csr_matmul(x, row_offsets, col_indices, values)
    assert y.dtype == torch.bfloat16
    assert_close_sum(y, x, dense.bfloat16().T)


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_empty_and_full_weights(density):
    row_offsets, col_indices, values, dense = random_weight(33, 70, density)
    x = random(5, 70)
    assert_close_sum(csr_matmul(x, row_offsets, col_indices, values), x, dense.T)
