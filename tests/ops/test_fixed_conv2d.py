"""fixed_conv2d: exact sums of every geometry, memory formats, the compiler, and what it refuses."""

import pytest
import torch
from torch.nn import functional

from tersetorch.ops import fixed_conv2d, fixed_conv2d_pack

HOW = {"sum_fraction_bits": 12, "integer_bits": 24, "fraction_bits": 0}
# Channels, filters, image, and the rest: around the words of 4 bytes, the panels of 16 filters and squares of 16 bytes.
CASES = [
    (3, 5, (9, 7), {"kernel_size": 3, "padding": 1}),
    (1, 20, (12, 11), {"kernel_size": 5}),
    (16, 70, (6, 20), {"kernel_size": 1}),
    (20, 17, (7, 18), {"kernel_size": (2, 3), "stride": (2, 1), "padding": (0, 2)}),
    (18, 18, (8, 19), {"kernel_size": 3, "padding": 2, "dilation": 2, "groups": 18}),
    (12, 8, (5, 33), {"kernel_size": (3, 2), "dilation": (1, 2), "groups": 4}),
    (64, 32, (4, 4), {"kernel_size": 3, "padding": 1, "groups": 2, "stride": 3}),
    (5, 3, (1, 1), {"kernel_size": 1, "padding": 3}),
]


def problem(channels, filters, image, kernel_size, groups=1, count=3, dtypes=(torch.int8, torch.int8), **_):
    generator = torch.Generator().manual_seed(0)
    kernel = (kernel_size,) * 2 if isinstance(kernel_size, int) else kernel_size
    x, weight = (
        torch.randint(torch.iinfo(dtype).min, torch.iinfo(dtype).max + 1, shape, generator=generator).to(dtype)
        for dtype, shape in zip(
            dtypes, ((count, channels, *image), (filters, channels // groups, *kernel)), strict=True
        )
    )
    x[:1], weight[::2] = torch.iinfo(x.dtype).min, torch.iinfo(weight.dtype).min
    return x, weight, torch.randint(-(2**20), 2**20, (filters,), generator=generator)


def expected(x, weight, bias, kernel_size, relu=False, **sizes):
    exact = functional.conv2d(x.double(), weight.double(), None if bias is None else bias.double(), **sizes).long()
    return (exact + 2048 >> 12).clamp(0 if relu else -(2**23), 2**23 - 1)


def convolved(x, weight, bias, kernel_size, groups=1, **how):
    packed, merged = fixed_conv2d_pack(weight, how.get("dilation", 1), groups)
    sizes = {"out_channels": weight.shape[0], "kernel_size": kernel_size, "groups": merged}
    return fixed_conv2d(x, packed, bias, **sizes, **how, **HOW)


@pytest.mark.parametrize("dtypes", [(torch.int8,) * 2, (torch.int16,) * 2, (torch.int8, torch.int16)])
@pytest.mark.parametrize("channels,filters,image,sizes", CASES)
def test_sums_are_exact(channels, filters, image, sizes, dtypes):
    x, weight, bias = problem(channels, filters, image, dtypes=dtypes, **sizes)
    for images in (x, x.to(memory_format=torch.channels_last)):
        y = convolved(images, weight, bias, **sizes)
        assert y.dtype == torch.int32 and torch.equal(y.long(), expected(x, weight, bias, **sizes))
        last = not images.is_contiguous()
        assert y.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    y = convolved(x, weight, None, **sizes, relu=True, dtype=torch.float32)
    assert torch.equal(y.long(), expected(x, weight, None, relu=True, **sizes))


def test_no_filters_images_or_channels():
    for count, filters in ((2, 0), (0, 4)):
        x, weight, bias = problem(4, filters, (3, 3), 2, count=count)
        assert convolved(x, weight, bias, 2).shape == (count, filters, 2, 2)
    x, weight, bias = problem(0, 4, (3, 3), 2)
    want = (bias + 2048 >> 12).int().view(1, 4, 1, 1).expand(3, 4, 2, 2)
    assert torch.equal(convolved(x, weight, bias, 2), want)


def test_narrow_results_and_strided_images():
    x, weight, bias = problem(20, 40, (9, 18), 3)
    want = functional.conv2d(x.double(), weight.double(), bias.double(), padding=1).long()
    packed, groups = fixed_conv2d_pack(weight)
    how = {"out_channels": 40, "kernel_size": 3, "padding": 1, "sum_fraction_bits": 20, "fraction_bits": 2}
    for bits, dtype in ((6, torch.int8), (14, torch.int16)):
        limit = 2 ** (bits + 1)
        for images in (x, x.to(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)):
            y = fixed_conv2d(images, packed, bias, integer_bits=bits, groups=groups, **how)
            assert y.dtype == dtype and torch.equal(y.long(), (want + 2**17 >> 18).clamp(-limit, limit - 1))


def test_many_images_and_threads_give_the_same_bits():
    x, weight, bias = problem(8, 24, (40, 40), 3, count=90)
    whole = convolved(x, weight, bias, 3)
    assert torch.equal(whole[50:], convolved(x[50:], weight, bias, 3))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(convolved(x, weight, bias, 3), whole)
    finally:
        torch.set_num_threads(threads)


def test_registration_is_sound():
    x, weight, bias = problem(4, 5, (6, 7), 3)
    packed, _ = fixed_conv2d_pack(weight)
    op = torch.ops.tersetorch.fixed_conv2d.default
    sizes = [3, 3], [1, 1], [1, 1], [1, 1], 1, 12, 6, 10, torch.float32
    for images in (x, x.to(memory_format=torch.channels_last)):
        torch.library.opcheck(op, (images, packed, bias, 5, *sizes))

    def run(x):
        return fixed_conv2d(x, packed, bias, out_channels=5, kernel_size=3, **HOW)

    assert torch.equal(torch.compile(run, fullgraph=True)(x), run(x))


def test_refuses():
    x, weight, bias = problem(4, 6, (6, 7), 3)
    packed, _ = fixed_conv2d_pack(weight)
    how = {"out_channels": 6, "kernel_size": 3, **HOW}
    with pytest.raises(TypeError, match="x must be int8 or int16"):
        fixed_conv2d(x.float(), packed, **how)
    with pytest.raises(TypeError, match="packed must be int16 like x"):
        fixed_conv2d(x.short(), packed, **how)
    with pytest.raises(ValueError, match=r"x must be \[N, C, H, W\]"):
        fixed_conv2d(x[0], packed, **how)
    with pytest.raises(ValueError, match="packed must be what packing returns for 6 rows"):
        fixed_conv2d(x, packed, **{**how, "kernel_size": 2})
    with pytest.raises(ValueError, match="groups must divide the channels"):
        fixed_conv2d(x, packed, groups=3, **how)
    with pytest.raises(ValueError, match="O a multiple of groups"):
        fixed_conv2d_pack(weight, groups=4)
    op = torch.ops.tersetorch.fixed_conv2d.default
    rest = 12, 24, 0, torch.int32

    def run(x=x, packed=packed, bias=None, rows=6, kernel=(3, 3), padding=(0, 0), dilation=(1, 1), groups=1):
        return op(x, packed, bias, rows, kernel, [1, 1], padding, dilation, groups, *rest)

    for wrong, sentence in (
        ({"kernel": (3, 4)}, "packed must be"),
        ({"rows": 17}, "packed must be"),
        ({"rows": -6}, "rows must be at least 0"),
        ({"groups": 3}, "groups must divide"),
        ({"kernel": (9, 9)}, "x must be as large as the kernel"),
        ({"kernel": (2**20, 2**20), "padding": (2**20, 2**20)}, "an image of y must have at most"),
        ({"kernel": (2**16, 2**16), "padding": (2**15, 2**15)}, "a padded image must have at most"),
        ({"kernel": (2**12, 2**12), "padding": (2**11, 2**11)}, "a filter must have fewer than"),
        ({"bias": bias[:4]}, r"bias must be int64 \[6\]"),
        ({"x": x.float()}, "x must be int8 or int16"),
        ({"x": x[0]}, r"x must be \[N, C, H, W\]"),
    ):
        with pytest.raises(RuntimeError, match=sentence):
            run(**wrong)
