"""codebook_matmul against the weight that its codes stand for, at the level of this process."""

import pytest
import torch

from tersetorch import ops

KINDS = ["tensor", "rows", "blocks"]
EPSILON = torch.finfo(torch.float32).eps


def problem(rows, columns, entries, kind="tensor", seed=0):
    """Codes as the op takes them, the codebook, column_block and the dense weight."""
    g = torch.Generator().manual_seed(seed)
    block = 100 if kind == "blocks" else 0
    tables = {"tensor": 1, "rows": rows, "blocks": max(1, -(-columns // 100))}[kind]
    codebook = torch.randn(tables, entries, generator=g)
    codes = torch.randint(entries, (rows, columns), dtype=torch.uint8, generator=g)
    of = {
        "tensor": torch.zeros(1, 1),
        "rows": torch.arange(rows)[:, None],
        "blocks": torch.arange(columns)[None] // 100,
    }
    dense = codebook[of[kind].long().expand(rows, columns), codes.long()]
    packed = ops.codebook_pack(codes, entries=entries, column_block=block)
    assert torch.equal(ops.codebook_unpack(packed, entries=entries, columns=columns, column_block=block), codes)
    return packed, codebook, block, dense


def inputs(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rounded(values, scale_of):
    """int8 values and their scales, a scale for all that scale_of reduces."""
    largest = scale_of(values.abs())
    return (values * torch.where(largest > 0, 127 / largest, 0)).round(), (largest / 127).double()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("entries", [1, 3, 16, 17, 33, 256])
@pytest.mark.parametrize("columns", [0, 1, 64, 129, 257])
def test_equals_the_dense_product(kind, entries, columns):
    for rows in (1, 7):
        codes, codebook, block, dense = problem(rows, columns, entries, kind)
        bias = inputs(rows, seed=2)
        for batch in (0, 1, 3, 8, 9, 17, 65):
            x = inputs(batch, columns)
            for mode in ops.CODEBOOK_MODES[:2]:
                w, x_of_mode = (dense, x) if mode == "exact" else (dense.bfloat16().float(), x.bfloat16().float())
                y = ops.codebook_matmul(x, codes, codebook, bias, block, mode)
                size = x_of_mode.double().abs() @ w.double().abs().T + bias.double().abs()
                error = (y - (x_of_mode.double() @ w.double().T + bias.double())).abs()
                assert (error <= (columns + 4) * EPSILON / 2 * size).all(), (rows, batch, mode)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("entries", [4, 16, 200])
def test_int8_has_the_bits_of_its_formula(kind, entries):
    codes, codebook, block, _ = problem(13, 300, entries, kind)
    for batch in (1, 5, 33):
        x = inputs(batch, 300)
        q, s = rounded(x, lambda v: v.amax(1, keepdim=True))
        table, t = rounded(codebook, lambda v: v.amax(1, keepdim=True) if kind == "rows" else v.max())
        v = ops.codebook_dense(codes, table, columns=300, column_block=block)
        total = (q.double() @ v.double().T).float()
        t = t.float().reshape(1, -1)
        low, high = torch.minimum(s.float(), t), torch.maximum(s.float(), t)
        want = (total * low).double() * high.double() + inputs(13, seed=2).double()
        got = ops.codebook_matmul(x, codes, codebook, inputs(13, seed=2), block, "int8")
        assert torch.equal(got, want.float())


def test_relu_strides_and_bfloat16():
    codes, codebook, _, dense = problem(9, 70, 16)
    x = inputs(4, 70, 3).transpose(1, 2)
    y = ops.codebook_matmul(x, codes, codebook, relu=True)
    torch.testing.assert_close(y, torch.relu(x @ dense.T))
    half = ops.codebook_matmul(x.bfloat16(), codes, codebook)
    assert half.dtype == torch.bfloat16 and half.shape == (4, 3, 9)
    torch.testing.assert_close(half.float(), x.bfloat16().float() @ dense.T, rtol=0.01, atol=0.02)
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.codebook_matmul(x, codes, codebook).dtype == torch.bfloat16


@pytest.mark.parametrize("batch", [1, 4, 20])
def test_what_is_not_finite_spreads_as_in_a_dense_product(batch):
    for entries in (4, 16, 32, 256):
        codes, codebook, _, _ = problem(6, 131, entries)
        codebook[0, 0] = torch.nan
        codebook[0, 1] = torch.inf
        dense = ops.codebook_dense(codes, codebook, columns=131)
        x = inputs(batch, 131)
        x[0, 3] = torch.inf
        got, want = ops.codebook_matmul(x, codes, codebook), x @ dense.T
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4, equal_nan=True)
        # Entry 0 is NaN, and codes of no column are 0.
        alone = ops.codebook_pack(torch.ones(6, 131, dtype=torch.uint8), entries=entries)
        finite = codebook.nan_to_num(0, 2)
        finite[0, 0] = torch.nan
        assert ops.codebook_matmul(inputs(batch, 131), alone, finite).isfinite().all()
        assert ops.codebook_matmul(x, codes, codebook.nan_to_num(0, 2), mode="int8")[0].isnan().all()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_and_their_gradients(kind):
    codes, codebook, block, _ = problem(5, 110, 5, kind)
    x, bias = inputs(3, 110).requires_grad_(), inputs(5).requires_grad_()
    codebook.requires_grad_()
    twin = [t.detach().clone().requires_grad_() for t in (x, codebook, bias)]
    index = ops.codebook_unpack(codes, entries=5, columns=110, column_block=block).long()
    table = {
        "tensor": torch.zeros(1, 1, dtype=torch.int64),
        "rows": torch.arange(5)[:, None],
        "blocks": torch.arange(110)[None] // 100,
    }[kind].expand(5, 110)
    y = ops.codebook_matmul(x, codes, codebook, bias, block, relu=True)
    want = torch.relu(twin[0] @ twin[1][table, index].T + twin[2])
    upstream = inputs(3, 5, seed=4)
    first = torch.autograd.grad((y * upstream).sum() + y.square().sum(), (x, codebook, bias), create_graph=True)
    expected = torch.autograd.grad((want * upstream).sum() + want.square().sum(), twin, create_graph=True)
    for a, b in zip(first, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), (x, codebook))
    expected = torch.autograd.grad(sum(g.square().sum() for g in expected), twin[:2])
    for a, b in zip(second, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-1)


def test_opcheck_compile_and_export():
    codes, codebook, block, _ = problem(7, 130, 16, "blocks")
    x = inputs(3, 130)
    codebook.requires_grad_()
    torch.library.opcheck(
        torch.ops.tersetorch.codebook_matmul.default, (x.requires_grad_(), codes, codebook, None, block)
    )
    torch.library.opcheck(torch.ops.tersetorch.codebook_dense.default, (codes, codebook, 130, block))
    torch.library.opcheck(torch.ops.tersetorch.codebook_reduce.default, (inputs(7, 130), codes, 2, 16, block))
    torch.library.opcheck(torch.ops.tersetorch.codebook_pack.default, (torch.zeros(2, 9, dtype=torch.uint8), 3))
    torch.library.opcheck(torch.ops.tersetorch.codebook_unpack.default, (codes, 16, 130, block))
    compiled = torch.compile(
        lambda t: ops.codebook_matmul(t, codes, codebook, None, block).relu(), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(x), ops.codebook_matmul(x, codes, codebook, None, block).relu())


@pytest.mark.parametrize("entries", [3, 10, 20, 200])
@pytest.mark.parametrize("mode", ops.CODEBOOK_MODES)
def test_a_code_outside_its_table_is_an_error(entries, mode):
    codes, codebook, _, _ = problem(9, 200, entries)
    codes[8, 60] = 255
    for batch in (1, 8, 20):
        with pytest.raises(RuntimeError, match=rf"codes must lie in \[0, {entries}\), got one outside"):
            ops.codebook_matmul(inputs(batch, 200), codes, codebook, mode=mode)
    for call in (
        lambda: ops.codebook_dense(codes, codebook, columns=200),
        lambda: torch.ops.tersetorch.codebook_reduce(inputs(9, 200), codes, 1, entries),
    ):
        with pytest.raises(RuntimeError, match="got one outside"):
            call()


def test_bad_input_is_refused():
    codes, codebook, _, _ = problem(4, 70, 16)
    x = inputs(2, 70)
    for arguments, error, sentence in (
        ((None, codes, codebook), TypeError, "x must be a tensor, got NoneType"),
        ((x.double(), codes, codebook), TypeError, "x must be float32 or bfloat16, got torch.float64"),
        ((x, codes.int(), codebook), TypeError, "codes must be uint8, got torch.int32"),
        ((x, codes, codebook[0]), ValueError, r"codebook must be \[tables, entries\]"),
        ((x, codes, codebook[:, :0]), ValueError, "with 1 to 256 entries"),
        ((inputs(2, 129), codes, codebook), ValueError, r"codes must be \[out, 128\] for 129 features"),
        ((x, codes, codebook.expand(3, 16)), ValueError, "codebook must have 1 or 4 tables, got 3"),
        ((x, codes, codebook, inputs(5)), ValueError, r"bias must be \[4\]"),
        ((x, codes, codebook, None, -1), ValueError, "column_block must be at least 0, got -1"),
        ((x, codes, codebook, None, 0, "int4"), ValueError, "mode must be one of"),
    ):
        with pytest.raises(error, match=sentence):
            ops.codebook_matmul(*arguments)
    with pytest.raises(RuntimeError, match=r"codes must lie in \[0, 3\), got 3"):
        ops.codebook_pack(torch.full((2, 2), 3, dtype=torch.uint8), entries=3)
    with pytest.raises(RuntimeError, match="1 to 256 entries"):
        ops.codebook_pack(torch.zeros(2, 2, dtype=torch.uint8), entries=257)
    with pytest.raises(RuntimeError, match="mode must be 'exact' where gradients are asked for"):
        ops.codebook_matmul(x.requires_grad_(), codes, codebook, mode="int8").sum().backward()
