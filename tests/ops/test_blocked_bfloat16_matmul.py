import pytest
import torch

from tersetorch.ops import blocked_bfloat16_matmul, blocked_bfloat16_matmul_inference, blocked_bfloat16_pack

OPS = torch.ops.tersetorch
EPSILON = 2.0**-24  # half a unit of float32


def random(*shape, seed=1, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_weight(rows, columns, density, column_block, seed=0):
    """A random bfloat16 weight dense, in compressed sparse rows and in blocks, as keyword arguments of the op."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(rows, columns, generator=generator) < density
    dense = torch.where(kept, torch.randn(rows, columns, generator=generator), 0.0).bfloat16()
    row_offsets = torch.cat([torch.zeros(1, dtype=torch.int64), kept.sum(1).cumsum(0)]).int()
    csr = (row_offsets, kept.nonzero()[:, 1].int(), dense[kept])
    packed = blocked_bfloat16_pack(*csr, columns=columns, column_block=column_block)
    weight = dict(zip(("block_offsets", "segments", "indices", "values"), packed, strict=True))
    return dense, csr, weight | {"out_features": rows, "column_block": column_block}


def assert_close_sum(got, left, right, extra=None, of_x=0.0):
    """got must be left @ right (+ extra) but for what sums and, as a part of each term, x's rounding may lose."""
    left, right = left.double(), right.double()
    want, size = left @ right, left.abs() @ right.abs()
    if extra is not None:
        want, size = want + extra.double(), size + extra.double().abs()
    # A bfloat16 instruction may round a product and a sum apart.
    allowed = (2 * (left.shape[-1] + 2) * EPSILON + of_x) * size
    if got.dtype == torch.bfloat16:
        allowed = allowed + 2.0**-8 * want.abs()
    assert got.shape == want.shape
    assert ((got.double() - want).abs() <= allowed).all()


SHAPES = [(1, 1), (10, 17), (300, 784), (256, 128), (257, 129), (513, 101), (5, 4096), (127, 1009), (64, 0), (0, 5)]


@pytest.mark.parametrize("rows,columns", SHAPES)
@pytest.mark.parametrize("batch", [0, 1, 17, 64, 200])
def test_equals_the_product_of_rounded_numbers(rows, columns, batch):
    for column_block in (2 if columns < 200 else 98, 128, 2048):
        dense, _, weight = random_weight(rows, columns, 0.3, column_block)
        x, bias = random(batch, columns), random(rows, seed=2)
        y = blocked_bfloat16_matmul(x, bias=bias, **weight)
        assert y.dtype == torch.float32
        assert_close_sum(y, x.bfloat16(), dense.T, bias)
        assert_close_sum(y, x, dense.T, bias, of_x=2.0**-8)
        assert torch.equal(blocked_bfloat16_matmul_inference(x, bias=bias, **weight), y)
        assert torch.equal(blocked_bfloat16_matmul(x, bias=bias, relu=True, **weight), y.relu())
        half = blocked_bfloat16_matmul(x.bfloat16(), **weight)
        assert half.dtype == torch.bfloat16
        assert_close_sum(half, x.bfloat16(), dense.T)


def test_what_is_not_finite_stays_in_its_samples_and_words():
    row_offsets, col_indices = torch.tensor([0, 1, 2], dtype=torch.int32), torch.tensor([0, 3], dtype=torch.int32)
    packed = blocked_bfloat16_pack(
        row_offsets, col_indices, torch.ones(2, dtype=torch.bfloat16), columns=4, column_block=4
    )
    x = torch.ones(3, 4)
    x[0, 0], x[1, 3], x[2, 1] = torch.nan, torch.inf, -torch.inf
    y = blocked_bfloat16_matmul(x, *packed, out_features=2, column_block=4)
    assert y[0, 0].isnan() and y[0, 1] == 1
    assert y[1, 0] == 1 and y[1, 1] == torch.inf
    assert y[2, 0].isnan() and y[2, 1] == 1  # column 1 shares its word with a stored weight


def test_backward_is_refused():
    _, _, weight = random_weight(8, 12, 0.4, 8)
    y = blocked_bfloat16_matmul(random(5, 12).requires_grad_(), **weight)
    with pytest.raises(RuntimeError, match="blocked_bfloat16_matmul: must not be differentiated"):
        y.sum().backward()


def test_rejects_other_values():
    _, _, weight = random_weight(8, 12, 0.4, 8)
    with pytest.raises(TypeError, match=r"blocked_bfloat16_matmul: values must be bfloat16, got torch\.float32"):
        blocked_bfloat16_matmul(random(5, 12), **weight | {"values": weight["values"].float()})
    with pytest.raises(RuntimeError, match="blocked_bfloat16_matmul: values must be BFloat16"):
        blocked_bfloat16_matmul_inference(random(5, 12), **weight | {"values": weight["values"].view(torch.int16)})
