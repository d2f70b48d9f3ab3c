import pytest
import torch

from tersetorch.methods.prune.blocked_obs import blocked_obs
from tersetorch.methods.prune.patterns import parse


def problem(groups, rows, n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(groups, n, n, generator=generator, dtype=torch.float64)
    x = mix @ torch.randn(groups, n, 4 * n, generator=generator, dtype=torch.float64)
    hessian = x @ x.mT / (2 * n)
    return torch.randn(groups, rows, n, generator=generator, dtype=torch.float64), torch.linalg.inv(hessian)


def solve(weights, inverse, sparsity=0.0, pattern=None, block_size=128, **more):
    told = []
    found, keep = blocked_obs(weights, inverse, sparsity, parse("f", pattern), block_size, told.append, **more)
    assert told == sorted(told) and told[-1] == 1
    return found, keep


def unblocked(w, inverse, keep, rounding=None):
    """One column after the other, with the inverse of what is left of H: no factor, no blocks."""
    w, inverse = w.clone(), inverse.clone()
    for j in range(w.shape[1]):
        wanted = torch.where(keep[:, j], w[:, j] if rounding is None else rounding(w[:, j]), 0)
        error = (w[:, j] - wanted) / inverse[j, j]
        w[:, j + 1 :] -= error[:, None] * inverse[j, j + 1 :]
        w[:, j] = wanted
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return w


@pytest.mark.parametrize("block_size", [1, 5, 16, 128])
@pytest.mark.parametrize("rounding", [None, lambda column: (column * 4).round() / 4])
def test_the_block_size_changes_nothing_once_the_choice_is_made(block_size, rounding):
    weights, inverse = problem(2, 6, 20)
    keep = torch.rand(weights.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    found, kept = solve(weights, inverse, block_size=block_size, kept=keep, rounding=rounding)
    assert torch.equal(kept, keep)
    for group in range(2):
        expected = unblocked(weights[group], inverse[group], keep[group], rounding)
        torch.testing.assert_close(found[group], expected)
    assert not found[~keep].any()
    if rounding is not None:
        assert torch.equal((found * 4).round(), found * 4)


@pytest.mark.parametrize("block_size", [4, 7, 20, 50])
def test_each_block_takes_its_part_of_least_score(block_size):
    weights, inverse = problem(1, 6, 20, seed=2)
    found, keep = solve(weights, inverse, 0.55, block_size=block_size)
    assert int((~keep).sum()) == 66
    assert torch.equal(found == 0, ~keep)
    # Score and choose with the definitions: w as earlier blocks left it, and the inverse of what is left of H.
    done = torch.ones_like(keep[0])
    total = 0
    for start in range(0, 20, block_size):
        stop = min(20, start + block_size)
        now = unblocked(weights[0], inverse[0], torch.where(torch.arange(20) < start, done, True))
        scores = torch.empty(6, stop - start, dtype=torch.float64)
        for j in range(start, stop):
            left = torch.linalg.inv(torch.linalg.inv(inverse[0])[j:, j:])
            scores[:, j - start] = now[:, j].square() / left[0, 0]
        due = round(66 * stop / 20) - total
        total += due
        limit = scores.flatten().kthvalue(due).values
        done[:, start:stop] = scores > limit
    assert torch.equal(keep[0], done)
    torch.testing.assert_close(found[0], unblocked(weights[0], inverse[0], done))


@pytest.mark.parametrize("block_size", [1, 6, 128])
def test_groups_of_inputs_keep_their_number(block_size):
    weights, inverse = problem(1, 5, 12, seed=3)
    found, keep = solve(weights, inverse, pattern="1:4", block_size=block_size)
    assert torch.equal(keep.unflatten(-1, (3, 4)).sum(-1), torch.ones(1, 5, 3, dtype=torch.int64))
    torch.testing.assert_close(found[0], unblocked(weights[0], inverse[0], keep[0]))
    assert torch.equal(keep, solve(weights, inverse, pattern="1:4", block_size=4)[1])


@pytest.mark.parametrize("pattern", ["4x1", "2x3", "3x2"])
def test_blocks_go_together(pattern):
    weights, inverse = problem(1, 7, 11, seed=4)
    found, keep = solve(weights, inverse, 0.5, pattern, block_size=4)
    height, width = (int(side) for side in pattern.split("x"))
    for top in range(0, 7, height):
        for left in range(0, 11, width):
            block = keep[0, top : top + height, left : left + width]
            assert block.all() or not block.any()
    assert 38 - 2 * height * width < int((~keep).sum()) <= 38
    torch.testing.assert_close(found[0], unblocked(weights[0], inverse[0], keep[0]))


@pytest.mark.parametrize("pattern", [None, "2:4", "2x2"])
def test_zeros_stay_and_count(pattern):
    weights, inverse = problem(1, 6, 12, seed=5)
    zero = torch.rand(weights.shape, generator=torch.Generator().manual_seed(6)) < 0.3
    zero[:, :, :4] = True  # more of a block than the sparsity asks for
    weights[zero] = 0
    found, keep = solve(weights, inverse, 0.0 if pattern == "2:4" else 0.7, pattern, block_size=4)
    assert not keep[zero].any() and not found[zero].any()
    if pattern is None:
        assert int((~keep).sum()) == round(0.7 * 72)
    few = solve(weights, inverse, 0.1)
    assert torch.equal(few[0], weights) and torch.equal(few[1], ~zero)
