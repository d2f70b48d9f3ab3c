"""product_matmul on a CUDA device: a real one, or the pretend one of `make test-cuda`."""

import pytest
import torch

from tersetorch import ops


def problem(entries, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(entries, (70, 6), generator=generator).to(torch.uint8)
    return {
        "x": torch.randn(66, 9, generator=generator).to(dtype),
        "codes": ops.product_pack(codes, entries),
        "codebooks": torch.randn(2, 3, 3, entries, generator=generator),
        "bias": torch.randn(70, generator=generator),
    }


@pytest.mark.parametrize("entries", [16, 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_the_product_of_the_cpu(device, entries, dtype):
    tensors = problem(entries, dtype)
    moved = {name: tensor.to(device) for name, tensor in tensors.items()}
    for options in ({}, {"relu": True}, {"mode": "int8"}):
        want = ops.product_matmul(**tensors, out_features=70, **options)
        got = ops.product_matmul(**moved, out_features=70, **options)
        assert got.device.type == "cuda" and got.dtype == dtype
        tolerance = 1e-4 if dtype == torch.float32 else 0.1
        assert torch.allclose(got.cpu().float(), want.float(), atol=tolerance, rtol=0.02 if tolerance > 0.01 else 1e-5)
        if options.get("mode") == "int8" and dtype == torch.float32:
            assert torch.equal(got.cpu(), want)


def test_decodes(device):
    tensors = problem(5)
    want = ops.product_decode(tensors["codes"], tensors["codebooks"], out_features=70, in_features=9)
    got = ops.product_decode(
        tensors["codes"].to(device), tensors["codebooks"].to(device), out_features=70, in_features=9
    )
    assert torch.equal(got.cpu(), want)


def test_tensors_elsewhere_are_refused(device):
    tensors = problem(5)
    tensors["codes"] = tensors["codes"].to(device)
    with pytest.raises(ValueError, match="codes must be on the device of x"):
        ops.product_matmul(**tensors, out_features=70)
