import pytest
import torch

from tersetorch.ops import blocked_matmul, blocked_matmul_inference, blocked_pack, csr_matmul

OPS = torch.ops.tersetorch
EPSILON = 2.0**-24  # half a unit of float32


def random(*shape, seed=1, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_weight(rows, columns, density, column_block, seed=0, codes=None):
    """A random weight dense, in compressed sparse rows and in blocks, as keyword arguments of the two ops."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(rows, columns, generator=generator) < density
    dense = torch.where(kept, torch.randn(rows, columns, generator=generator), 0.0)
    row_offsets = torch.cat([torch.zeros(1, dtype=torch.int64), kept.sum(1).cumsum(0)]).int()
    col_indices = kept.nonzero()[:, 1].int()
    block_offsets, segments, indices, sources = blocked_pack(
        row_offsets, col_indices, columns=columns, column_block=column_block
    )
    values = dense[kept]
    if codes is not None:
        values = torch.randint(codes, values.shape, generator=generator).to(torch.uint8)
    csr = {"row_offsets": row_offsets, "col_indices": col_indices, "values": values}
    blocked = {"block_offsets": block_offsets, "segments": segments, "indices": indices}
    blocked |= {"values": values[sources], "out_features": rows, "column_block": column_block}
    return dense, csr, blocked


def assert_close_sum(got, left, right, extra=None):
    """got must be left @ right (+ extra) but for what float32 sums may lose: (terms + 2) * 2^-24 * sum |terms|."""
    left, right = left.double(), right.double()
    want, size = left @ right, left.abs() @ right.abs()
    if extra is not None:
        want, size = want + extra.double(), size + extra.double().abs()
    allowed = (left.shape[-1] + 2) * EPSILON * size
    if got.dtype == torch.bfloat16:
        allowed = allowed + 2.0**-8 * want.abs()
    assert got.shape == want.shape
    assert ((got.double() - want).abs() <= allowed).all()


SHAPES = [(1, 1), (10, 17), (300, 784), (256, 128), (257, 129), (513, 100), (5, 4096), (127, 1009), (64, 0), (0, 5)]


@pytest.mark.parametrize("rows,columns", SHAPES)
@pytest.mark.parametrize("batch", [0, 1, 8, 17, 33, 64, 65, 200])
def test_equals_the_dense_product(rows, columns, batch):
    for column_block in (1 if columns < 200 else 97, 128, 1024):
        dense, _, weight = random_weight(rows, columns, 0.3, column_block)
        x, bias = random(batch, columns), random(rows, seed=2)
        y = blocked_matmul(x, bias=bias, **weight)
        assert y.dtype == torch.float32
        assert_close_sum(y, x, dense.T, bias)
        assert torch.equal(blocked_matmul_inference(x, bias=bias, **weight), y)
        assert torch.equal(blocked_matmul(x, bias=bias, relu=True, **weight), y.relu())
        weight["values"] = weight["values"].bfloat16()
        y = blocked_matmul(x.bfloat16(), **weight)
        assert y.dtype == torch.bfloat16
        assert_close_sum(y, x.bfloat16(), dense.bfloat16().T)


def test_columns_beyond_16_bits():
    columns = 70_001
    row_offsets = torch.tensor([0, 2, 4], dtype=torch.int32)
    col_indices = torch.tensor([0, 70_000, 65_535, 65_536], dtype=torch.int32)
    *layout, sources = blocked_pack(row_offsets, col_indices, columns=columns, column_block=32768)
    values = torch.tensor([1.0, 2.0, 3.0, 4.0])
    x = random(9, columns)
    y = blocked_matmul(x, *layout, values[sources], out_features=2, column_block=32768)
    torch.testing.assert_close(y, torch.stack([x[:, 0] + 2 * x[:, -1], 3 * x[:, 65535] + 4 * x[:, 65536]], 1))


def test_codes_stand_for_entries_of_the_codebook():
    for entries in (1, 2, 255, 256):
        _, _, weight = random_weight(40, 90, 0.3, 64, codes=entries)
        codebook, bias = random(entries, seed=3), random(40, seed=2)
        for batch in (1, 20, 64):
            x = random(batch, 90)
            y = blocked_matmul(x, bias=bias, codebook=codebook, **weight)
            plain = weight | {"values": codebook[weight["values"].int()]}
            assert torch.equal(y, blocked_matmul(x, bias=bias, **plain))
            assert torch.equal(y, blocked_matmul_inference(x, bias=bias, codebook=codebook, **weight))


def test_infinity_and_nan_reach_only_the_rows_that_use_them():
    row_offsets, col_indices = torch.tensor([0, 1, 2, 2], dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
    *layout, sources = blocked_pack(row_offsets, col_indices, columns=2, column_block=8)
    values = torch.tensor([2.0, 3.0])[sources]
    x = torch.tensor([[torch.inf, torch.nan]]).expand(10, 2)
    y = blocked_matmul(x, *layout, values, out_features=3, column_block=8, relu=True)
    assert (y[:, 0] == torch.inf).all() and y[:, 1].isnan().all() and (y[:, 2] == 0).all()


# ---- gradients


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("codes", [None, 7])
@pytest.mark.parametrize("rows,columns,batch", [(1, 1, 1), (300, 100, 9), (20, 70, 64), (0, 5, 3), (64, 0, 2)])
def test_gradients_are_those_of_csr_matmul(rows, columns, batch, codes, relu):
    _, csr, blocked = random_weight(rows, columns, 0.3, 32, codes=codes)
    *_, sources = blocked_pack(csr["row_offsets"], csr["col_indices"], columns=columns, column_block=32)
    x, bias = random(batch, columns).requires_grad_(), random(rows, seed=2).requires_grad_()
    learned = random(codes, seed=3) if codes else csr["values"]
    learned.requires_grad_()
    if codes:
        ours = {"codebook": learned}
    else:
        csr["values"], blocked["values"], ours = learned, learned[sources], {}
    grad_y = random(batch, rows, seed=4)
    want = csr_matmul(x, bias=bias, **csr, **ours)
    want = want.relu() if relu else want
    got = blocked_matmul(x, bias=bias, relu=relu, **blocked, **ours)
    for a, b in zip(
        torch.autograd.grad(got, (x, learned, bias), grad_y),
        torch.autograd.grad(want, (x, learned, bias), grad_y),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_second_derivatives_are_those_of_csr_matmul():
    _, csr, blocked = random_weight(20, 30, 0.3, 8)
    *_, sources = blocked_pack(csr["row_offsets"], csr["col_indices"], columns=30, column_block=8)
    x, values = random(5, 30).requires_grad_(), csr["values"].requires_grad_()

    def penalty(y):
        grads = torch.autograd.grad(y.pow(3).sum(), (x, values), create_graph=True)
        return torch.autograd.grad(sum(g.pow(2).sum() for g in grads), (x, values))

    got = penalty(blocked_matmul(x, **blocked | {"values": values[sources]}))
    torch.testing.assert_close(got, penalty(csr_matmul(x, **csr)), rtol=1e-4, atol=1e-2)


def test_forward_mode_is_refused_instead_of_returning_zero():
    _, _, weight = random_weight(8, 12, 0.4, 8)
    with pytest.raises(RuntimeError, match="blocked_matmul: x must not carry a forward-mode tangent"):
        torch.func.jvp(lambda x: blocked_matmul(x, **weight), (random(5, 12),), (random(5, 12),))


# ---- PyTorch


def positional(codes=None, dtype=torch.float32):
    _, _, weight = random_weight(300, 12, 0.4, 8, codes=codes)
    layout = [weight[name] for name in ("block_offsets", "segments", "indices", "values")]
    x, bias = random(5, 12, dtype=dtype), random(300, seed=2)
    return x, *layout, bias, random(codes, seed=3) if codes else None, 300, 8, True


@pytest.mark.parametrize("codes", [None, 2])
def test_registration_is_sound(codes):
    args = positional(codes)
    torch.library.opcheck(OPS.blocked_matmul_inference.default, args)
    for leaf in (args[0], args[5], args[6] if codes else args[4]):
        leaf.requires_grad_()
    torch.library.opcheck(OPS.blocked_matmul.default, args)
    _, csr, _ = random_weight(300, 12, 0.4, 8)
    torch.library.opcheck(OPS.blocked_pack.default, (csr["row_offsets"], csr["col_indices"], 12, 8))


def test_compiles_without_a_graph_break_for_any_batch():
    _, _, weight = random_weight(300, 12, 0.4, 8)
    weight["values"].requires_grad_()

    def run(x):
        return blocked_matmul(x, **weight).relu()

    compiled = torch.compile(run, fullgraph=True, dynamic=True)
    for batch in (5, 3, 17):
        x = random(batch, 12).requires_grad_()
        assert torch.equal(compiled(x), run(x))
        leaves = [x, weight["values"]]
        got = torch.autograd.grad(compiled(x).pow(2).sum(), leaves)
        torch.testing.assert_close(got, torch.autograd.grad(run(x).pow(2).sum(), leaves))


def test_rejects_what_is_no_codebook():
    _, _, weight = random_weight(8, 12, 0.4, 8)
    with pytest.raises(TypeError, match=r"blocked_matmul: values must be uint8, got torch\.float32; pass codes, or no"):
        blocked_matmul(random(5, 12), codebook=torch.ones(2), **weight)
    _, _, weight = random_weight(8, 12, 0.4, 8, codes=7)
    with pytest.raises(ValueError, match=r"blocked_matmul: codebook must be \[entries\] with at most 256 entries, got"):
        blocked_matmul(random(5, 12), codebook=torch.ones(257), **weight)
    with pytest.raises(RuntimeError, match=r"blocked_matmul: codes must lie in \[0, 2\), got one outside"):
        blocked_matmul(random(5, 12), codebook=torch.ones(2), **weight)
