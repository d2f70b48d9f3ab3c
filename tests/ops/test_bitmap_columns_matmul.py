import pytest
import torch

from tersetorch.ops import bitmap_columns_matmul, bitmap_columns_matmul_inference, bitmap_pack

OPS = torch.ops.tersetorch
EPSILON = 2.0**-24  # half a unit of float32


def random(*shape, seed=1, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def sparse_random(*shape, seed=1):
    """A third is 0, some of it -0.0."""
    x = random(*shape, seed=seed)
    return torch.where(x.abs() < 0.43, 0.0 * x, x)


def random_weight(rows, columns, density, seed=0, entries=None):
    g = torch.Generator().manual_seed(seed)
    kept = torch.rand(columns, rows, generator=g) < density
    dense = torch.where(kept, torch.randn(columns, rows, generator=g), 0.0)
    bitmap, column_offsets, values = bitmap_pack(dense)
    weight = {"bitmap": bitmap, "column_offsets": column_offsets, "values": values, "out_features": rows}
    if entries is not None:
        table = torch.cat([torch.zeros(1), torch.randn(entries - 1, generator=g)])
        codes = torch.randint(1, entries, values.shape, generator=g)
        dense = torch.zeros_like(dense).masked_scatter(kept, table[codes])
        weight |= {"values": codes.to(torch.uint8), "codebook": table}
    return dense.T, weight


KINDS = [{}, {"entries": 2}, {"entries": 32}, {"entries": 256}]


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


SHAPES = [(1, 1), (17, 10), (784, 90), (64, 64), (65, 65), (4096, 9), (1009, 127), (0, 64), (5, 0), (70_001, 2)]


@pytest.mark.parametrize("rows,columns", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_equals_the_dense_product(rows, columns, kind, batch):
    dense, weight = random_weight(rows, columns, 0.3, **kind)
    x, bias = sparse_random(batch, columns), random(rows, seed=2)
    y = bitmap_columns_matmul(x, bias=bias, **weight)
    assert y.dtype == torch.float32
    assert_close_sum(y, x, dense.T, bias)
    assert torch.equal(bitmap_columns_matmul_inference(x, bias=bias, **weight), y)
    assert torch.equal(bitmap_columns_matmul(x, bias=bias, relu=True, **weight), y.relu())
    y = bitmap_columns_matmul(x.bfloat16(), **weight)
    assert y.dtype == torch.bfloat16
    assert_close_sum(y, x.bfloat16(), dense.T)
    if not kind:
        y = bitmap_columns_matmul(x, **weight | {"values": weight["values"].bfloat16()})
        assert_close_sum(y, x, dense.bfloat16().T)


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_of_x_skip_whatever_they_meet(kind):
    dense, weight = random_weight(70, 50, 0.5, **kind)
    x = sparse_random(2, 50)
    x[:, 7] = 0
    if not kind:
        start, end = weight["column_offsets"][7:9]
        weight["values"][start:end] = float("nan")
        dense = dense.clone()
        dense[:, 7] = 0
    assert_close_sum(bitmap_columns_matmul(x, **weight), x, dense.T)
    assert torch.equal(bitmap_columns_matmul(torch.zeros(1, 50), **weight), torch.zeros(1, 70))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_missing_weight_never_meets_x(kind, value):
    dense, weight = random_weight(130, 40, 0.2, **kind)
    x = sparse_random(2, 40)
    x[1, 30] = value
    y = bitmap_columns_matmul(x, **weight)
    assert bool(y[0].isfinite().all())
    assert torch.equal(y[1].isfinite(), dense[:, 30] == 0)


def test_accepts_leading_dimensions_and_strides():
    dense, weight = random_weight(12, 30, 0.4)
    x = sparse_random(4, 3, 60)
    for view in (x[..., ::2], x[..., :30].transpose(0, 1), x[:, 0, 30:], x[0, 0, 1::2]):
        y = bitmap_columns_matmul(view, **weight)
        assert y.shape == (*view.shape[:-1], 12)
        assert_close_sum(y.reshape(-1, 12), view.reshape(-1, 30), dense.T)


@pytest.mark.parametrize("kind", KINDS)
def test_threads_do_not_change_a_bit(kind):
    _, weight = random_weight(5000, 801, 0.3, **kind)
    x = sparse_random(1, 801)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = bitmap_columns_matmul(x, **weight)
        for several in (2, 3):
            torch.set_num_threads(several)
            assert torch.equal(bitmap_columns_matmul(x, **weight), alone)
    finally:
        torch.set_num_threads(threads)


# ---- gradients


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("leading", [(), (3,), (2, 3)])
def test_gradients_are_those_of_the_dense_product(kind, relu, leading):
    dense, weight = random_weight(20, 50, 0.4, **kind)
    x, bias, grad_y = (
        sparse_random(*leading, 50).requires_grad_(),
        random(20, seed=2).requires_grad_(),
        random(*leading, 20),
    )
    learned = weight.get("codebook", weight["values"]).requires_grad_()
    values = learned[weight["values"].int()] if kind else learned
    same = torch.zeros(50, 20).masked_scatter(dense.T != 0, values)
    want = x @ same + bias
    want = want.relu() if relu else want
    y = bitmap_columns_matmul(x, bias=bias, relu=relu, **weight)
    got = torch.autograd.grad(y, (x, bias, learned), grad_y)
    torch.testing.assert_close(got, torch.autograd.grad(want, (x, bias, learned), grad_y))


def test_second_derivatives_are_those_of_the_dense_product():
    dense, weight = random_weight(8, 12, 0.4)

    def penalty(y, x, w):
        grad_x, grad_w = torch.autograd.grad(y.pow(3).sum(), (x, w), create_graph=True)
        return torch.autograd.grad(grad_x.pow(2).sum() + grad_w.pow(2).sum(), (x, w))

    x, values = random(5, 12).requires_grad_(), weight["values"].requires_grad_()
    got = penalty(bitmap_columns_matmul(x, **weight), x, values)
    want = penalty(x @ torch.zeros(12, 8).masked_scatter(dense.T != 0, values), x, values)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-2)


def test_forward_mode_is_refused_instead_of_returning_zero():
    _, weight = random_weight(8, 12, 0.4)
    x = random(5, 12)
    with pytest.raises(RuntimeError, match="bitmap_columns_matmul: x must not carry a forward-mode tangent"):
        torch.func.jvp(lambda x: bitmap_columns_matmul(x, **weight), (x,), (x,))


# ---- PyTorch


@pytest.mark.parametrize("kind", KINDS[::2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_registration_is_sound(kind, dtype):
    _, weight = random_weight(8, 12, 0.4, **kind)
    x, bias = random(5, 12, dtype=dtype), random(8, seed=2)
    names = ("bitmap", "column_offsets", "values")
    arguments = (x, *(weight[n] for n in names), bias, weight.get("codebook"), 8)
    torch.library.opcheck(OPS.bitmap_columns_matmul_inference.default, (*arguments, True))
    for leaf in (x, bias, weight.get("codebook", weight["values"])):
        leaf.requires_grad_()
    torch.library.opcheck(OPS.bitmap_columns_matmul.default, arguments)
    torch.library.opcheck(OPS.bitmap_columns_matmul.default, (*arguments, True))


def test_compiles_and_exports_for_any_batch():
    _, weight = random_weight(8, 12, 0.4)

    class Layer(torch.nn.Module):
        def forward(self, x):
            return bitmap_columns_matmul(x, relu=True, **weight)

    compiled = torch.compile(Layer(), fullgraph=True, dynamic=True)
    exported = torch.export.export(Layer(), (random(5, 12),), dynamic_shapes={"x": {0: torch.export.Dim("batch")}})
    for batch in (3, 17):
        x = sparse_random(batch, 12)
        want = bitmap_columns_matmul(x, relu=True, **weight)
        assert torch.equal(compiled(x), want) and torch.equal(exported.module()(x), want)


def test_autocast_computes_in_float32_and_casts_the_result():
    _, weight = random_weight(8, 12, 0.4)
    x = random(5, 12)
    want = bitmap_columns_matmul(x, **weight).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(bitmap_columns_matmul(x, **weight), want)


# ---- bad input


_, GOOD = random_weight(70, 3, 0.5)
GOOD["x"] = torch.ones(2, 3)
NNZ = GOOD["values"].numel()
CODES = {"values": torch.ones(NNZ, dtype=torch.uint8), "codebook": torch.tensor([0.0, 1.0])}


@pytest.mark.parametrize(
    "bad,error,match",
    [
        ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
        ({"x": torch.tensor(1.0)}, ValueError, r"x must be \[\.\.\., in\], got a scalar"),
        (
            {"x": torch.zeros(2, 4)},
            ValueError,
            r"bitmap must be \[4, 2\] for 4 features and 70 outputs, got .*\(3, 2\)",
        ),
        ({"out_features": 64}, ValueError, r"bitmap must be \[3, 1\] for 3 features and 64 outputs"),
        ({"out_features": -1}, ValueError, "out_features must be at least 0, got -1"),
        ({"bitmap": GOOD["bitmap"].int()}, TypeError, r"bitmap must be int64, got torch\.int32"),
        ({"column_offsets": GOOD["column_offsets"][1:]}, ValueError, r"column_offsets must be \[4\], got shape \(3,\)"),
        ({"values": torch.ones(NNZ, 1)}, ValueError, r"values must be \[nnz\]"),
        ({"values": CODES["values"]}, TypeError, "values must be float32 or bfloat16, got .*; pass the codebook"),
        ({"codebook": CODES["codebook"]}, TypeError, r"values must be uint8, got torch\.float32; pass codes"),
        (CODES | {"codebook": torch.ones(257)}, ValueError, "codebook must be .* at most 256.*"),
        ({"bias": torch.zeros(2)}, ValueError, r"bias must be \[70\], got shape \(2,\)"),
        ({"values": torch.ones(NNZ, device="meta")}, ValueError, "values must be on the device of x, cpu, got meta"),
    ],
)
def test_rejects(bad, error, match):
    with pytest.raises(error, match=f"bitmap_columns_matmul: {match}"):
        bitmap_columns_matmul(**GOOD | bad)


@pytest.mark.parametrize(
    "bad,match",
    [
        ({"bitmap": ~GOOD["bitmap"] & torch.tensor([-1, 63])}, "bitmap must have a bit for each value"),
        ({"bitmap": GOOD["bitmap"] | torch.tensor([0, 1 << 40])}, "bitmap must have a bit .* none past the last"),
        ({"values": GOOD["values"][:-1]}, "column_offsets must never fall and stay in"),
        (CODES | {"values": torch.full((NNZ,), 2, dtype=torch.uint8)}, r"codes must lie in \[0, 2\)"),
        (CODES | {"codebook": torch.ones(2)}, "codebook must begin with 0"),
        ({"values": torch.ones(NNZ, dtype=torch.int8)}, "values must be float32, bfloat16 or uint8 codes"),
        ({"x": torch.ones(2, 4)}, r"bitmap must be \[4, 2\] for x's features, got 3 columns"),
        ({"out_features": 64}, r"bitmap must be \[.*, 1\] for 64 outputs, got 2 words"),
        ({"column_offsets": GOOD["column_offsets"][1:]}, r"column_offsets must be \[4\], got 3"),
    ],
)
def test_damaged_weights_are_refused(bad, match):
    with pytest.raises(RuntimeError, match=f"bitmap_columns_matmul: {match}"):
        bitmap_columns_matmul_inference(**GOOD | bad)
