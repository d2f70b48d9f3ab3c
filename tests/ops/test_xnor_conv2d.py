"""xnor_conv2d: exact convolutions of signs, their three outputs, the compiler, and what it refuses."""

import pytest
import torch
from torch.nn.functional import conv2d, pad

from tersetorch.ops import sign_pack_images, sign_unpack, xnor_conv2d, xnor_conv2d_pack, xnor_conv2d_unpack

OP = torch.ops.tersetorch.xnor_conv2d.default
LAST = torch.channels_last
# Shape of x, filters, kernel, and what else.
CASES = [
    ((2, 70, 6, 7), 40, (3, 3), {"padding": 1}),
    ((1, 64, 9, 5), 64, (3, 2), {"stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)}),
    ((1, 130, 4, 4), 33, (1, 1), {}),
    ((2, 128, 5, 5), 64, (3, 3), {"groups": 2, "padding": 1}),
    ((1, 60, 5, 6), 100, (3, 3), {"groups": 5, "padding": 2, "dilation": 2}),
    ((1, 40, 6, 5), 40, (3, 3), {"groups": 40, "padding": 1, "stride": 2}),
    ((1, 3, 2, 2), 5, (2, 2), {"padding": 4}),  # outputs that see no input
    ((0, 9, 5, 5), 4, (3, 3), {}),
    ((2, 0, 4, 4), 5, (3, 3), {"padding": 1}),
    ((1, 65, 1, 1), 0, (1, 1), {}),
]


def signs(x):
    return torch.where(x >= 0, 1.0, -1.0)


def problem(shape, filters, kernel, padding_value=0, **how):
    """x, W, what xnor_conv2d takes, and the convolution of their signs."""
    g = torch.Generator().manual_seed(0)
    groups = how.get("groups", 1)
    x = torch.randn(shape, generator=g).bfloat16().float()
    weight = torch.randn(filters, shape[1] // groups, *kernel, generator=g)
    arguments = {
        "weight": xnor_conv2d_pack(sign_pack_images(weight), groups),
        "in_channels": shape[1],
        "out_channels": filters,
        "kernel_size": kernel,
        "padding_value": padding_value,
        **how,
    }
    return x, weight, arguments, reference(x, weight, padding_value, **how)


def reference(x, weight, padding_value, stride=1, padding=0, dilation=1, groups=1):
    high, wide = (padding, padding) if isinstance(padding, int) else padding
    padded = pad(signs(x).double(), (wide, wide, high, high), value=padding_value)
    if 0 in (*weight.shape, x.shape[0]):  # which torch refuses
        size = [(padded.shape[i] - dilation * (weight.shape[i] - 1) - 1) // stride + 1 for i in (2, 3)]
        return torch.zeros(x.shape[0], weight.shape[0], *size, dtype=torch.float64)
    return conv2d(padded, signs(weight).double(), None, stride, 0, dilation, groups)


@pytest.mark.parametrize("padding_value", [0, 1, -1])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_is_the_convolution_of_signs(case, padding_value):
    shape, filters, kernel, how = case
    x, _, arguments, want = problem(shape, filters, kernel, padding_value, **how)
    packed = sign_pack_images(x)
    for images in (x, x.bfloat16(), x.contiguous(memory_format=LAST), packed):
        y = xnor_conv2d(images, **arguments)
        assert y.dtype == torch.int32 and torch.equal(y.double(), want)
        assert y.is_contiguous(memory_format=LAST)
    scale, bias = torch.randn(2, filters, 1, 1)
    y = xnor_conv2d(x, **arguments, scale=scale.flatten(), bias=bias.flatten())
    assert torch.allclose(y.double(), want * scale + bias, rtol=1e-6, atol=1e-4)
    assert torch.equal(xnor_conv2d(x, **arguments, scale=scale.flatten()), want.float() * scale)
    # Thresholds, with ties, give the signs of the next convolution.
    columns = shape[1] // how.get("groups", 1) * kernel[0] * kernel[1]
    thresholds = torch.randint(-columns - 1, columns + 2, (filters,)).int()
    if want.numel():
        thresholds[: filters // 2] = want[0, : filters // 2, 0, 0].int()
    y = xnor_conv2d(packed, **arguments, thresholds=thresholds)
    assert torch.equal(y, sign_pack_images((want >= thresholds.view(-1, 1, 1)).float() * 2 - 1))


@pytest.mark.parametrize("groups,filters", [(1, 33), (3, 99), (3, 6), (1, 0)])
def test_packing_is_undone(groups, filters):
    bits = sign_pack_images(torch.randn(filters, 70, 3, 2))
    assert torch.equal(xnor_conv2d_unpack(xnor_conv2d_pack(bits, groups), filters, groups), bits)


def test_packs_images():
    special = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-45, -1e-45])
    for shape in ((2, 70, 5, 13), (1, 64, 1, 1), (0, 3, 2, 2), (2, 0, 3, 3)):
        x = torch.randn(shape)
        x.view(-1)[::3] = special[torch.arange(x.view(-1)[::3].numel()) % 7]
        for images in (x, x.bfloat16(), x.contiguous(memory_format=LAST), x.transpose(2, 3).contiguous().mT):
            want = torch.where(images.permute(0, 2, 3, 1) >= 0, 1.0, -1.0)
            bits = sign_pack_images(images)
            assert torch.equal(sign_unpack(bits, shape[1]), want)
            assert torch.equal(sign_pack_images(images[0]) if shape[0] else bits[0:0], bits[0] if shape[0] else bits)
    with pytest.raises(TypeError, match="sign_pack_images: x must be float32 or bfloat16"):
        sign_pack_images(torch.zeros(1, 2, 3, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"sign_pack_images: x must be \[N, C, H, W\]"):
        sign_pack_images(torch.zeros(3, 3))


def test_images_without_a_batch():
    x, _, arguments, want = problem((1, 70, 6, 7), 40, (3, 3), padding=1)
    assert torch.equal(xnor_conv2d(x[0], **arguments).double(), want[0])
    assert torch.equal(xnor_conv2d(sign_pack_images(x)[0], **arguments).double(), want[0])
    thresholds = torch.zeros(40, dtype=torch.int32)
    bits = xnor_conv2d(x, **arguments, thresholds=thresholds)
    assert torch.equal(xnor_conv2d(x[0], **arguments, thresholds=thresholds), bits[0])


@pytest.mark.parametrize("case", [CASES[0], CASES[3], CASES[4]], ids=str)
def test_the_number_of_threads_changes_nothing(case):
    shape, filters, kernel, how = case
    x, _, arguments, _ = problem((3, shape[1], 19, 17), filters, kernel, 1, **how)
    before = torch.get_num_threads()
    try:
        for extra in ({"scale": torch.linspace(-1, 1, filters)}, {"thresholds": torch.zeros(filters).int()}):
            results = []
            for threads in (1, 2, 3, 5):
                torch.set_num_threads(threads)
                results.append(xnor_conv2d(x, **arguments, **extra))
            assert all(torch.equal(results[0], other) for other in results)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("extra", [{}, {"scale": torch.ones(40)}, {"thresholds": torch.zeros(40, dtype=torch.int32)}])
def test_registration_is_sound(extra):
    torch.compiler.reset()
    x, _, arguments, _ = problem((2, 70, 6, 7), 40, (3, 3), padding=1)
    for images in (x, x.contiguous(memory_format=LAST), sign_pack_images(x)):
        sizes = (70, 40, [3, 3], [1, 1], [1, 1], [1, 1], 1, 0)
        torch.library.opcheck(OP, (images, arguments["weight"], *sizes), extra)
        compiled = torch.compile(lambda x: xnor_conv2d(x, **arguments, **extra), fullgraph=True)
        assert torch.equal(compiled(images), xnor_conv2d(images, **arguments, **extra))
    torch.library.opcheck(torch.ops.tersetorch.sign_pack_images.default, (x,))


def test_autocast_changes_nothing():
    x, _, arguments, want = problem((2, 70, 6, 7), 40, (3, 3), padding=1)
    with torch.autocast("cpu"):
        assert torch.equal(xnor_conv2d(x, **arguments).double(), want)


def test_exports():
    class Module(torch.nn.Module):
        def __init__(self, arguments):
            super().__init__()
            self.arguments = dict(arguments)
            self.register_buffer("weight", self.arguments.pop("weight"))

        def forward(self, x):
            return xnor_conv2d(x, self.weight, **self.arguments)

    x, _, arguments, want = problem((4, 70, 6, 7), 40, (3, 3), padding=1)
    module = Module(arguments)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert torch.equal(program.module()(x[:3]).double(), want[:3])


def test_refuses():
    x, _, arguments, _ = problem((2, 70, 6, 7), 40, (3, 3), padding=1)

    def call(**changes):
        return xnor_conv2d(**{"x": x, **arguments, **changes})

    for error, message, changes in (
        (TypeError, "x must be a tensor, got list", {"x": [1.0]}),
        (TypeError, "x must be float32, bfloat16 or int64", {"x": x.double()}),
        (TypeError, "weight must be int32", {"weight": arguments["weight"].long()}),
        (TypeError, "thresholds must be int32", {"thresholds": torch.zeros(40)}),
        (ValueError, r"x must be \[N, 70, H, W\] or \[70, H, W\], got shape \(2, 69, 6, 7\)", {"x": x[:, 1:]}),
        (ValueError, r"x must be \[N, H, W, 2\]", {"x": sign_pack_images(x)[..., :1]}),
        (ValueError, r"weight must be \[2, 3, 3, 4, 32\] for 40 filters of 70", {"weight": arguments["weight"][:1]}),
        (ValueError, r"bias must be \[40\], got shape \(39,\)", {"bias": torch.zeros(39)}),
        (ValueError, "padding_value must be 0, 1 or -1, got 2", {"padding_value": 2}),
        (ValueError, "groups must divide the channels", {"groups": 3}),
        (ValueError, "x must be at least 9 high", {"dilation": 5}),
        (ValueError, "a filter must have at most 2147483647 signs", {"kernel_size": (2**16, 2**16), "padding": 2**16}),
        (TypeError, "stride must be an int or two ints", {"stride": 1.5}),
        (ValueError, "thresholds stand in for scale", {"scale": torch.ones(40), "thresholds": torch.zeros(40).int()}),
    ):
        with pytest.raises(error, match=message):
            call(**changes)
    sizes = (70, 40, [3, 3], [1, 1], [1, 1], [1, 1], 1)
    with pytest.raises(RuntimeError, match="xnor_conv2d: weight must be int32"):
        OP(x, arguments["weight"].long(), *sizes)
    with pytest.raises(RuntimeError, match="xnor_conv2d: a filter must have at most 2147483647 signs"):
        OP(x, arguments["weight"], 70, 40, [2**16, 2**16], [1, 1], [2**16, 2**16], [1, 1], 1)
    with pytest.raises(RuntimeError, match="padding_value must be 0, 1 or -1"):
        OP(x, arguments["weight"], *sizes, 3)
    with pytest.raises(TypeError, match="bits must be an int64 tensor"):
        xnor_conv2d_pack(torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"bits must be \[out, kh, kw, words\]"):
        xnor_conv2d_pack(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="groups must divide the 3 filters, got 2"):
        xnor_conv2d_pack(torch.zeros(3, 1, 1, 1, dtype=torch.int64), 2)
