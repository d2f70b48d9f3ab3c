"""product_matmul: the answer, its gradients, the compiler, and what it refuses."""

import pytest
import torch
from torch import nn

from tersetorch import ops

# rows, columns, width, entries, stages, shared
SHAPES = [
    (1, 1, 1, 1, 1, False),
    (65, 18, 2, 16, 1, False),
    (130, 67, 4, 15, 1, True),
    (70, 66, 3, 256, 1, False),
    (37, 41, 5, 100, 2, False),
    (64, 31, 31, 16, 3, False),
    (5, 8, 16, 40, 1, False),
]


def make(rows, columns, width, entries, stages, shared, seed=0):
    generator = torch.Generator().manual_seed(seed)
    segments = -(-columns // width)
    codes = torch.randint(entries, (rows, stages * segments), generator=generator).to(torch.uint8)
    codebooks = torch.randn(stages, 1 if shared else segments, width, entries, generator=generator)
    return codes, codebooks


def dense_of(codes, codebooks, columns):
    """The formula, stage by stage and segment by segment."""
    stages, books, width, _ = codebooks.shape
    segments = -(-columns // width)
    parts = [
        sum(codebooks[t, 0 if books == 1 else s][:, codes[:, t * segments + s].long()].T for t in range(stages))
        for s in range(segments)
    ]
    return torch.cat(parts, 1)[:, :columns]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("samples", [0, 1, 2, 7, 12, 25])
def test_is_the_formula(shape, samples):
    codes, codebooks = make(*shape)
    rows, columns = shape[:2]
    weight = dense_of(codes, codebooks, columns)
    packed = ops.product_pack(codes, shape[3])
    decoded = ops.product_decode(packed, codebooks, out_features=rows, in_features=columns)
    assert torch.allclose(decoded, weight, atol=1e-6)
    x, bias = torch.randn(samples, columns), torch.randn(rows)
    y = ops.product_matmul(x, packed, codebooks, bias, out_features=rows)
    assert torch.allclose(y, x @ weight.T + bias, atol=1e-4)
    relu = ops.product_matmul_inference(x, packed, codebooks, bias, rows, "exact", True)
    assert torch.equal(relu, y.relu())
    half = ops.product_matmul(x.bfloat16(), packed, codebooks, bias, out_features=rows)
    assert half.dtype == torch.bfloat16
    assert torch.allclose(half.float(), x.bfloat16().float() @ weight.T + bias, atol=0.1, rtol=0.02)


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_keeps_to_its_bound(shape):
    codes, codebooks = make(*shape)
    rows, columns, width = shape[:3]
    x = torch.randn(3, columns)
    packed = ops.product_pack(codes, shape[3])
    exact = ops.product_matmul(x, packed, codebooks, out_features=rows)
    y = ops.product_matmul(x, packed, codebooks, out_features=rows, mode="int8")
    segments = -(-columns // width)
    padded = nn.functional.pad(x, (0, segments * width - columns)).view(3, 1, segments, width, 1)
    tables = (padded * codebooks.expand(-1, segments, -1, -1)).sum(3).flatten(1, 2)
    step = (tables.amax(-1) - tables.amin(-1)).amax(-1) / 255
    assert ((y - exact).abs() <= (tables.shape[1] * step / 2)[:, None] * 1.01 + 1e-4).all()


def test_int8_of_samples_that_are_not_finite_is_nan():
    codes, codebooks = make(65, 18, 2, 16, 1, False)
    x = torch.zeros(3, 18)
    x[1, 4] = torch.inf
    y = ops.product_matmul(x, ops.product_pack(codes, 16), codebooks, out_features=65, mode="int8")
    assert y[1].isnan().all() and torch.equal(y[[0, 2]], torch.zeros(2, 65))


def test_any_leading_dimensions_and_strides():
    codes, codebooks = make(10, 12, 4, 16, 1, False)
    packed = ops.product_pack(codes, 16)
    x = torch.randn(12, 3, 2).permute(1, 2, 0)
    y = ops.product_matmul(x, packed, codebooks, out_features=10)
    assert y.shape == (3, 2, 10)
    assert torch.allclose(y, x @ dense_of(codes, codebooks, 12).T, atol=1e-5)
    assert torch.allclose(ops.product_matmul(x[0, 0], packed, codebooks, out_features=10), y[0, 0], atol=1e-6)


@pytest.mark.parametrize("entries", [1, 15, 16, 17, 256])
@pytest.mark.parametrize("rows, tables", [(1, 1), (64, 8), (65, 9), (0, 3), (3, 0)])
def test_packing_is_undone(entries, rows, tables):
    codes = torch.randint(entries, (rows, tables)).to(torch.uint8)
    packed = ops.product_pack(codes, entries)
    assert packed.numel() == ops.product_bytes(rows, tables, entries)
    assert torch.equal(ops.product_unpack(packed, entries, rows=rows, tables=tables), codes)


@pytest.mark.parametrize("shape", [SHAPES[2], SHAPES[4], SHAPES[5]])
@pytest.mark.parametrize("relu", [False, True])
def test_gradients_are_those_of_the_dense_product(shape, relu):
    codes, codebooks = make(*shape)
    rows, columns = shape[:2]
    packed = ops.product_pack(codes, shape[3])
    x, bias = torch.randn(4, columns, requires_grad=True), torch.randn(rows, requires_grad=True)
    codebooks.requires_grad_()
    y = ops.product_matmul(x, packed, codebooks, bias, out_features=rows, relu=relu)
    weight = dense_of(codes, codebooks, columns)
    reference = x @ weight.T + bias
    reference = reference.relu() if relu else reference
    seed = torch.randn_like(y)
    got = torch.autograd.grad(y, (x, codebooks, bias), seed)
    expected = torch.autograd.grad(reference, (x, codebooks, bias), seed)
    for a, b in zip(got, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-3)


def test_gradients_of_gradients():
    codes, codebooks = make(9, 10, 4, 5, 2, False)
    packed = ops.product_pack(codes, 5)
    x = torch.randn(3, 10, requires_grad=True)
    codebooks.requires_grad_()

    def norm(weight_of):
        y = weight_of()
        grads = torch.autograd.grad(y.square().sum(), (x, codebooks), create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in grads), (x, codebooks))

    got = norm(lambda: ops.product_matmul(x, packed, codebooks, out_features=9))
    expected = norm(lambda: x @ dense_of(codes, codebooks, 10).T)
    for a, b in zip(got, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-2)


def test_decode_has_a_gradient():
    codes, codebooks = make(9, 10, 4, 5, 1, True)
    codebooks.requires_grad_()
    seed = torch.randn(9, 10)
    weight = ops.product_decode(ops.product_pack(codes, 5), codebooks, out_features=9, in_features=10)
    (got,) = torch.autograd.grad(weight, codebooks, seed)
    (expected,) = torch.autograd.grad(dense_of(codes, codebooks, 10), codebooks, seed)
    assert torch.allclose(got, expected, atol=1e-5)


def test_int8_refuses_gradients():
    codes, codebooks = make(9, 10, 4, 5, 1, False)
    x = torch.randn(2, 10, requires_grad=True)
    y = ops.product_matmul(x, ops.product_pack(codes, 5), codebooks, out_features=9, mode="int8")
    with pytest.raises(RuntimeError, match="mode must be 'exact' to compute gradients"):
        y.sum().backward()


def test_opcheck():
    codes, codebooks = make(9, 10, 4, 5, 1, False)
    x, bias = torch.randn(3, 10, requires_grad=True), torch.randn(9, requires_grad=True)
    packed = ops.product_pack(codes, 5)
    codebooks.requires_grad_()
    torch.library.opcheck(torch.ops.tersetorch.product_matmul.default, (x, packed, codebooks, bias, 9))
    torch.library.opcheck(torch.ops.tersetorch.product_decode.default, (packed, codebooks, 9, 10))


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        codes, codebooks = make(9, 10, 4, 5, 1, False)
        self.register_buffer("codes", ops.product_pack(codes, 5))
        self.codebooks = nn.Parameter(codebooks)

    def forward(self, x):
        return ops.product_matmul(x, self.codes, self.codebooks, out_features=9).relu()


def test_compiles_and_exports():
    layer, x = Layer(), torch.randn(3, 10)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))
    compiled(x).sum().backward()
    compiled_grad, layer.codebooks.grad = layer.codebooks.grad, None
    layer(x).sum().backward()
    assert torch.allclose(compiled_grad, layer.codebooks.grad)
    exported = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("n", min=2)},))
    assert torch.equal(exported.module()(torch.ones(5, 10)), layer(torch.ones(5, 10)))


def test_autocast_computes_in_float32():
    codes, codebooks = make(9, 10, 4, 5, 1, False)
    packed, x = ops.product_pack(codes, 5), torch.randn(3, 10)
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.product_matmul(x, packed, codebooks, out_features=9)
    assert torch.equal(y, ops.product_matmul(x, packed, codebooks, out_features=9).bfloat16())


def test_codes_past_the_entries_raise():
    codes, codebooks = make(70, 10, 4, 5, 1, False)
    for entries, bad in ((5, 5), (100, 100)):
        books = codebooks[..., :1].expand(-1, -1, -1, entries).contiguous()
        packed = ops.product_pack(codes, entries).clone()
        broken = codes.clone()
        broken[69, 2] = bad
        ops.product_matmul(torch.randn(1, 10), packed, books, out_features=70)
        for call in (
            lambda p, b=books: ops.product_matmul(torch.randn(1, 10), p, b, out_features=70),
            lambda p, b=books: ops.product_decode(p, b, out_features=70, in_features=10),
        ):
            with pytest.raises(RuntimeError, match=rf"codes must lie in \[0, {entries}\)"):
                call(ops.product_pack(broken, entries))


@pytest.mark.parametrize(
    "change, error, sentence",
    [
        ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
        ({"x": torch.ones(2, 10, dtype=torch.int32)}, TypeError, "x must be float32 or bfloat16, got torch.int32"),
        ({"x": torch.tensor(1.0)}, ValueError, "x must be .* got a scalar"),
        ({"x": torch.ones(2, 13)}, ValueError, "codebooks must have 1 segment or the 4 that 13 features"),
        ({"codes": torch.zeros(5)}, TypeError, "codes must be uint8"),
        ({"codes": torch.zeros(5, dtype=torch.uint8)}, ValueError, "codes must have 256 bytes for 9 rows of 3 codes"),
        ({"codebooks": torch.ones(3)}, ValueError, "codebooks must be .* got shape"),
        ({"codebooks": torch.ones(1, 3, 4, 257)}, ValueError, "at most 256 entries"),
        ({"codebooks": torch.ones(1, 3, 4, 5).double()}, TypeError, "codebooks must be float32"),
        ({"bias": torch.ones(8)}, ValueError, r"bias must be \[9\]"),
        ({"mode": "fast"}, ValueError, "mode must be one of"),
        ({"out_features": -1}, ValueError, "out_features must be at least 0"),
    ],
)
def test_bad_input_is_refused(change, error, sentence):
    codes, codebooks = make(9, 10, 4, 5, 1, False)
    arguments = {
        "x": torch.ones(2, 10),
        "codes": ops.product_pack(codes, 5),
        "codebooks": codebooks,
        "bias": None,
        "out_features": 9,
    }
    with pytest.raises(error, match=sentence):
        ops.product_matmul(**arguments | change)


def test_native_checks_are_the_second_line():
    codes, codebooks = make(9, 10, 4, 5, 1, False)
    packed = ops.product_pack(codes, 5)
    with pytest.raises(RuntimeError, match="codes must be 256 bytes"):
        ops.product_matmul_inference(torch.ones(2, 10), packed[:, :9], codebooks, None, 9)
    with pytest.raises(RuntimeError, match="codebooks must be of 1 segment or of the"):
        ops.product_matmul_inference(torch.ones(2, 13), packed, codebooks, None, 9)
    with pytest.raises(RuntimeError, match='mode must be "exact" or "int8"'):
        ops.product_matmul_inference(torch.ones(2, 10), packed, codebooks, None, 9, "half")
