"""xnor_conv2d, sign_pack_images and sign_max_pool2d on a CUDA device: a real one, or that of `make test-cuda`."""

import pytest
import torch

from tersetorch.ops import sign_max_pool2d, sign_pack_images, xnor_conv2d, xnor_conv2d_pack

LAST = torch.channels_last
CASES = [
    ((2, 70, 6, 5), 40, (3, 3), {"padding": 1}),
    ((1, 64, 7, 5), 64, (3, 2), {"stride": (2, 1), "padding": (0, 2), "dilation": (1, 2), "padding_value": 1}),
    ((1, 128, 4, 4), 64, (3, 3), {"groups": 2, "padding": 1, "padding_value": -1}),
    ((1, 60, 5, 6), 100, (3, 3), {"groups": 5, "padding": 2, "dilation": 2}),
    ((1, 40, 6, 5), 40, (3, 3), {"groups": 40, "padding": 1}),
    ((0, 9, 5, 5), 4, (3, 3), {}),
]


def problem(shape, filters, kernel, how, dtype):
    g = torch.Generator().manual_seed(0)
    groups = how.get("groups", 1)
    x = torch.randn(shape, generator=g).to(dtype)
    weight = xnor_conv2d_pack(sign_pack_images(torch.randn(filters, shape[1] // groups, *kernel, generator=g)), groups)
    sizes = {"in_channels": shape[1], "out_channels": filters, "kernel_size": kernel, **how}
    return x, weight, sizes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_cpu(device, case, dtype):
    shape, filters, kernel, how = case
    x, weight, sizes = problem(shape, filters, kernel, how, dtype)
    bits = sign_pack_images(x.to(device))
    assert bits.device.type == "cuda" and torch.equal(bits.cpu(), sign_pack_images(x))
    images = (x.to(device), x.to(device).contiguous(memory_format=LAST), bits)
    columns = weight[0, ..., 0].numel() * 32
    thresholds = torch.randint(-columns, columns, (filters,)).int() // 8
    scale, bias = torch.randn(2, filters)
    for extra in ({}, {"scale": scale, "bias": bias}, {"thresholds": thresholds}):
        want = xnor_conv2d(x, weight, **sizes, **extra)
        moved = {name: tensor.to(device) for name, tensor in extra.items()}
        for signs in images:
            got = xnor_conv2d(signs, weight.to(device), **sizes, **moved)
            assert got.device.type == "cuda" and torch.equal(got.cpu(), want) and got.stride() == want.stride()


def test_pools_as_the_cpu_does(device):
    packed = sign_pack_images(torch.randn(2, 70, 7, 6) - 1)
    flips = packed[0, 0, 0]
    for how in ({}, {"stride": 1, "padding": 1}, {"ceil_mode": True, "flips": flips}):
        moved = {name: value.to(device) if name == "flips" else value for name, value in how.items()}
        assert torch.equal(sign_max_pool2d(packed.to(device), 2, **moved).cpu(), sign_max_pool2d(packed, 2, **how))


def test_tensors_elsewhere_are_refused(device):
    x, weight, sizes = problem(*CASES[0], torch.float32)
    with pytest.raises(ValueError, match="weight must be on the device of x"):
        xnor_conv2d(x.to(device), weight, **sizes)


def test_accepts_unaligned_memory(emulator):
    x, weight, sizes = problem(*CASES[0], torch.float32)
    moved = [emulator.unaligned(tensor.to("cuda")) for tensor in (x, weight)]
    assert torch.equal(xnor_conv2d(*moved, **sizes).cpu(), xnor_conv2d(x, weight, **sizes))
    last = emulator.unaligned(x.contiguous(memory_format=LAST).to("cuda"))
    assert torch.equal(xnor_conv2d(last, moved[1], **sizes).cpu(), xnor_conv2d(x, weight, **sizes))
    packed = emulator.unaligned(sign_pack_images(x).to("cuda"))
    assert torch.equal(sign_max_pool2d(packed, 2).cpu(), sign_max_pool2d(sign_pack_images(x), 2))
