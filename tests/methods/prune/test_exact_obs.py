import itertools

import pytest
import torch

from tersetorch.methods.prune import exact_obs as module
from tersetorch.methods.prune.exact_obs import exact_obs
from tersetorch.methods.prune.patterns import parse


def problem(groups, rows, n, seed=0):
    """Weights [groups, rows, n] and the second moments of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(groups, n, n, generator=generator, dtype=torch.float64)
    x = mix @ torch.randn(groups, n, 4 * n, generator=generator, dtype=torch.float64)
    return torch.randn(groups, rows, n, generator=generator, dtype=torch.float64), x @ x.mT / (2 * n)


def solve(weights, hessian, sparsity=0.0, pattern=None):
    told = []
    found, keep = exact_obs(weights, hessian, torch.linalg.inv(hessian), sparsity, parse("f", pattern), told.append)
    assert told == sorted(told) and all(0 < part <= 1 for part in told)
    assert torch.equal(found == 0, ~keep)
    return found, keep


def best(rows, keep, hessian):
    """Rows refitted to what keep leaves, and what that costs, by normal equations."""
    found, cost = torch.zeros_like(rows), 0.0
    for row, kept, new in zip(rows, keep, found, strict=True):
        if kept.any():
            new[kept] = torch.linalg.lstsq(hessian[kept][:, kept], (hessian[kept] @ row)[:, None]).solution[:, 0]
        cost += float((new - row) @ hessian @ (new - row))
    return found, cost


def greedy(unit, hessian, allowed):
    """Deletes the candidate, a mask of the unit, that costs least in all when refitted; yields masks and costs."""
    keep = torch.ones_like(unit, dtype=torch.bool)
    before = 0.0
    while True:
        left = allowed(keep)
        if not left:
            return
        costs = [best(unit, keep & ~candidate, hessian)[1] for candidate in left]
        least = min(range(len(left)), key=costs.__getitem__)
        keep = keep & ~left[least]
        yield keep, costs[least] - before
        before = costs[least]


def single(shape, row, column):
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[row, column] = True
    return mask


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("sparsity", [0.25, 0.6, 0.9])
def test_it_is_greedy_deletion_with_least_squares_for_every_candidate(groups, sparsity):
    weights, hessian = problem(groups, 3, 8)
    found, keep = solve(weights, hessian, sparsity)
    traces = {}
    for group, row in itertools.product(range(groups), range(3)):
        unit = weights[group, row : row + 1]
        steps = greedy(unit, hessian[group], lambda keep: [single((1, 8), 0, j) for j in range(8) if keep[0, j]])
        traces[group, row] = [(mask[0], cost) for mask, cost in steps]
    # The cheapest next deletion of any row, again and again.
    done = dict.fromkeys(traces, 0)
    for _ in range(round(sparsity * weights.numel())):
        key = min((k for k in traces if done[k] < 8), key=lambda k: traces[k][done[k]][1])
        done[key] += 1
    for (group, row), count in done.items():
        expected = traces[group, row][count - 1][0] if count else torch.ones(8, dtype=torch.bool)
        assert torch.equal(keep[group, row], expected)
        torch.testing.assert_close(
            found[group, row], best(weights[group, row][None], expected[None], hessian[group])[0][0]
        )


def test_groups_of_inputs_keep_their_number():
    weights, hessian = problem(1, 4, 12, seed=1)
    found, keep = solve(weights, hessian, pattern="2:4")
    assert torch.equal(keep.unflatten(-1, (3, 4)).sum(-1), torch.full((1, 4, 3), 2))
    for row in range(4):

        def allowed(keep):
            full = (~keep[0]).view(3, 4).sum(1) == 2
            return [single((1, 12), 0, j) for j in range(12) if keep[0, j] and not full[j // 4]]

        *_, (mask, _) = greedy(weights[0, row : row + 1], hessian[0], allowed)
        assert torch.equal(keep[0, row], mask[0])
        torch.testing.assert_close(found[0, row], best(weights[0, row][None], mask, hessian[0])[0][0])


@pytest.mark.parametrize(("rows", "columns"), [(4, 1), (1, 3), (2, 2)])
def test_blocks_go_together(rows, columns):
    weights, hessian = problem(1, rows, 12, seed=2)
    count = 12 // columns
    found, keep = solve(weights, hessian, 0.5, f"{rows}x{columns}")

    def allowed(keep):
        return [
            single((rows, 12), slice(None), slice(j * columns, (j + 1) * columns))
            for j in range(count)
            if keep[0, j * columns]
        ]

    mask, _ = next(itertools.islice(greedy(weights[0], hessian[0], allowed), count // 2 - 1, None))
    assert torch.equal(keep[0], mask)
    torch.testing.assert_close(found[0], best(weights[0], mask, hessian[0])[0])


def test_blocks_at_the_edges_hold_what_is_left():
    weights, hessian = problem(1, 5, 7, seed=3)
    found, keep = solve(weights, hessian, 0.5, "2x3")
    gone = ~keep[0]
    assert 0 < int(gone.sum()) <= 17
    for top, left in itertools.product(range(0, 5, 2), range(0, 7, 3)):
        block = gone[top : top + 2, left : left + 3]
        assert block.all() or not block.any()
    torch.testing.assert_close(found[0], best(weights[0], keep[0], hessian[0])[0])


@pytest.mark.parametrize("pattern", [None, "2:4", "1x2"])
def test_zeros_go_first_and_stay(pattern):
    weights, hessian = problem(1, 6, 12, seed=4)
    zero = torch.rand(weights.shape, generator=torch.Generator().manual_seed(5)) < 0.4
    weights[zero] = 0
    _, keep = solve(weights, hessian, 0.0 if pattern == "2:4" else 0.5, pattern)
    assert not keep[zero].any()
    if pattern is None:
        assert int((~keep).sum()) == 36
    if pattern == "2:4":
        ended = (~keep).unflatten(-1, (3, 4)).sum(-1)
        assert torch.equal(ended, zero.unflatten(-1, (3, 4)).sum(-1).clamp(min=2))
    fewer = solve(weights, hessian, 0.1)
    torch.testing.assert_close(fewer[0], weights)


@pytest.mark.parametrize("pattern", [None, "2:4", "2x2"])
def test_the_batch_of_rows_does_not_matter(monkeypatch, pattern):
    weights, hessian = problem(2, 6, 24, seed=6)
    together = solve(weights, hessian, 0.0 if pattern == "2:4" else 0.7, pattern)
    monkeypatch.setattr(module, "BATCH_BYTES", 1)
    apart = solve(weights, hessian, 0.0 if pattern == "2:4" else 0.7, pattern)
    assert torch.equal(together[1], apart[1])
    torch.testing.assert_close(together[0], apart[0])


def test_every_weight_can_go_but_one():
    weights, hessian = problem(1, 2, 10, seed=7)
    _, keep = solve(weights, hessian, 0.95)
    assert int(keep.sum()) == 1
