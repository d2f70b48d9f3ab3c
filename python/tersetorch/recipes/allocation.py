"""Which sparsity for which layer: the least loss within a cost."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TypeAlias

import numpy as np

# For each layer a number at each sparsity.
Curves: TypeAlias = Mapping[str, Mapping[float, float]]
# Most partial choices that are kept after each layer: those with the least bounds.
STATES = 2**15


class BudgetError(ValueError):
    """No choice keeps a budget.

    Attributes:
        least: the least budget that there is a choice for.
    """

    def __init__(self, message: str, least: float = 0.0) -> None:
        super().__init__(message)
        self.least = least


def allocate(losses: Curves, costs: Curves, budget: float) -> dict[str, float]:
    """The sparsity of each layer that minimises the sum of losses while the sum of costs is at most budget.

    Branch and bound, layer by layer: a partial choice goes on unless another one costs and loses no more, or the loss
    that a convex bound of the other layers leaves it exceeds that of the greedy choice. Exact while no more than 32,768
    go on after a layer; of more, those with the least bounds do.

    Args:
        losses: for each layer, what is lost at each sparsity.
        costs: for the same layers, what it costs at the same sparsities; not negative.
        budget: at least 0.

    Raises:
        ValueError: even the cheapest choice costs more than budget.

    Source:
        Frantar and Alistarh, SPDY (2022), section 3.1, for the problem. Where we differ: the losses are given, not
        searched for, and costs are not rounded. Sinha and Zoltners, The multiple-choice knapsack problem (1979), for
        the bound.
    """
    cheapest = {name: min(curve.values()) for name, curve in costs.items()}
    least = sum(cheapest.values())
    if least > budget:
        raise ValueError(
            f"allocate: budget must be at least {least:.6g}, the cheapest choice, got {budget:.6g}; raise it"
        )
    if not losses:
        return {}
    if not budget > 0:
        return _cheapest(costs)
    names = list(losses)
    options = [_efficient(losses[name], costs[name]) for name in names]
    if not all(options):
        return _cheapest(costs)
    bounds = [_bound(options[index:]) for index in range(len(options) + 1)]
    slack = 1e-12 * budget  # sums in another order round otherwise
    most, greedy = _greedy(options, budget - slack)
    cost, loss = np.zeros(1), np.zeros(1)
    steps: list[tuple[np.ndarray, np.ndarray]] = []
    for each, (room, lost) in zip(options, bounds[1:], strict=True):
        of_cost, of_loss = np.array([option[:2] for option in each]).T
        cost, loss = (cost[:, None] + of_cost).ravel(), (loss[:, None] + of_loss).ravel()
        least_loss = loss + np.interp(budget - cost, room, lost)
        fits = (cost + room[0] <= budget + slack) & (least_loss <= most + 1e-9 * (abs(most) + np.abs(loss)))
        kept = np.flatnonzero(fits)
        kept = kept[np.lexsort((loss[kept], cost[kept]))]
        falls = np.concatenate(([np.inf], np.minimum.accumulate(loss[kept])[:-1])) if kept.size else loss[kept]
        kept = kept[loss[kept] < falls]
        if len(kept) > STATES:
            kept = np.sort(kept[np.argpartition(least_loss[kept], STATES)[:STATES]])
        cost, loss = cost[kept], loss[kept]
        steps.append((kept // len(each), kept % len(each)))
    within = np.flatnonzero(cost <= budget)
    chosen = greedy
    if within.size and (greedy is None or loss[within].min() <= most):
        place, chosen = int(within[loss[within].argmin()]), []
        for parents, picks in reversed(steps):
            chosen.insert(0, int(picks[place]))
            place = int(parents[place])
    if chosen is None:  # only rounding stands in the way
        return _cheapest(costs)
    return {name: each[pick][2] for name, each, pick in zip(names, options, chosen, strict=True)}


# (cost, loss, sparsity)
Option: TypeAlias = tuple[float, float, float]


def _efficient(losses: Mapping[float, float], costs: Mapping[float, float]) -> list[Option]:
    """The options that no other one beats, costs rising and losses falling."""
    found: list[Option] = []
    for option in sorted((costs[sparsity], losses[sparsity], sparsity) for sparsity in losses):
        if np.isfinite(option[1]) and (not found or option[1] < found[-1][1]):
            found.append(option)
    return found


def _hull(options: list[Option]) -> list[int]:
    """Those on the lower convex hull of loss over cost."""
    hull: list[int] = []
    for index, (cost, loss, _) in enumerate(options):
        while len(hull) > 1:
            (x0, y0, _), (x1, y1, _) = options[hull[-2]], options[hull[-1]]
            if (y1 - y0) * (cost - x0) < (loss - y0) * (x1 - x0):
                break
            hull.pop()
        hull.append(index)
    return hull


def _segments(options: list[list[Option]]) -> list[tuple[float, int, int, float, float]]:
    """(slope, layer, the option it leads to, more cost, more loss) of all hulls, steepest first."""
    found = []
    for layer, each in enumerate(options):
        hull = _hull(each)
        for before, after in itertools.pairwise(hull):
            cost, loss = (each[after][part] - each[before][part] for part in (0, 1))
            found.append((loss / cost, layer, after, cost, loss))
    return sorted(found)


def _bound(options: list[list[Option]]) -> tuple[np.ndarray, np.ndarray]:
    """Costs, and losses that no choice from all options goes below at them, to be interpolated."""
    segments = _segments(options)
    start = [sum(each[0][part] for each in options) for part in (0, 1)]
    costs, losses = (np.cumsum([start[part], *(segment[3 + part] for segment in segments)]) for part in (0, 1))
    return costs, losses


def _greedy(options: list[list[Option]], budget: float) -> tuple[float, list[int] | None]:
    """The loss and the picks of taking the steepest segments that fit, or infinity and None."""
    cost, loss = (sum(each[0][part] for each in options) for part in (0, 1))
    if cost > budget:
        return np.inf, None
    picks, stopped = [0] * len(options), set()
    for _, layer, option, more, change in _segments(options):
        if layer in stopped or cost + more > budget:
            stopped.add(layer)
            continue
        cost, loss, picks[layer] = cost + more, loss + change, option
    return loss, picks


def _cheapest(costs: Curves) -> dict[str, float]:
    return {name: min(curve, key=lambda sparsity: (curve[sparsity], sparsity)) for name, curve in costs.items()}
