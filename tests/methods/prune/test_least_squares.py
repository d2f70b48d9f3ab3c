import pytest
import torch

from tersetorch.methods.prune.least_squares import DEAD, damped, inverse, relative_error, restricted


@pytest.fixture
def problem():
    """Weights [2, 3, 7], inputs [2, 7, 40] and their second moments."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 7, 7, generator=generator, dtype=torch.float64) @ torch.randn(
        2, 7, 40, generator=generator, dtype=torch.float64
    )
    return torch.randn(2, 3, 7, generator=generator, dtype=torch.float64), x, 2 / 40 * x @ x.mT


def test_restricted_is_least_squares_over_the_inputs_that_are_kept(problem):
    weights, x, hessian = problem
    keep = torch.rand(weights.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    keep[0, 0], keep[0, 1] = True, False
    found = restricted(weights, keep, hessian)
    assert torch.equal(found[0, 0], weights[0, 0]) and not found[0, 1].any()
    for group in range(2):
        for row in range(3):
            kept = keep[group, row]
            wanted = torch.linalg.lstsq(x[group][kept].T, (weights[group, row] @ x[group])[:, None]).solution[:, 0]
            torch.testing.assert_close(found[group, row][kept], wanted)
            assert not found[group, row][~kept].any()


def test_the_relative_error_is_that_of_the_outputs(problem):
    weights, x, hessian = problem
    change = weights.flip(2) / 3
    expected = (change @ x).square().sum() / (weights @ x).square().sum()
    assert relative_error(change, weights, hessian) == pytest.approx(float(expected))
    ones = torch.cat([x, torch.ones(2, 1, 40, dtype=x.dtype)], 1)
    wider = torch.cat([change, torch.full((2, 3, 1), 0.3)], 2)
    expected = (wider @ ones).square().sum() / (weights @ x).square().sum()
    assert relative_error(wider, weights, 2 / 40 * ones @ ones.mT) == pytest.approx(float(expected))
    assert relative_error(change, weights, torch.zeros_like(hessian)) == 0


def test_damping_is_relative_to_the_inputs_that_live():
    hessian = torch.diag(torch.tensor([1.0, 3.0, 0.0]))[None]
    assert torch.equal(damped(hessian, 0.5), torch.diag(torch.tensor([2.0, 4.0, 2 * DEAD]))[None])
    assert torch.equal(damped(hessian * 0, 0.5), torch.diag(torch.full((3,), DEAD))[None])


def test_the_inverse_and_where_there_is_none(problem):
    hessian = problem[2]
    torch.testing.assert_close(inverse("f", "fc", hessian) @ hessian, torch.eye(7).double().expand(2, 7, 7))
    x = torch.ones(1, 4, 4).double()
    with pytest.raises(ValueError, match=r"f: the input moments of 'fc' must be positive definite, got .*; raise damp"):
        inverse("f", "fc", x)
