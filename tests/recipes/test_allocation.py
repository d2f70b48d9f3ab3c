import itertools
import random

import numpy as np
import pytest

from tersetorch.recipes import allocation
from tersetorch.recipes.allocation import allocate


def total(curves, choice):
    return sum(curves[name][sparsity] for name, sparsity in choice.items())


@pytest.mark.parametrize("seed", range(20))
def test_it_is_the_best_of_all_choices(seed):
    draw = random.Random(seed)
    grid = [0.0, 0.5, 0.8, 0.9]
    names = [f"layer{index}" for index in range(draw.randint(1, 5))]
    losses = {name: {sparsity: draw.uniform(0, 1) for sparsity in grid} for name in names}
    costs = {name: {sparsity: draw.uniform(0.1, 10) for sparsity in grid} for name in names}
    choices = [dict(zip(names, parts, strict=True)) for parts in itertools.product(grid, repeat=len(names))]
    budget = draw.uniform(
        min(total(costs, choice) for choice in choices), max(total(costs, choice) for choice in choices)
    )
    found = allocate(losses, costs, budget)
    assert list(found) == names
    assert total(costs, found) <= budget
    assert total(losses, found) <= min(total(losses, c) for c in choices if total(costs, c) <= budget) + 1e-12


def test_the_cheapest_choice_fits_exactly():
    costs = {"a": {0.0: 3.0, 0.9: 1.0}, "b": {0.0: 5.0, 0.9: 1 / 3}}
    losses = {name: {0.0: 0.0, 0.9: 1.0} for name in costs}
    assert allocate(losses, costs, 1 + 1 / 3) == {"a": 0.9, "b": 0.9}
    with pytest.raises(ValueError, match=r"allocate: budget must be at least 1.33333, the cheapest choice, got 1.3"):
        allocate(losses, costs, 1.3)


def test_layers_that_cost_nothing_lose_nothing():
    assert allocate({"a": {0.0: 0.0, 0.5: 1.0}}, {"a": {0.0: 0.0, 0.5: 0.0}}, 1.0) == {"a": 0.0}
    assert allocate({}, {}, 1.0) == {}


@pytest.mark.parametrize("seed", range(10))
def test_whole_bytes_that_fit_closely_are_found(seed):
    draw = random.Random(seed)
    names = [f"layer{index}" for index in range(4)]
    costs = {name: {float(bits): bits * draw.randint(100, 10**6) // 8 for bits in range(1, 9)} for name in names}
    losses = {name: {float(bits): draw.uniform(1, 2) * 4.0**-bits for bits in range(1, 9)} for name in names}
    choices = [dict(zip(names, parts, strict=True)) for parts in itertools.product(range(1, 9), repeat=4)]
    budget = total(costs, draw.choice(choices))
    found = allocate(losses, costs, budget)
    assert total(costs, found) <= budget
    assert total(losses, found) == pytest.approx(min(total(losses, c) for c in choices if total(costs, c) <= budget))


@pytest.mark.parametrize("states", [2**15, 8])
def test_many_layers_fit_and_come_near_the_bound(monkeypatch, states):
    monkeypatch.setattr(allocation, "STATES", states)
    draw = random.Random(0)
    names = [f"layer{index}" for index in range(60)]
    sizes = {name: draw.uniform(1, 1000) for name in names}
    costs = {name: {float(bits): bits * sizes[name] for bits in range(1, 9)} for name in names}
    losses = {name: {float(bits): draw.uniform(1, 2) * 4.0**-bits for bits in range(1, 9)} for name in names}
    budget = 3.3 * sum(sizes.values())
    found = allocate(losses, costs, budget)
    assert total(costs, found) <= budget
    options = [allocation._efficient(losses[name], costs[name]) for name in names]
    room, lost = allocation._bound(options)
    assert total(losses, found) <= 1.01 * float(np.interp(budget, room, lost))
