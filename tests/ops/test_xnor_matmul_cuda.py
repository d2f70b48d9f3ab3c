"""sign_pack and xnor_matmul on a CUDA device: a real one, or the pretend one of `make test-cuda`."""

import pytest
import torch

from tersetorch.ops import sign_pack, xnor_matmul, xnor_pack


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows,columns,batch", [(1, 1, 1), (70, 300, 9), (33, 64, 4), (5, 0, 2), (0, 9, 3), (6, 9, 0)])
def test_equals_the_cpu(device, rows, columns, batch, dtype):
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, columns, generator=generator).to(dtype) for n in (batch, rows))
    bits = sign_pack(x.to(device))
    assert bits.device.type == "cuda" and torch.equal(bits.cpu(), sign_pack(x))
    packed = xnor_pack(sign_pack(weight))
    scale, bias = torch.randn(2, rows, generator=generator)
    thresholds = torch.randint(-columns - 1, columns + 2, (rows,), generator=generator).int()
    sizes = {"in_features": columns, "out_features": rows}
    for extra in ({}, {"scale": scale, "bias": bias}, {"thresholds": thresholds}):
        want = xnor_matmul(x, packed, **sizes, **extra)
        moved = {name: tensor.to(device) for name, tensor in extra.items()}
        for samples in (x.to(device), bits):
            got = xnor_matmul(samples, packed.to(device), **sizes, **moved)
            assert got.device.type == "cuda" and torch.equal(got.cpu(), want)


def test_unused_bits_between_the_columns_count_nothing(device):
    x, weight = (sign_pack(torch.randn(n, 9, 70)).flatten(1) for n in (5, 40))
    sizes = {"in_features": 630, "out_features": 40}
    want = xnor_matmul(x, xnor_pack(weight), **sizes)
    assert torch.equal(xnor_matmul(x.to(device), xnor_pack(weight).to(device), **sizes).cpu(), want)


def test_tensors_elsewhere_are_refused(device):
    packed = xnor_pack(sign_pack(torch.randn(3, 70)))
    with pytest.raises(ValueError, match="weight must be on the device of x"):
        xnor_matmul(torch.randn(2, 70, device=device), packed, in_features=70, out_features=3)


def test_accepts_unaligned_memory(emulator):
    x, packed = torch.randn(4, 70), xnor_pack(sign_pack(torch.randn(3, 70)))
    sizes = {"in_features": 70, "out_features": 3}
    moved = [emulator.unaligned(tensor.to("cuda")) for tensor in (x, packed)]
    assert torch.equal(xnor_matmul(*moved, **sizes).cpu(), xnor_matmul(x, packed, **sizes))
