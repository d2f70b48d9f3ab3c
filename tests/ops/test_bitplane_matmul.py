"""bitplane_matmul and bitplane_conv2d: exact products of 8-bit numbers with signs, and what they refuse."""

import pytest
import torch
from torch.nn.functional import conv2d

from tersetorch.ops import bitplane_conv2d, bitplane_matmul, sign_pack, to_pixels, xnor_matmul, xnor_pack

MATMUL, CONV = torch.ops.tersetorch.bitplane_matmul.default, torch.ops.tersetorch.bitplane_conv2d.default
SHAPES = [(1, 1, 1), (33, 64, 2), (64, 65, 3), (70, 300, 7), (40, 0, 2), (0, 9, 3), (6, 9, 0), (31, 1000, 77)]
VALUES = [(1, 0), (1, 128), (1, 255), (2, 255)]  # step and zero


def problem(rows, columns, batch):
    """x, the signs W, and what bitplane_matmul takes for W; a row and a sample reach the largest sum."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(256, (batch, columns), generator=generator).to(torch.uint8)
    signs = torch.randint(2, (rows, columns), generator=generator) * 2.0 - 1.0
    x[:1], signs[:1] = 255, 1.0
    return x, signs, {"weight": xnor_pack(sign_pack(signs)), "in_features": columns, "out_features": rows}


@pytest.mark.parametrize("rows,columns,batch", SHAPES)
@pytest.mark.parametrize("step,zero", VALUES)
def test_is_the_product(rows, columns, batch, step, zero):
    x, signs, sizes = problem(rows, columns, batch)
    want = (step * x.double() - zero) @ signs.double().T
    values = {**sizes, "step": step, "zero": zero}
    y = bitplane_matmul(x, **values)
    assert y.dtype == torch.int32 and torch.equal(y.double(), want)
    scale, bias = torch.randn(2, rows, generator=torch.Generator().manual_seed(1))
    scaled = bitplane_matmul(x, **values, scale=scale, bias=bias)
    assert torch.allclose(scaled.double(), want * scale + bias, rtol=1e-6, atol=1e-3)
    assert torch.equal(bitplane_matmul(x, **values, bias=bias), want.float() + bias)
    thresholds = torch.randint(-99, 99, (rows,)).int()
    if batch:
        thresholds[: rows // 2] = want[0, : rows // 2].int()  # ties
    bits = bitplane_matmul(x, **values, thresholds=thresholds)
    assert torch.equal(bits, sign_pack((want >= thresholds).float() * 2 - 1))


def test_is_the_sum_of_the_planes_products():
    x, signs, sizes = problem(40, 100, 5)
    planes = sum(2**b * ((x >> b & 1).double() @ signs.double().T) for b in range(8))
    assert torch.equal(bitplane_matmul(x, **sizes).double(), planes)


def test_feeds_a_product_of_signs():
    x, signs, sizes = problem(70, 100, 5)
    bits = bitplane_matmul(x, **sizes, thresholds=torch.zeros(70, dtype=torch.int32))
    after = torch.where(torch.randn(9, 70, generator=torch.Generator().manual_seed(1)) >= 0, 1.0, -1.0)
    y = xnor_matmul(bits, xnor_pack(sign_pack(after)), in_features=70, out_features=9)
    assert torch.equal(y.float(), torch.where(x.float() @ signs.T >= 0, 1.0, -1.0) @ after.T)


def test_strides_threads_and_bits_past_the_columns():
    x, _, sizes = problem(100, 300, 80)
    y = bitplane_matmul(x, **sizes)
    assert torch.equal(bitplane_matmul(x.reshape(4, 20, 300), **sizes), y.reshape(4, 20, 100))
    assert torch.equal(bitplane_matmul(x[0], **sizes), y[0])
    assert torch.equal(bitplane_matmul(x.T.contiguous().T, **sizes), y)
    dirty = sizes["weight"].clone()
    dirty[:, -1] |= -1 << 44
    assert torch.equal(bitplane_matmul(x, **{**sizes, "weight": dirty}), y)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(bitplane_matmul(x, **sizes), y) and torch.equal(bitplane_matmul(x[:9], **sizes), y[:9])
    finally:
        torch.set_num_threads(before)


CONVS = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (3, 2), "stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)},
    {"kernel_size": 1},
    {"kernel_size": 5, "padding": 4, "stride": 3},
]


def images(filters, channels, kernel):
    generator = torch.Generator().manual_seed(2)
    kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
    x = torch.randint(256, (3, channels, 9, 7), generator=generator).to(torch.uint8)
    signs = torch.randint(2, (filters, channels, *kernel), generator=generator) * 2.0 - 1.0
    return x, signs, xnor_pack(sign_pack(signs.flatten(1)))


@pytest.mark.parametrize("sizes", CONVS)
@pytest.mark.parametrize("step,zero", VALUES)
def test_convolves(sizes, step, zero):
    x, signs, packed = images(37, 3, sizes["kernel_size"])
    others = {name: size for name, size in sizes.items() if name != "kernel_size"}
    want = conv2d(step * x.double() - zero, signs.double(), **others)
    arguments = {"out_channels": 37, **sizes, "step": step, "zero": zero}
    for way in (x, x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)):
        y = bitplane_conv2d(way, packed, **arguments)
        assert y.dtype == torch.int32 and torch.equal(y.double(), want)
    assert torch.equal(bitplane_conv2d(x[1], packed, **arguments).double(), want[1])
    scale = torch.rand(37)
    scaled = bitplane_conv2d(x, packed, **arguments, scale=scale)
    assert torch.equal(scaled, want.float() * scale.view(-1, 1, 1))
    thresholds = want[0, :, 0, 0].int()
    bits = bitplane_conv2d(x, packed, **arguments, thresholds=thresholds)
    signs_of = (want >= thresholds.view(-1, 1, 1)).movedim(1, -1).contiguous().float() * 2 - 1
    assert torch.equal(bits, sign_pack(signs_of))


def test_pixels():
    k = torch.arange(256, dtype=torch.uint8)
    for scale, offset in ((1 / 255, 0.0), (2 / 255, -1.0), (1 / 256, 0.0), (1.0, 0.0)):
        floats = k.double() * scale + offset
        assert torch.equal(to_pixels(floats.float(), scale=scale, offset=offset), k)
        assert torch.equal(to_pixels(floats, scale=scale, offset=offset), k)
    assert torch.equal(to_pixels(2 * (k.float() / 255) - 1, scale=2 / 255, offset=-1.0), k)
    for bad in (0.5, -1 / 255, 256 / 255, torch.nan, torch.inf):
        with pytest.raises(ValueError, match=r"x must be 0.00392157 \* k \+ 0 for k in 0 to 255 everywhere, got"):
            to_pixels(torch.tensor([0.0, bad]))
    with pytest.raises(ValueError, match="scale must not be 0"):
        to_pixels(torch.zeros(1), scale=0)
    with pytest.raises(TypeError, match=r"x must be a tensor of floats, got torch\.uint8"):
        to_pixels(k)


@pytest.mark.parametrize("extra", [{}, {"scale": torch.ones(70)}, {"thresholds": torch.zeros(70, dtype=torch.int32)}])
def test_registration_is_sound(extra):
    x, _, sizes = problem(70, 130, 4)
    torch.library.opcheck(MATMUL, (x, *sizes.values(), 2, 255), extra)
    compiled = torch.compile(lambda x: bitplane_matmul(x, **sizes, **extra), fullgraph=True)
    assert torch.equal(compiled(x), bitplane_matmul(x, **sizes, **extra))
    x, _, packed = images(70, 3, 3)
    torch.library.opcheck(CONV, (x, packed, 70, [3, 3], [1, 1], [1, 1], [1, 1]), extra)
    program = torch.export.export(Convolution(packed, extra), (x,))
    assert torch.equal(
        program.module()(x), bitplane_conv2d(x, packed, out_channels=70, kernel_size=3, padding=1, **extra)
    )


class Convolution(torch.nn.Module):
    def __init__(self, packed, extra):
        super().__init__()
        self.register_buffer("weight", packed)
        self.extra = extra

    def forward(self, x):
        return bitplane_conv2d(x, self.weight, out_channels=70, kernel_size=3, padding=1, **self.extra)


def test_refuses():
    x, _, sizes = problem(20, 70, 3)
    for error, message, changes in (
        (TypeError, "x must be a tensor, got list", {"x": [1]}),
        (TypeError, "x must be uint8, got torch.float32; to_pixels makes it", {"x": x.float()}),
        (TypeError, "thresholds must be int32", {"thresholds": torch.zeros(20)}),
        (ValueError, r"x must be \[..., 70\], got shape \(3, 69\)", {"x": x[:, 1:]}),
        (ValueError, r"weight must be \[1, 2, 32\] for 20 rows of 70 signs", {"weight": sizes["weight"][:, :1]}),
        (ValueError, r"bias must be \[20\], got shape \(19,\)", {"bias": torch.zeros(19)}),
        (ValueError, r"lie in \[-255, 255\] .* got step 2 and zero 0", {"step": 2}),
        (ValueError, r"lie in \[-255, 255\] .* got step 1 and zero 256", {"zero": 256}),
        (ValueError, "stand in for scale", {"bias": torch.zeros(20), "thresholds": torch.zeros(20).int()}),
    ):
        with pytest.raises(error, match=message):
            bitplane_matmul(**{"x": x, **sizes, **changes})
    packed = sizes["weight"]
    for arguments in (
        (x.float(), packed, 70, 20),
        (x, packed, 69, 20),
        (x, packed, 70, -1),
        (x, packed, 70, 20, 3),
        (x, packed, 70, 20, 1, -1),
        (x, packed[:, :1], 70, 20),
    ):
        with pytest.raises(RuntimeError, match="bitplane_matmul: "):
            MATMUL(*arguments)
    x, _, packed = images(20, 3, 3)
    for error, message, changes in (
        (TypeError, "x must be a tensor, got list", {"x": [1]}),
        (ValueError, r"x must be \[N, C, H, W\] or \[C, H, W\]", {"x": x[0, 0]}),
        (ValueError, r"weight must be \[1, 2, 32\] for 20 rows of 75 signs", {"kernel_size": 5}),
        (ValueError, "x must be at least 3 high", {"x": x[:, :, :2]}),
        (TypeError, "stride must be an int or two ints", {"stride": 1.5}),
    ):
        with pytest.raises(error, match=message):
            bitplane_conv2d(**{"x": x, "weight": packed, "out_channels": 20, "kernel_size": 3, **changes})
    for sizes in ([[3], [1, 1]], [[3, 3], [0, 1]], [[30, 3], [1, 1]], [[2**31 - 1, 2**31 - 1], [1, 1]]):
        with pytest.raises(RuntimeError, match="bitplane_conv2d: "):
            CONV(x, packed, 20, *sizes, [1, 1], [1, 1])
