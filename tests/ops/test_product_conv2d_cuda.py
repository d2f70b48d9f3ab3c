"""product_conv2d on a CUDA device against the same on the CPU."""

import pytest
import torch
from ops.test_product_conv2d import CASES, problem

from tersetorch import ops


@pytest.mark.parametrize("case", CASES[:3])
def test_matches_the_cpu(device, case):
    x, codes, codebooks, bias, _, sizes = problem(*case)
    expected = ops.product_conv2d(x, codes, codebooks, bias, **sizes)
    y = ops.product_conv2d(*(t.to(device) for t in (x, codes, codebooks, bias)), **sizes)
    assert y.device.type == "cuda" and torch.allclose(y.cpu(), expected, atol=1e-4)


def test_a_damaged_filter_is_nan(device):
    x, codes, codebooks, bias, _, sizes = problem(*CASES[0])
    codes[0, 0] |= 15
    y = ops.product_conv2d(*(t.to(device) for t in (x, codes, codebooks, bias)), **sizes).cpu()
    assert y[:, 0].isnan().all() and not y[:, 1:].isnan().any()
