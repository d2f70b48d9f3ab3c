"""codebook_conv2d against the convolution with the weight that its codes stand for, at the level of this process."""

import pytest
import torch
from torch.nn.functional import conv2d

from tersetorch import ops

EPSILON = torch.finfo(torch.float32).eps
# Images [N, C, H, W], filters, and the sizes of the convolution.
CASES = {
    "7x7": ((1, 24, 7, 7), 37, {"kernel_size": 3, "padding": 1}),
    "images": ((2, 5, 12, 13), 9, {"kernel_size": 3, "padding": 1}),
    "line": ((3, 20, 9, 11), 8, {"kernel_size": 1}),
    "batch": ((9, 8, 5, 6), 12, {"kernel_size": 3, "padding": 1, "stride": 2}),
    "wide": ((2, 3, 9, 80), 9, {"kernel_size": (1, 5), "padding": (0, 2)}),
    "point": ((2, 70, 6, 9), 13, {"kernel_size": 1}),
    "grouped": ((2, 12, 11, 10), 15, {"kernel_size": (3, 2), "padding": 2, "dilation": (2, 3), "groups": 3}),
    "depthwise": ((2, 6, 8, 8), 6, {"kernel_size": 3, "groups": 6, "stride": (1, 3)}),
    "steps": ((1, 5, 23, 23), 7, {"kernel_size": 7, "padding": 3, "stride": (2, 4)}),
    "one output": ((1, 20, 4, 4), 200, {"kernel_size": 4}),
}
POINT = {"kernel_size": 3, "padding": 1}


def inputs(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def problem(shape, filters, sizes, entries=16, kind="tensor", seed=0):
    """Codes as the op takes them, the codebook, column_block and the dense weight."""
    g = torch.Generator().manual_seed(seed)
    kernel = sizes["kernel_size"]
    kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
    channels = shape[1] // sizes.get("groups", 1)
    columns, block = channels * kernel[0] * kernel[1], 20 if kind == "blocks" else 0
    tables = {"tensor": 1, "rows": filters, "blocks": -(-columns // 20)}[kind]
    codebook = torch.randn(tables, entries, generator=g)
    codes = torch.randint(entries, (filters, columns), dtype=torch.uint8, generator=g)
    packed = ops.codebook_pack(codes, entries=entries, column_block=block)
    dense = ops.codebook_dense(packed, codebook, columns=columns, column_block=block)
    return packed, codebook, block, dense.view(filters, channels, *kernel)


def dense_conv(x, weight, bias=None, *, kernel_size, **sizes):
    return conv2d(x, weight, bias, **sizes)


def weights_of(weight):
    return weight[0].numel()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["tensor", "rows", "blocks"])
@pytest.mark.parametrize("last", [False, True])
def test_equals_the_dense_convolution(case, kind, last):
    shape, filters, sizes = CASES[case]
    for entries in (3, 16, 30, 200):
        codes, codebook, block, weight = problem(shape, filters, sizes, entries, kind)
        bias = inputs(filters, seed=2)
        x = inputs(*shape)
        x = x.contiguous(memory_format=torch.channels_last) if last else x
        for mode in ops.CODEBOOK_MODES[:2]:
            w, of_mode = (weight, x) if mode == "exact" else (weight.bfloat16().float(), x.bfloat16().float())
            y = ops.codebook_conv2d(x, codes, codebook, bias, block, mode=mode, **sizes)
            want = dense_conv(of_mode.double(), w.double(), bias.double(), **sizes)
            size = dense_conv(of_mode.double().abs(), w.double().abs(), bias.double().abs(), **sizes)
            assert y.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
            assert ((y - want).abs() <= (weights_of(weight) + 4) * EPSILON / 2 * size).all(), (entries, mode)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["tensor", "rows", "blocks"])
def test_int8_has_the_bits_of_its_formula(case, kind):
    shape, filters, sizes = CASES[case]
    codes, codebook, block, _ = problem(shape, filters, sizes, kind=kind)
    x, bias = inputs(*shape), inputs(filters, seed=2)

    def rounded(values, largest):
        return (values * (127 / largest)).round(), largest / 127

    q, s = rounded(x, x.abs().amax((1, 2, 3), keepdim=True))
    table, t = rounded(codebook, codebook.abs().amax(1, keepdim=True) if kind == "rows" else codebook.abs().max())
    *_, weight = problem(shape, filters, sizes, kind=kind)
    v = ops.codebook_dense(codes, table, columns=weights_of(weight), column_block=block).view(weight.shape)
    total = dense_conv(q.double(), v.double(), **sizes).float()
    t = t.reshape(1, -1, 1, 1)
    low, high = torch.minimum(s, t), torch.maximum(s, t)
    want = ((total * low).double() * high.double() + bias.double()[:, None, None]).float()
    for images in (x, x.contiguous(memory_format=torch.channels_last)):
        assert torch.equal(ops.codebook_conv2d(images, codes, codebook, bias, block, mode="int8", **sizes), want)


def test_relu_strides_bfloat16_and_no_images():
    shape = (2, 5, 8, 9)
    codes, codebook, _, weight = problem(shape, 11, POINT)
    x = inputs(*shape)
    want = torch.relu(dense_conv(x, weight, **POINT))
    torch.testing.assert_close(ops.codebook_conv2d(x, codes, codebook, relu=True, **POINT), want, rtol=1e-5, atol=1e-4)
    apart = inputs(2, 5, 8, 18)[..., ::2]
    torch.testing.assert_close(
        ops.codebook_conv2d(apart, codes, codebook, **POINT), dense_conv(apart, weight, **POINT), rtol=1e-5, atol=1e-4
    )
    one = ops.codebook_conv2d(x[0], codes, codebook, relu=True, **POINT)
    torch.testing.assert_close(one, want[0], rtol=1e-5, atol=1e-4)
    for images in (x.bfloat16(), x.bfloat16().contiguous(memory_format=torch.channels_last)):
        half = ops.codebook_conv2d(images, codes, codebook, **POINT)
        assert half.dtype == torch.bfloat16
        torch.testing.assert_close(half.float(), dense_conv(images.float(), weight, **POINT), rtol=0.01, atol=0.02)
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.codebook_conv2d(x, codes, codebook, **POINT).dtype == torch.bfloat16
    assert ops.codebook_conv2d(x[:0], codes, codebook, **POINT).shape == (0, 11, 8, 9)


@pytest.mark.parametrize("size", [3, 9])
def test_what_is_not_finite_spreads(size):
    shape = (2, 4, size, size)
    codes, codebook, _, _ = problem(shape, 6, POINT, entries=5)
    x = inputs(*shape)
    x[0, 2, 1, 1] = torch.nan
    got = ops.codebook_conv2d(x, codes, codebook, **POINT)
    assert got[0, :, :3, :3].isnan().all() and got[1].isfinite().all()
    assert got.isnan().sum() == 6 * 9
    got = ops.codebook_conv2d(x, codes, codebook, mode="int8", **POINT)
    assert got[0].isnan().all() and got[1].isfinite().all()


@pytest.mark.parametrize("case", ["batch", "grouped", "point"])
@pytest.mark.parametrize("kind", ["tensor", "rows", "blocks"])
def test_gradients_and_their_gradients(case, kind):
    shape, filters, sizes = CASES[case]
    codes, codebook, block, weight = problem(shape, filters, sizes, 5, kind)
    columns = weights_of(weight)
    index = ops.codebook_unpack(codes, entries=5, columns=columns, column_block=block).long()
    table = {
        "tensor": torch.zeros(1, 1, dtype=torch.int64),
        "rows": torch.arange(filters)[:, None],
        "blocks": torch.arange(columns)[None] // 20,
    }[kind].expand(filters, columns)
    ours = [t.requires_grad_() for t in (inputs(*shape), codebook, inputs(filters, seed=2))]
    twin = [t.detach().clone().requires_grad_() for t in ours]
    y = ops.codebook_conv2d(ours[0], codes, ours[1], ours[2], block, relu=True, **sizes)
    want = torch.relu(dense_conv(twin[0], twin[1][table, index].view(weight.shape), twin[2], **sizes))
    upstream = inputs(*y.shape, seed=4)
    first = torch.autograd.grad((y * upstream).sum() + y.square().sum(), ours, create_graph=True)
    expected = torch.autograd.grad((want * upstream).sum() + want.square().sum(), twin, create_graph=True)
    for a, b in zip(first, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-2)
    second = torch.autograd.grad(sum(g.square().mean() for g in first), ours[:2])
    expected = torch.autograd.grad(sum(g.square().mean() for g in expected), twin[:2])
    for a, b in zip(second, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2 * b.abs().max().item())


def test_opcheck_compile_and_export():
    shape, filters, sizes = CASES["grouped"]
    codes, codebook, block, _ = problem(shape, filters, sizes, kind="blocks")
    x = inputs(*shape)
    numbers = ([3, 2], [1, 1], [2, 2], [2, 3], 3)
    op = torch.ops.tersetorch.codebook_conv2d.default
    torch.library.opcheck(
        op, (x.clone().requires_grad_(), codes, codebook.clone().requires_grad_(), None, block, *numbers)
    )
    last = x.contiguous(memory_format=torch.channels_last)
    torch.library.opcheck(
        torch.ops.tersetorch.codebook_conv2d_inference.default, (last, codes, codebook, None, block, *numbers)
    )

    class Layer(torch.nn.Module):
        def forward(self, images):
            return ops.codebook_conv2d(images, codes, codebook, None, block, **sizes) * 2

    want = Layer()(x)
    assert torch.equal(torch.compile(Layer(), fullgraph=True, backend="aot_eager")(x), want)
    assert torch.equal(torch.export.export(Layer(), (x,)).module()(x), want)


@pytest.mark.parametrize("mode", ops.CODEBOOK_MODES)
def test_a_code_outside_its_table_is_an_error(mode):
    for shape in ((1, 30, 5, 5), (1, 30, 1, 1)):
        codes, codebook, _, _ = problem(shape, 9, POINT, entries=10)
        codes[8, 60] = 255
        with pytest.raises(RuntimeError, match=r"codes must lie in \[0, 10\), got one outside"):
            ops.codebook_conv2d(inputs(*shape), codes, codebook, mode=mode, **POINT)


def test_bad_input_is_refused():
    shape = (2, 5, 8, 9)
    codes, codebook, _, _ = problem(shape, 11, POINT)
    x = inputs(*shape)
    for arguments, more, error, sentence in (
        ((None, codes, codebook), {}, TypeError, "x must be a tensor, got NoneType"),
        ((x.double(), codes, codebook), {}, TypeError, "x must be float32 or bfloat16, got torch.float64"),
        ((x[0, 0], codes, codebook), {}, ValueError, r"x must be \[N, C, H, W\] or \[C, H, W\]"),
        ((x, codes.int(), codebook), {}, TypeError, "codes must be uint8, got torch.int32"),
        ((x, codes[0], codebook), {}, ValueError, r"codes must be \[out, "),
        ((inputs(2, 99, 8, 9), codes, codebook), {}, ValueError, "codes must be .* for 891 weights in a filter"),
        ((x, codes, codebook, inputs(5)), {}, ValueError, r"bias must be \[11\]"),
        ((x, codes, codebook), {"groups": 2}, ValueError, "groups must divide the channels"),
        ((x, codes, codebook), {"stride": 0}, ValueError, "stride must be at least 1"),
        ((x, codes, codebook), {"kernel_size": (3, 3, 3)}, TypeError, "kernel_size must be an int or two ints"),
        ((x, codes, codebook), {"dilation": 9}, ValueError, "x must be at least 17 high"),
        ((x, codes, codebook), {"mode": "int4"}, ValueError, "mode must be one of"),
        ((x, codes, codebook), {"padding": 2**30}, RuntimeError, "an image of "),
    ):
        with pytest.raises(error, match=sentence):
            ops.codebook_conv2d(*arguments, **(POINT | more))
    with pytest.raises(RuntimeError, match="mode must be 'exact' where gradients are asked for"):
        ops.codebook_conv2d(x.requires_grad_(), codes, codebook, mode="int8", **POINT).sum().backward()
