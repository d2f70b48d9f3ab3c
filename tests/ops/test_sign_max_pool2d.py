"""sign_max_pool2d: torch's max_pool2d of signs, the compiler, and what it refuses."""

import itertools

import pytest
import torch
from torch.nn.functional import max_pool2d

from tersetorch.ops import sign_max_pool2d, sign_pack_images

OP = torch.ops.tersetorch.sign_max_pool2d.default
CASES = [
    ((2, 70, 6, 7), 2, {}),
    ((1, 64, 7, 5), 3, {"stride": 2, "padding": 1}),
    ((1, 600, 8, 9), (3, 2), {"stride": (1, 3), "dilation": (2, 1), "padding": (1, 1)}),
    ((2, 5, 5, 6), 2, {"ceil_mode": True}),
    ((1, 5, 6, 6), 3, {"stride": 4, "padding": 1, "ceil_mode": True}),
    ((1, 5, 7, 3), 4, {"ceil_mode": True}),
    ((1, 5, 3, 2), (6, 4), {"stride": 3, "padding": (1, 0), "ceil_mode": True}),
    ((0, 5, 4, 4), 2, {}),
]


def problem(shape):
    g = torch.Generator().manual_seed(0)
    return torch.where(torch.randn(shape, generator=g) > 0.7, 1.0, -1.0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_is_the_largest_sign(case):
    shape, kernel, how = case
    x = problem(shape)
    want = max_pool2d(x, kernel, **how)
    packed = sign_pack_images(x)
    assert torch.equal(sign_max_pool2d(packed, kernel, **how), sign_pack_images(want))
    flipped = torch.arange(shape[1]) % 3 == 0
    flips = sign_pack_images(torch.where(flipped, -1.0, 1.0).view(1, -1, 1, 1)).flatten()
    want = torch.where(flipped.view(-1, 1, 1), -want, want)
    assert torch.equal(sign_max_pool2d(packed, kernel, **how, flips=flips), sign_pack_images(want))


def test_takes_all_small_images_that_torch_does():
    sizes = itertools.product(range(5), (1, 2, 4, 5), (1, 2, 4), range(3), (1, 2, 3), (False, True))
    for height, kernel, stride, padding, dilation, ceil_mode in sizes:
        if padding > kernel // 2:
            continue
        how = {"kernel_size": (kernel, 1), "stride": (stride, 1), "padding": (padding, 0)}
        how |= {"dilation": (dilation, 1), "ceil_mode": ceil_mode}
        x = problem((1, 3, height, 2))
        try:
            want = max_pool2d(x, **how)
        except RuntimeError:
            want = None
        # A window without a pixel has no largest sign.
        if want is None or want.isinf().any():
            with pytest.raises(ValueError, match="x must be at least"):
                sign_max_pool2d(sign_pack_images(x), **how)
            with pytest.raises(RuntimeError, match="x must be as large as"):
                OP(sign_pack_images(x), *(list(how[name]) for name in list(how)[:4]), ceil_mode)
        else:
            assert torch.equal(sign_max_pool2d(sign_pack_images(x), **how), sign_pack_images(want))


def test_images_without_a_batch_and_strides():
    packed = sign_pack_images(problem((2, 70, 6, 7)))
    assert torch.equal(sign_max_pool2d(packed[1], 2), sign_max_pool2d(packed, 2)[1])
    transposed = packed.transpose(1, 2)
    assert torch.equal(sign_max_pool2d(transposed, 2), sign_max_pool2d(transposed.contiguous(), 2))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_registration_is_sound(case):
    torch.compiler.reset()
    shape, kernel, how = case
    packed = sign_pack_images(problem(shape))
    flips = packed.new_ones(packed.shape[-1])
    pairs = [[3, 2], [1, 3], [1, 0], [2, 1]]
    torch.library.opcheck(OP, (packed, *pairs, how.get("ceil_mode", False), flips))
    compiled = torch.compile(lambda x: sign_max_pool2d(x, kernel, **how), fullgraph=True)
    assert torch.equal(compiled(packed), sign_max_pool2d(packed, kernel, **how))


def test_exports():
    class Module(torch.nn.Module):
        def forward(self, x):
            return sign_max_pool2d(x, 2)

    packed = sign_pack_images(problem((4, 70, 6, 7)))
    program = torch.export.export(Module(), (packed,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert torch.equal(program.module()(packed[:3]), sign_max_pool2d(packed[:3], 2))


def test_refuses():
    x = sign_pack_images(problem((2, 70, 6, 7)))
    for error, message, arguments in (
        (TypeError, "x must be an int64 tensor, got list", ([1], 2)),
        (TypeError, "x must be an int64 tensor, got torch.float32", (x.float(), 2)),
        (TypeError, "flips must be an int64 tensor", (x, 2, None, 0, 1, False, torch.zeros(2))),
        (ValueError, r"x must be \[N, H, W, words\]", (x[0, 0], 2)),
        (ValueError, r"flips must be \[2\] on cpu, got shape \(3,\)", (x, 2, None, 0, 1, False, x.new_zeros(3))),
        (ValueError, "padding must be at most half of kernel_size, 2 high, got 2", (x, 2, None, 2)),
        (ValueError, "x must be at least 7 high for these windows", (x, 7)),
        (ValueError, "x must be at least 7 high for these windows", (x, 8, 2, 0, 1, True)),
        (ValueError, "x must be at least 1 high for these windows", (x[:, :0], 2, 4, 0, 1, True)),
        (ValueError, "x must be at least 8 wide, as dilation is, got 7", (x, 2, None, 1, (1, 8))),
        (ValueError, "kernel_size must be at least 1, got 0", (x, 0)),
        (TypeError, "stride must be an int or two ints", (x, 2, 1.5)),
    ):
        with pytest.raises(error, match=message):
            sign_max_pool2d(*arguments)
    for message, arguments in (
        ("x must be packed images int64", (x.float(), [2, 2], [2, 2], [0, 0], [1, 1])),
        ("x must be as large as the window's 7", (x, [7, 2], [2, 2], [0, 0], [1, 1])),
        ("window's 9, less stride - 1 for ceil_mode, got 6", (x, [9, 2], [3, 2], [0, 0], [1, 1], True)),
        ("window's 2, less stride - 1 for ceil_mode, got 0", (x[:, :0], [2, 2], [4, 2], [0, 0], [1, 1], True)),
        ("x must be as large as dilation, 8, got 7", (x, [2, 2], [2, 2], [0, 1], [1, 8])),
        ("padding must be at most half of kernel_size, 2, got 2", (x, [2, 2], [2, 2], [2, 0], [1, 1])),
        ("flips must be int64", (x, [2, 2], [2, 2], [0, 0], [1, 1], False, x.new_zeros(3))),
    ):
        with pytest.raises(RuntimeError, match=message):
            OP(*arguments)
