"""xnor_matmul: exact products of signs, their three outputs, the compiler, and what it refuses."""

import pytest
import torch

from tersetorch.ops import sign_pack, xnor_matmul, xnor_pack, xnor_unpack

OP = torch.ops.tersetorch.xnor_matmul.default
SHAPES = [(1, 1, 1), (33, 64, 2), (64, 65, 3), (70, 300, 5), (40, 0, 2), (0, 9, 3), (6, 9, 0), (31, 1000, 300)]


def signs(x):
    return torch.where(x >= 0, 1.0, -1.0).double()


def problem(rows, columns, batch):
    """x, W, what xnor_matmul takes for W, and the product of their signs."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, columns, generator=generator) for n in (batch, rows))
    sizes = {"weight": xnor_pack(sign_pack(weight)), "in_features": columns, "out_features": rows}
    return x, weight, sizes, signs(x) @ signs(weight).T


@pytest.mark.parametrize("rows,columns,batch", SHAPES)
def test_is_the_product_of_signs(rows, columns, batch):
    x, _, sizes, want = problem(rows, columns, batch)
    for samples in (x, x.bfloat16(), sign_pack(x)):
        y = xnor_matmul(samples, **sizes)
        assert y.dtype == torch.int32 and torch.equal(y.double(), want)
    scale, bias = torch.randn(rows), torch.randn(rows)
    scaled = xnor_matmul(x, **sizes, scale=scale, bias=bias)
    assert torch.allclose(scaled.double(), want * scale + bias, rtol=1e-6, atol=1e-4)
    assert torch.equal(xnor_matmul(x, **sizes, scale=scale).double(), (want.float() * scale).double())


@pytest.mark.parametrize("rows,columns,batch", SHAPES)
def test_thresholds_give_the_signs_of_the_next_product(rows, columns, batch):
    x, _, sizes, want = problem(rows, columns, batch)
    thresholds = torch.randint(-columns - 1, columns + 2, (rows,)).int()
    if batch:
        thresholds[: rows // 2] = want[0, : rows // 2].int()  # ties
    bits = xnor_matmul(x, **sizes, thresholds=thresholds)
    assert torch.equal(bits, sign_pack((want >= thresholds).float() * 2 - 1))


@pytest.mark.parametrize("taps,channels", [(9, 3), (4, 64), (6, 70)])
def test_unused_bits_between_the_columns_count_nothing(taps, channels):
    x, weight, _, want = problem(40, taps * channels, 5)
    bits = [sign_pack(t.view(-1, taps, channels)).flatten(1) for t in (x, weight)]
    sizes = {"weight": xnor_pack(bits[1]), "in_features": taps * channels, "out_features": 40}
    assert torch.equal(xnor_matmul(bits[0], **sizes).double(), want)
    thresholds = want[0].int()
    signs_of = xnor_matmul(bits[0], **sizes, thresholds=thresholds)
    assert torch.equal(signs_of, sign_pack((want >= thresholds).float() * 2 - 1))


def test_leading_dimensions_and_strides():
    x, weight, sizes, want = problem(20, 70, 12)
    assert torch.equal(xnor_matmul(x.reshape(3, 4, 70), **sizes).double(), want.reshape(3, 4, 20))
    assert torch.equal(xnor_matmul(x[0], **sizes).double(), want[0])
    assert torch.equal(xnor_matmul(x.T.contiguous().T, **sizes).double(), want)
    assert torch.equal(xnor_unpack(sizes["weight"], 20), sign_pack(weight))


def test_the_number_of_threads_changes_nothing():
    x, _, sizes, _ = problem(300, 500, 64)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(xnor_matmul(x, **sizes, scale=torch.linspace(-1, 1, 300)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("extra", [{}, {"scale": torch.ones(70)}, {"thresholds": torch.zeros(70, dtype=torch.int32)}])
def test_registration_is_sound(extra):
    x, _, sizes, _ = problem(70, 130, 4)
    torch.library.opcheck(OP, (x, *sizes.values()), extra)
    compiled = torch.compile(lambda x: xnor_matmul(x, **sizes, **extra), fullgraph=True)
    assert torch.equal(compiled(x), xnor_matmul(x, **sizes, **extra))


def test_exports():
    class Module(torch.nn.Module):
        def __init__(self, sizes):
            super().__init__()
            self.register_buffer("weight", sizes["weight"])

        def forward(self, x):
            return xnor_matmul(x, self.weight, in_features=130, out_features=70)

    x, _, sizes, _ = problem(70, 130, 4)
    program = torch.export.export(Module(sizes), (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert torch.equal(program.module()(x[:3]), xnor_matmul(x[:3], **sizes))


def test_refuses():
    x, _, sizes, _ = problem(20, 70, 3)
    wide = xnor_pack(torch.zeros(20, 3, dtype=torch.int64))

    def call(**changes):
        return xnor_matmul(**{"x": x, **sizes, **changes})

    for error, message, changes in (
        (TypeError, "x must be a tensor, got list", {"x": [1.0]}),
        (TypeError, "x must be float32, bfloat16 or int64", {"x": x.double()}),
        (TypeError, "weight must be int64", {"weight": sizes["weight"].int()}),
        (TypeError, "thresholds must be int32", {"thresholds": torch.zeros(20)}),
        (ValueError, r"x must be \[..., 70\], got shape \(3, 69\)", {"x": x[:, 1:]}),
        (ValueError, r"x must be \[..., 2\], got shape \(3, 1\)", {"x": sign_pack(x)[:, :1]}),
        (ValueError, r"weight must be \[1, 2 or more, 32\] for 20 rows", {"weight": sizes["weight"][:, :1]}),
        (ValueError, "x must be packed for a weight of 3 words a row", {"weight": wide}),
        (ValueError, r"x must be \[..., 3\], got shape \(3, 2\)", {"weight": wide, "x": sign_pack(x)}),
        (ValueError, r"bias must be \[20\], got shape \(19,\)", {"bias": torch.zeros(19)}),
        (
            ValueError,
            "thresholds stand in for scale and bias",
            {
                "scale": torch.ones(20),
                "thresholds": torch.zeros(20, dtype=torch.int32),
            },
        ),
    ):
        with pytest.raises(error, match=message):
            call(**changes)
    with pytest.raises(RuntimeError, match="xnor_matmul: weight must be int64"):
        OP(x, sizes["weight"].int(), 70, 20)
    with pytest.raises(RuntimeError, match="xnor_matmul: x must be packed for a weight of 3 words"):
        OP(x, wide, 70, 20)
    with pytest.raises(TypeError, match="bits must be an int64 tensor"):
        xnor_pack(torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"bits must be \[out, words\]"):
        xnor_pack(torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize(("size", "error"), [(70.0, TypeError), ("70", TypeError), (-5, ValueError)])
@pytest.mark.parametrize("name", ["in_features", "out_features"])
def test_refuses_sizes_that_are_none(name, size, error):
    x, weight = torch.ones(2, 70), torch.zeros(1, 2, 32, dtype=torch.int64)
    with pytest.raises(error, match=f"xnor_matmul: {name} must be"):
        xnor_matmul(x, weight, **{"in_features": 70, "out_features": 3, name: size})
