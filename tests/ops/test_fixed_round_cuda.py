"""fixed_round on a CUDA device: a real one, or that of `make test-cuda`."""

import pytest
import torch

from tersetorch.ops import fixed_round, fixed_round_whole


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", [(2, 6), (2, 14), (4, 16)])
def test_equals_the_cpu(device, format, dtype):
    x = torch.randn(5, 67, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[0, :3] = torch.tensor([float("inf"), -float("inf"), -0.0])
    for how in ({}, {"rounding": "stochastic", "seed": -7, "offset": 1001}):
        got = fixed_round(x.to(device), *format, **how)
        assert got.device.type == "cuda" and torch.equal(got.cpu(), fixed_round(x, *format, **how))
        whole = fixed_round_whole(x.to(device), *format, **how)
        assert torch.equal(whole.cpu(), fixed_round_whole(x, *format, **how))


def test_what_is_no_number_becomes_zero(device):
    x = torch.tensor([float("nan"), 1.0], device=device)
    assert fixed_round(x, 2, 6).isnan().tolist() == [True, False]
    assert fixed_round_whole(x, 2, 6).tolist() == [0, 64]


def test_accepts_unaligned_memory(emulator):
    x = torch.randn(4, 70)
    assert torch.equal(fixed_round(emulator.unaligned(x.to("cuda")), 2, 6).cpu(), fixed_round(x, 2, 6))
