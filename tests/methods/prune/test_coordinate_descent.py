from itertools import pairwise

import pytest
import torch

from tersetorch.methods.prune.coordinate_descent import BLOCK, descend
from tersetorch.methods.prune.least_squares import restricted


def problem(n=BLOCK + 9, groups=2, rows=3):
    """Weights, what is kept of them, and a positive definite H, of more columns than a block."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(groups, rows, n, generator=generator, dtype=torch.float64)
    keep = torch.rand(weights.shape, generator=generator) < 0.5
    x = torch.randn(groups, n, 3 * n, generator=generator, dtype=torch.float64)
    return weights, keep, x @ x.mT / n


def error(found, weights, hessian):
    change = found - weights
    return ((change @ hessian) * change).sum()


def test_it_comes_to_the_best_weights_there_are():
    weights, keep, hessian = problem()
    expected = restricted(weights, keep, hessian)
    torch.testing.assert_close(descend(torch.where(keep, weights, 0), keep, weights, hessian, 200), expected)
    assert torch.equal(descend(expected, keep, weights, hessian, 0), expected)


def test_every_round_lowers_the_error_of_rounded_weights_until_no_single_change_would():
    weights, keep, hessian = problem()
    levels = torch.tensor([-1.5, -0.5, 0.5, 1.5], dtype=torch.float64)

    def rounding(column):
        return levels[(column[..., None] - levels).abs().argmin(-1)]

    found = torch.where(keep, rounding(weights), 0)
    errors = [error(found, weights, hessian)]
    for _ in range(30):
        found = descend(found, keep, weights, hessian, 1, rounding)
        errors.append(error(found, weights, hessian))
    assert all(after <= before for before, after in pairwise(errors))
    assert errors[1] < 0.9 * errors[0] and errors[-1] == pytest.approx(errors[-2])
    assert not found[~keep].any() and set(found[keep].tolist()) <= set(levels.tolist())
    for place in keep.nonzero()[::7].tolist():
        for level in levels:
            other = found.clone()
            other[tuple(place)] = level
            assert error(other, weights, hessian) >= errors[-1] - 1e-9
