"""flat_conv2d against three of torch's convolutions in float64, at the level of this process."""

import pytest
import torch
from torch.nn.functional import conv2d

from tersetorch import ops

EPSILON = torch.finfo(torch.float32).eps
# Images [N, C, H, W], channels out, kernel, and the other sizes.
CASES = {
    "same": ((2, 16, 14, 14), 32, (5, 5), {"padding": 2}),
    "full": ((3, 5, 7, 12), 19, (3, 5), {"padding": (2, 4)}),
    "stride": ((1, 21, 13, 31), 80, (3, 4), {"stride": (2, 3), "padding": (1, 2)}),
    "rank": ((2, 6, 9, 9), 18, (3, 3), {"padding": 1, "rank": 3}),
    "wide": ((1, 3, 3, 300), 16, (1, 9), {"padding": (0, 4)}),
    "point": ((4, 40, 1, 1), 7, (1, 1), {}),
}
CHAIN = [(12, (5, 5), {"padding": 2}), (24, (3, 2), {"stride": 2, "padding": (1, 0), "rank": 2}), (9, (1, 3), {})]


def inputs(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def filters_of(channels, out, kernel, rank=1, biases=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = [(out * rank, channels), (out * rank, kernel[0]), (out * rank, kernel[1])]
    shapes += [(out * rank,), (out * rank,), (out,)] if biases else []
    return ops.FlatFilters(*(torch.randn(s, generator=g) for s in shapes))


def formula(x, f, stride=1, padding=0, rank=1):
    """flat_conv2d by three convolutions."""
    (sh, sw), (ph, pw) = ((n, n) if isinstance(n, int) else n for n in (stride, padding))
    maps = f.lateral.shape[0]
    y = conv2d(x, f.lateral[:, :, None, None], f.lateral_bias)
    y = conv2d(y, f.vertical[:, None, :, None], f.vertical_bias, (sh, 1), (ph, 0), groups=maps)
    y = conv2d(y, f.horizontal[:, None, None, :], None, (1, sw), (0, pw), groups=maps)
    y = y.unflatten(1, (rank, -1)).sum(1)
    return y if f.bias is None else y + f.bias[:, None, None]


def mapped(f, change):
    return ops.FlatFilters(*(None if t is None else change(t) for t in f))


def close(y, x, f, sizes, relu=False):
    """Whether y is the formula but for rounding."""
    want = formula(x.double(), mapped(f, torch.Tensor.double), **sizes)
    size = formula(x.double().abs(), mapped(f, lambda t: t.double().abs()), **sizes)
    terms = f.lateral.shape[1] + f.vertical.shape[1] + f.horizontal.shape[1] * sizes.get("rank", 1) + 4
    want = want.clamp_min(0) if relu else want
    rounding = 0 if y.dtype == torch.float32 else 2**-8 * want.abs()
    return bool(((y.double() - want).abs() <= terms * EPSILON / 2 * size + rounding).all())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_three_convolutions(case, last, dtype):
    shape, out, kernel, sizes = CASES[case]
    memory_format = torch.channels_last if last else torch.contiguous_format
    x = inputs(*shape).to(dtype).contiguous(memory_format=memory_format)
    for biases in (True, False):
        f = filters_of(shape[1], out, kernel, sizes.get("rank", 1), biases)
        for relu in (False, True):
            y = ops.flat_conv2d(x, *f, **sizes, relu=relu)
            assert y.dtype == dtype and y.is_contiguous(memory_format=memory_format)
            assert close(y, x, f, sizes, relu)


def test_a_chain_has_the_bits_of_its_stages():
    x = inputs(3, 7, 19, 22)
    stages, sizes, want, channels = [], [], x, 7
    for out, kernel, more in CHAIN:
        f = filters_of(channels, out, kernel, more.get("rank", 1), seed=out)
        stages.append(ops.flat_conv2d_pack(f, rank=more.get("rank", 1)))
        sizes += ops.flat_conv2d_sizes(f, **more)
        want, channels = ops.flat_conv2d(want, *f, **more), out
    assert torch.equal(ops.flat_conv2d_packed(x, stages, sizes), want)
    assert torch.equal(ops.flat_conv2d_inference(x, stages, sizes, True), want.relu())
    last = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(ops.flat_conv2d_packed(last, stages, sizes), want)


@pytest.mark.parametrize("channels,size", [(96, 14), (16, 60)])  # cut into panels of maps, and into rows
def test_threads_change_no_bit(channels, size):
    x = inputs(1, channels, size, size)
    f, g = (filters_of(channels, channels, (5, 5), seed=seed) for seed in (1, 2))
    stages, sizes = [ops.flat_conv2d_pack(f), ops.flat_conv2d_pack(g)], 2 * ops.flat_conv2d_sizes(f, padding=2)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(ops.flat_conv2d_packed(x, stages, sizes, relu=True))
    finally:
        torch.set_num_threads(before)
    want = ops.flat_conv2d(ops.flat_conv2d(x, *f, padding=2), *g, padding=2, relu=True)
    assert all(torch.equal(each, want) for each in found)


def test_is_the_convolution_with_the_product_of_its_filters():
    x, f = inputs(2, 9, 11, 12), filters_of(9, 20, (3, 5), biases=False)
    bias = inputs(20, seed=3)
    dense = torch.einsum("fc,fi,fj->fcij", f.lateral, f.vertical, f.horizontal)
    y = ops.flat_conv2d(x, *f[:3], bias=bias, padding=(1, 2))
    torch.testing.assert_close(y, conv2d(x, dense, bias, padding=(1, 2)), rtol=1e-4, atol=1e-4)


def test_strides_one_image_and_none():
    f = filters_of(5, 8, (3, 3))
    x = inputs(2, 5, 8, 18)[..., ::2]
    torch.testing.assert_close(ops.flat_conv2d(x, *f), formula(x, f), rtol=1e-4, atol=1e-4)
    assert torch.equal(ops.flat_conv2d(x[0], *f), ops.flat_conv2d(x, *f)[0])
    assert ops.flat_conv2d(x[:0], *f).shape == (0, 8, 6, 7)
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.flat_conv2d(x, *f).dtype == torch.bfloat16
    half = mapped(f, lambda t: t.bfloat16())
    want = formula(x, mapped(half, lambda t: t.float()))
    torch.testing.assert_close(ops.flat_conv2d(x, *half), want, rtol=1e-4, atol=1e-4)


def test_what_is_not_finite_spreads():
    f, x = filters_of(4, 6, (3, 3)), inputs(2, 4, 8, 9)
    x[0, 2, 1, 1] = torch.nan
    got = ops.flat_conv2d(x, *f, padding=1, relu=True)
    assert got[0, :, :3, :3].isnan().all() and got.isnan().sum() == 6 * 9


def test_packing_is_undone():
    for out, rank in ((16, 1), (5, 3), (33, 2)):
        f = filters_of(7, out, (3, 4), rank)
        stage = ops.flat_conv2d_pack(f, rank=rank)
        back = ops.flat_conv2d_unpack(stage, in_channels=7, out_channels=out, kernel_size=(3, 4), rank=rank)
        assert all(torch.equal(a, b) for a, b in zip(back, f, strict=True))


@pytest.mark.parametrize("case", ["full", "stride", "rank"])
def test_gradients_and_their_gradients(case):
    shape, out, kernel, sizes = CASES[case]
    f = filters_of(shape[1], out, kernel, sizes.get("rank", 1))
    ours = [t.requires_grad_() for t in (inputs(*shape), *f)]
    twin = [t.detach().double().requires_grad_() for t in ours]
    y = ops.flat_conv2d(*ours, **sizes, relu=True)
    want = formula(twin[0], ops.FlatFilters(*twin[1:]), **sizes).relu()
    upstream = inputs(*y.shape, seed=4)
    first = torch.autograd.grad((y * upstream).sum() + y.square().sum(), ours, create_graph=True)
    expected = torch.autograd.grad((want * upstream).sum() + want.square().sum(), twin, create_graph=True)
    for a, b in zip(first, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-4 * b.abs().max().item())
    second = torch.autograd.grad(sum(g.square().mean() for g in first), ours[:4])
    expected = torch.autograd.grad(sum(g.square().mean() for g in expected), twin[:4])
    for a, b in zip(second, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-4 * b.abs().max().item())


def test_a_chain_has_gradients():
    f, g = filters_of(5, 12, (3, 3)), filters_of(12, 7, (3, 5), seed=9)
    x, stages = inputs(2, 5, 8, 9), [ops.flat_conv2d_pack(f), ops.flat_conv2d_pack(g)]
    sizes = ops.flat_conv2d_sizes(f, padding=2) + ops.flat_conv2d_sizes(g, padding=(1, 2))
    leaves = [x.requires_grad_(), *(s.requires_grad_() for s in stages)]
    got = torch.autograd.grad(ops.flat_conv2d_packed(x, stages, sizes).square().sum(), leaves)
    y = ops.flat_conv2d_packed(ops.flat_conv2d_packed(x, stages[:1], sizes[:8]), stages[1:], sizes[8:])
    for a, b in zip(got, torch.autograd.grad(y.square().sum(), leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


def test_opcheck_compile_and_export():
    f = filters_of(6, 10, (3, 3), 2)
    x, stage, sizes = inputs(2, 6, 7, 8), ops.flat_conv2d_pack(f, rank=2), [10, 2, 3, 3, 1, 1, 1, 1]
    packed = torch.ops.tersetorch
    torch.library.opcheck(
        packed.flat_conv2d.default, (x.clone().requires_grad_(), [stage.clone().requires_grad_()], sizes, True)
    )
    last = x.contiguous(memory_format=torch.channels_last)
    torch.library.opcheck(packed.flat_conv2d_inference.default, (last, [stage], sizes, False))

    class Layer(torch.nn.Module):
        def forward(self, images):
            return ops.flat_conv2d(images, *f, padding=1, rank=2) * 2

    want = Layer()(x)
    assert torch.equal(torch.compile(Layer(), fullgraph=True, backend="aot_eager")(x), want)
    assert torch.equal(torch.export.export(Layer(), (x,)).module()(x), want)


def test_forward_mode_is_refused():
    f, x = filters_of(5, 8, (3, 3)), inputs(2, 5, 8, 9)
    for function, at in (
        (lambda images: ops.flat_conv2d(images, *f), x),
        (lambda taps: ops.flat_conv2d(x, f.lateral, taps, f.horizontal), f.vertical),
    ):
        with pytest.raises(RuntimeError, match="must not carry a forward-mode tangent"):
            torch.func.jvp(function, (at,), (at,))


def test_maps_over_images_and_over_filters():
    f, x = filters_of(5, 8, (3, 3)), inputs(3, 2, 5, 8, 9)
    stage, sizes = ops.flat_conv2d_pack(f), ops.flat_conv2d_sizes(f)
    for call in (
        lambda images: ops.flat_conv2d(images, *f),
        lambda images: ops.flat_conv2d_inference(images, [stage], sizes),
    ):
        want = torch.stack([call(images) for images in x])
        assert torch.equal(torch.vmap(call)(x), want)
        assert torch.equal(torch.vmap(call, in_dims=2)(x.movedim(0, 2)), want)
    several = f.lateral * torch.arange(1, 4).view(3, 1, 1)
    found = torch.vmap(lambda lateral: ops.flat_conv2d(x[0], lateral, *f[1:]))(several)
    assert torch.equal(found, torch.stack([ops.flat_conv2d(x[0], lateral, *f[1:]) for lateral in several]))


def test_bad_input_is_refused():
    f, x = filters_of(5, 8, (3, 3)), inputs(2, 5, 8, 9)
    for arguments, more, error, sentence in (
        ((None, *f), {}, TypeError, "x must be a tensor, got NoneType"),
        ((x.double(), *f), {}, TypeError, "x must be float32 or bfloat16, got torch.float64"),
        ((x[0, 0], *f), {}, ValueError, r"x must be \[N, C, H, W\] or \[C, H, W\]"),
        ((x[:, :4], *f), {}, ValueError, "stage 0 must be .* for 4 channels"),
        ((x, f.lateral.int(), *f[1:]), {}, TypeError, "lateral must be float32 or bfloat16, got torch.int32"),
        ((x, None, *f[1:]), {}, TypeError, "lateral must be a tensor"),
        ((x, f.lateral, f.vertical[:4], *f[2:]), {}, ValueError, r"vertical must be \[8, taps\]"),
        ((x, f.lateral, f.vertical, torch.ones(8, 64)), {}, ValueError, "with 1 to 63 taps"),
        ((x, *f[:5], inputs(5)), {}, ValueError, r"bias must be \[8\]"),
        ((x, *f), {"rank": 3}, ValueError, r"lateral must be \[rank \* F, C\] with rank 3"),
        ((x, *f), {"rank": 0}, ValueError, "rank must be at least 1"),
        ((x, *f), {"rank": 1.5}, TypeError, "rank must be an int"),
        ((x, *f), {"stride": 0}, ValueError, "stride must be at least 1"),
        ((x, *f), {"padding": -1}, ValueError, "padding must be at least 0"),
        ((x[..., :2], *f), {}, ValueError, "x must be at least 3 wide"),
    ):
        with pytest.raises(error, match=sentence):
            ops.flat_conv2d(*arguments, **more)
    for call in (ops.flat_conv2d_pack, ops.flat_conv2d_sizes):
        with pytest.raises(TypeError, match="filters must be FlatFilters, got tuple"):
            call(tuple(f))
    stage = ops.flat_conv2d_pack(f)
    with pytest.raises(ValueError, match="stages must be 1 to 8 with 8 sizes each"):
        ops.flat_conv2d_packed(x, [stage], [8, 1, 3])
    for stages, sizes, sentence in (
        ([stage[1:]], [8, 1, 3, 3, 1, 1, 0, 0], "stage 0 must have"),
        ([stage], [8, 1, 3, 64, 1, 1, 0, 0], "kernel_size must be at most 63"),
        ([stage], [8, 1, 3, 3, 0, 1, 0, 0], "stride must be two numbers"),
        ([stage], [8, 1, 3, 3, 1, 1, 0, 2**31 - 2], "an image of y must have at most"),
        ([stage.int()], [8, 1, 3, 3, 1, 1, 0, 0], "stages must be float32"),
        ([], [], "stages must be 1 to 8"),
    ):
        with pytest.raises(RuntimeError, match=sentence):
            ops.flat_conv2d_inference(x, stages, sizes)
    with pytest.raises(ValueError, match=r"stage must be .* for these sizes"):
        ops.flat_conv2d_unpack(stage, in_channels=4, out_channels=8, kernel_size=(3, 3))
