"""sign_matmul, bitplane_matmul and bitplane_conv2d on a CUDA device: a real one, or that of `make test-cuda`."""

import pytest
import torch

from tersetorch.ops import bitplane_conv2d, bitplane_matmul, sign_matmul, sign_pack, xnor_pack

SHAPES = [(1, 1, 1), (70, 300, 9), (33, 64, 4), (5, 0, 2), (0, 9, 3), (6, 9, 0)]


def moved(device, arguments):
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}


@pytest.mark.parametrize("rows,columns,batch", SHAPES)
def test_equal_the_cpu(device, rows, columns, batch):
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, columns, generator=generator) for n in (batch, rows))
    packed, (scale, bias) = xnor_pack(sign_pack(weight)), torch.randn(2, rows, generator=generator)
    for dtype in (torch.float32, torch.bfloat16):
        for extra in ({}, {"scale": scale, "bias": bias, "relu": True}):
            want = sign_matmul(x.to(dtype), packed, out_features=rows, **extra)
            got = sign_matmul(x.to(device, dtype), packed.to(device), out_features=rows, **moved(device, extra))
            assert got.device.type == "cuda" and torch.equal(got.cpu(), want)
    pixels = torch.randint(256, (batch, columns), generator=generator).to(torch.uint8)
    sizes = {"in_features": columns, "out_features": rows, "step": 2, "zero": 255}
    for extra in ({}, {"scale": scale, "bias": bias}, {"thresholds": scale.mul(9).int()}):
        want = bitplane_matmul(pixels, packed, **sizes, **extra)
        got = bitplane_matmul(pixels.to(device), packed.to(device), **sizes, **moved(device, extra))
        assert got.device.type == "cuda" and torch.equal(got.cpu(), want)


@pytest.mark.parametrize("extra", [{}, {"scale": torch.ones(37)}, {"thresholds": torch.zeros(37, dtype=torch.int32)}])
def test_convolves_as_the_cpu(device, extra):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(256, (2, 3, 6, 5), generator=generator).to(torch.uint8)
    packed = xnor_pack(sign_pack(torch.randn(37, 3 * 3 * 2, generator=generator)))
    sizes = {"out_channels": 37, "kernel_size": (3, 2), "stride": (2, 1), "padding": 1, "step": 2, "zero": 255}
    want = bitplane_conv2d(x, packed, **sizes, **extra)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        images = x.to(device).contiguous(memory_format=memory_format)
        got = bitplane_conv2d(images, packed.to(device), **sizes, **moved(device, extra))
        assert got.device.type == "cuda" and torch.equal(got.cpu(), want)


def test_tensors_elsewhere_are_refused(device):
    packed = xnor_pack(sign_pack(torch.randn(3, 70)))
    with pytest.raises(ValueError, match="weight must be on the device of x"):
        sign_matmul(torch.randn(2, 70, device=device), packed, out_features=3)
    with pytest.raises(ValueError, match="weight must be on the device of x"):
        bitplane_matmul(torch.zeros(2, 70, device=device).byte(), packed, in_features=70, out_features=3)


def test_accept_unaligned_memory(emulator):
    x, packed = torch.randn(4, 70), xnor_pack(sign_pack(torch.randn(3, 70)))
    moved = [emulator.unaligned(tensor.to("cuda")) for tensor in (x, packed)]
    assert torch.equal(sign_matmul(*moved, out_features=3).cpu(), sign_matmul(x, packed, out_features=3))
