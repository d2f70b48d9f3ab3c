import copy

import pytest
import torch

from tersetorch.methods import prune
from tersetorch.methods.prune.layerwise_obs import layerwise_obs
from tersetorch.methods.prune.patterns import parse


def problem(groups, rows, n, bias, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(groups, n, n, generator=generator, dtype=torch.float64) @ torch.randn(
        groups, n, 4 * n, generator=generator, dtype=torch.float64
    )
    if bias:
        x = torch.cat([x, torch.ones(groups, 1, 4 * n, dtype=x.dtype)], 1)
    weights = torch.randn(groups, rows, n, generator=generator, dtype=torch.float64)
    shift = torch.randn(groups, rows, generator=generator, dtype=torch.float64) if bias else None
    return weights, shift, torch.linalg.inv(x @ x.mT / (2 * n))


def walk(weights, bias, inverse, order):
    """The deletions of one row after another, in one order for all."""
    w = weights.clone() if bias is None else torch.cat([weights, bias[:, None]], 1)
    gone = weights == 0
    for row, q in order:
        if not gone[row, q]:
            w[row] -= w[row, q] / inverse[q, q] * inverse[:, q]
            gone[row, q] = True
            w[row, : weights.shape[1]][gone[row]] = 0
    return w[:, : weights.shape[1]], None if bias is None else w[:, -1]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.8])
def test_one_ranking_and_an_update_for_each(bias, sparsity):
    weights, shift, inverse = problem(1, 4, 9, bias)
    weights[0, 1, 2:4] = 0
    found, keep, moved = layerwise_obs(weights, inverse, shift, sparsity, None, lambda part: None)
    score = weights[0].square() / (2 * inverse[0].diagonal()[:9])
    count = max(2, round(sparsity * 36))
    order = [divmod(int(place), 9) for place in score.flatten().argsort()[:count]]
    expected, expected_bias = walk(weights[0], None if shift is None else shift[0], inverse[0], order)
    torch.testing.assert_close(found[0], expected)
    assert int((~keep).sum()) == count and torch.equal(found == 0, ~keep)
    if bias:
        torch.testing.assert_close(moved[0], expected_bias)
    else:
        assert moved is None


def test_groups_have_each_their_inputs_and_patterns_hold():
    weights, shift, inverse = problem(2, 4, 8, True, seed=1)
    found, keep, moved = layerwise_obs(weights, inverse, shift, 0.0, parse("f", "2:4"), lambda part: None)
    assert torch.equal(keep.unflatten(-1, (2, 4)).sum(-1), torch.full((2, 4, 2), 2))
    for group in range(2):
        score = weights[group].square() / inverse[group].diagonal()[:8]
        order = [divmod(int(place), 8) for place in score.flatten().argsort() if not keep[group].flatten()[place]]
        expected, expected_bias = walk(weights[group], shift[group], inverse[group], order)
        torch.testing.assert_close(found[group], expected)
        torch.testing.assert_close(moved[group], expected_bias)
    blocks = layerwise_obs(weights, inverse, shift, 0.5, parse("f", "4x1"), lambda part: None)[1]
    assert torch.equal(blocks.all(1), blocks.any(1)) and int(blocks.sum()) == 32


def test_a_frozen_bias_stands_still(mlp):
    other = copy.deepcopy(mlp)
    mlp[0].bias.requires_grad_(False)
    data = [torch.randn(64, 20, generator=torch.Generator().manual_seed(0)) + 1]
    for model in (mlp, other):
        before = model[0].bias.detach().clone()
        prune.obs(model, data, 0.5, solver="layerwise", targets="0")
        assert torch.equal(model[0].bias, before) is (model is mlp)
