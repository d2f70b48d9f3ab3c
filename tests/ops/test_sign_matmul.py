"""sign_matmul: products of numbers with signs, their gradients, the compiler, and what it refuses."""

import pytest
import torch

from tersetorch.ops import native_op, sign_matmul, sign_matmul_inference, sign_pack, xnor_pack

OP = torch.ops.tersetorch.sign_matmul.default
SHAPES = [(1, 1, 1), (33, 64, 2), (64, 65, 3), (70, 300, 7), (40, 0, 2), (0, 9, 3), (6, 9, 0), (31, 1000, 77)]


def problem(rows, columns, batch):
    """x, the signs W, and what sign_matmul takes for them."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, columns, generator=generator) for n in (batch, rows))
    signs = torch.where(weight >= 0, 1.0, -1.0)
    return x, signs, xnor_pack(sign_pack(weight))


def near(y, x, signs, scale=1.0, bias=0.0, rounding=2.0**-24):
    """Whether y is the product but for roundings of a float32 sum, and one of the output."""
    want = x.double() @ signs.double().T * scale + bias
    size = x.double().abs().sum(-1, keepdim=True) * abs(torch.as_tensor(scale).double()) + abs(torch.as_tensor(bias))
    return bool(((y.double() - want).abs() <= (x.shape[-1] + 3) * 2.0**-24 * size + rounding * want.abs()).all())


@pytest.mark.parametrize("rows,columns,batch", SHAPES)
def test_is_the_product(rows, columns, batch):
    x, signs, packed = problem(rows, columns, batch)
    scale, bias = torch.randn(2, rows, generator=torch.Generator().manual_seed(1))
    y = sign_matmul(x, packed, out_features=rows)
    assert y.dtype == torch.float32 and near(y, x, signs)
    assert near(sign_matmul(x, packed, out_features=rows, scale=scale, bias=bias), x, signs, scale, bias)
    half = sign_matmul(x.bfloat16(), packed, out_features=rows, scale=scale, bias=bias.bfloat16())
    assert half.dtype == torch.bfloat16
    assert near(half, x.bfloat16(), signs, scale, bias.bfloat16(), rounding=2.0**-8)
    assert torch.equal(sign_matmul(x, packed, out_features=rows, relu=True), y.relu())
    assert torch.equal(sign_matmul_inference(x, packed, rows, None, None), y)


def test_a_sample_does_not_depend_on_the_others_nor_on_threads():
    x, _, packed = problem(100, 700, 80)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(sign_matmul(x, packed, out_features=100))
            results.append(torch.stack([sign_matmul(row, packed, out_features=100) for row in x]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


def test_every_level_gives_the_same_bits(run_python):
    program = (
        "import torch; from tersetorch.ops import *; g = torch.Generator().manual_seed(0);"
        "x = torch.randn(7, 300, generator=g); w = xnor_pack(sign_pack(torch.randn(70, 300, generator=g)));"
        "print(sign_matmul(x, w, out_features=70).view(torch.int32).long().sum().item())"
    )
    done = [run_python(program, TERSETORCH_CPU_ISA=level) for level in ("scalar", native_op("cpu_isa")())]
    assert all(one.returncode == 0 for one in done), [one.stderr for one in done]
    assert len({one.stdout for one in done}) == 1


def test_leading_dimensions_strides_and_what_is_not_finite():
    x, signs, packed = problem(20, 70, 12)
    y = sign_matmul(x, packed, out_features=20)
    assert torch.equal(sign_matmul(x.reshape(3, 4, 70), packed, out_features=20), y.reshape(3, 4, 20))
    assert torch.equal(sign_matmul(x[0], packed, out_features=20), y[0])
    assert torch.equal(sign_matmul(x.T.contiguous().T, packed, out_features=20), y)
    x[3, 5], x[4, 6], x[5, 7:9] = torch.nan, torch.inf, torch.tensor([torch.inf, -torch.inf])
    got = sign_matmul(x, packed, out_features=20, relu=True)
    assert torch.allclose(got, (x @ signs.T).relu(), equal_nan=True, atol=1e-5)


def test_bits_past_the_columns_count_nothing():
    x, _, packed = problem(20, 70, 3)
    dirty = packed.clone()
    dirty[:, 1] |= -1 << 6
    assert torch.equal(sign_matmul(x, dirty, out_features=20), sign_matmul(x, packed, out_features=20))


@pytest.mark.parametrize("relu", [False, True])
def test_gradients(relu):
    x, signs, packed = problem(20, 70, 5)
    inputs = [t.requires_grad_() for t in (x, torch.randn(20), torch.randn(20))]
    upstream = torch.randn(5, 20)
    y = sign_matmul(inputs[0], packed, out_features=20, scale=inputs[1], bias=inputs[2], relu=relu)
    reference = inputs[0] @ signs.T * inputs[1] + inputs[2]
    reference = reference.relu() if relu else reference
    got = torch.autograd.grad(y, inputs, upstream, create_graph=True)
    want = torch.autograd.grad(reference, inputs, upstream, create_graph=True)
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-4) for a, b in zip(got, want, strict=True))
    second = [torch.autograd.grad(grads[0].square().sum(), inputs[1])[0] for grads in (got, want)]
    assert torch.allclose(*second, rtol=1e-4, atol=1e-3)


def test_registration_is_sound():
    x, _, packed = problem(70, 130, 4)
    args = (x.requires_grad_(), packed, 70, torch.ones(70), torch.zeros(70), True)
    torch.library.opcheck(OP, args)
    compiled = torch.compile(lambda x: sign_matmul(x, packed, out_features=70), fullgraph=True)
    assert torch.equal(compiled(x), sign_matmul(x, packed, out_features=70))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(
            sign_matmul(x.half(), packed, out_features=70),
            sign_matmul(x.half().float(), packed, out_features=70).bfloat16(),
        )


def test_exports():
    class Module(torch.nn.Module):
        def __init__(self, packed):
            super().__init__()
            self.register_buffer("weight", packed)

        def forward(self, x):
            return sign_matmul(x, self.weight, out_features=70)

    x, _, packed = problem(70, 130, 4)
    program = torch.export.export(Module(packed), (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert torch.equal(program.module()(x[:3]), sign_matmul(x[:3], packed, out_features=70))


def test_refuses():
    x, _, packed = problem(20, 70, 3)
    for error, message, changes in (
        (TypeError, "x must be a tensor, got list", {"x": [1.0]}),
        (TypeError, "x must be float32 or bfloat16, got torch.float64", {"x": x.double()}),
        (TypeError, "weight must be int64", {"weight": packed.int()}),
        (TypeError, "scale must be float32", {"scale": torch.zeros(20).double()}),
        (ValueError, r"weight must be \[1, 1, 32\] for 20 rows of 60 signs", {"x": x[:, :60]}),
        (ValueError, r"weight must be \[2, 2, 32\] for 40 rows", {"out_features": 40}),
        (ValueError, r"bias must be \[20\], got shape \(19,\)", {"bias": torch.zeros(19)}),
        (ValueError, r"x must be \[..., in\], got a scalar", {"x": torch.tensor(1.0)}),
        (ValueError, "weight must be on the device of x", {"weight": packed.to("meta")}),
    ):
        with pytest.raises(error, match=message):
            sign_matmul(**{"x": x, "weight": packed, "out_features": 20, **changes})
    for arguments in ((x, packed, -1), (x, packed[:, :1], 20), (x.double(), packed, 20), (x[0, 0], packed, 20)):
        with pytest.raises(RuntimeError, match="sign_matmul: "):
            OP(*arguments)
