"""flat_conv2d on a CUDA device: a real one, or the pretend one of `make test-cuda`."""

import os

import pytest
import torch

from tersetorch import ops
from tersetorch.nn import FlattenedConv2d

CASES = [
    ((2, 6, 7, 9), 5, (3, 3), {"padding": 1}),
    ((1, 4, 9, 8), 20, (3, 2), {"stride": (2, 1), "padding": (0, 3), "rank": 2}),
    ((0, 3, 5, 5), 4, (3, 3), {}),
]


def problem(shape, out, kernel, rank=1, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    shapes = [
        (out * rank, shape[1]),
        (out * rank, kernel[0]),
        (out * rank, kernel[1]),
        (out * rank,),
        (out * rank,),
        (out,),
    ]
    return torch.randn(shape, generator=g).to(dtype), ops.FlatFilters(*(torch.randn(s, generator=g) for s in shapes))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape,out,kernel,sizes", CASES)
def test_equals_the_cpu(device, shape, out, kernel, sizes, memory_format):
    for dtype in (torch.float32, torch.bfloat16):
        x, f = problem(shape, out, kernel, sizes.get("rank", 1), dtype)
        x = x.contiguous(memory_format=memory_format)
        for relu in (False, True):
            want = ops.flat_conv2d(x, *f, **sizes, relu=relu)
            got = ops.flat_conv2d(x.to(device), *(t.to(device) for t in f), **sizes, relu=relu)
            assert got.device.type == "cuda" and got.stride() == want.stride()
            torch.testing.assert_close(got.cpu(), want)


@pytest.mark.skipif("TERSETORCH_PRETEND_CUDA" in os.environ, reason="torch's depthwise convolution has no fallback")
def test_gradients_equal_those_of_the_cpu(device):
    def gradients(place):
        x, f = problem((2, 5, 6, 7), 9, (3, 3))
        leaves = [t.to(place).requires_grad_() for t in (x, *f)]
        y = ops.flat_conv2d(*leaves, padding=1, relu=True)
        return torch.autograd.grad(y, leaves, torch.ones_like(y))

    for got, want in zip(gradients(device), gradients("cpu"), strict=True):
        torch.testing.assert_close(got.cpu(), want, rtol=1e-4, atol=1e-4)


def test_layers_move_to_the_device_and_back(device):
    torch.manual_seed(0)
    layer = FlattenedConv2d(6, 8, 3, padding="same", stages=2).eval().pack("fused")
    x = torch.randn(2, 6, 9, 9)
    with torch.no_grad():
        want = layer(x)
        torch.testing.assert_close(layer.to(device)(x.to(device)).cpu(), want)
        torch.testing.assert_close(layer.cpu()(x), want)
