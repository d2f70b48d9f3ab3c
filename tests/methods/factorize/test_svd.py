import numpy as np
import pytest
import torch

from tersetorch.methods.factorize import rank_within, truncated


@pytest.mark.parametrize("rank", [1, 3, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_error_is_that_of_the_singular_values_left_out(rank, dtype):
    weight = torch.randn(9, 7, 1, 1, generator=torch.Generator().manual_seed(0), dtype=dtype)
    left, right = truncated(weight, rank)
    assert left.shape == (9, rank) and right.shape == (rank, 7) and left.dtype == right.dtype == dtype
    values = np.linalg.svd(weight.flatten(1).double().numpy(), compute_uv=False)
    error = float((left.double() @ right.double() - weight.flatten(1).double()).square().sum())
    assert error == pytest.approx(float(np.square(values[rank:]).sum()), rel=1e-5, abs=1e-10)


def test_rank_within():
    assert rank_within(300, 784, 300 * 784 // 16) == 13
    assert rank_within(10, 20, 29) == 0 and rank_within(10, 20, 30) == 1 and rank_within(3, 4, 10**6) == 3


@pytest.mark.parametrize(("rank", "error"), [(0, ValueError), (8, ValueError), (2.0, TypeError)])
def test_ranks_that_do_not_exist_are_refused(rank, error):
    with pytest.raises(error, match=r"factorize.truncated: rank must be"):
        truncated(torch.ones(9, 7), rank)
