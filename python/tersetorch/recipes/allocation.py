"""Which sparsity for which layer: the least loss within a cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import numpy as np

# For each layer a number at each sparsity.
Curves: TypeAlias = Mapping[str, Mapping[float, float]]
# Costs are rounded up to this part of the budget, so that what is chosen never costs more.
STEPS = 4096


def allocate(losses: Curves, costs: Curves, budget: float) -> dict[str, float]:
    """The sparsity of each layer that minimises the sum of losses while the sum of costs is at most budget.

    Dynamic programming over the layers and the cost spent so far, in steps of budget / 4096 rounded up: the sum of
    losses is the least of all choices whose rounded costs fit.

    Args:
        losses: for each layer, what is lost at each sparsity.
        costs: for the same layers, what it costs at the same sparsities; not negative.
        budget: at least 0.

    Raises:
        ValueError: even the cheapest choice costs more than budget.

    Source:
        Frantar and Alistarh, SPDY (2022), section 3.1. Where we differ: the losses are given, not searched for.
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
    best = np.zeros(STEPS + 1)  # least loss of the layers so far, by steps that may be spent on them
    chosen: list[tuple[str, list[float], np.ndarray]] = []
    for name, curve in losses.items():
        sparsities = sorted(curve)
        totals = np.full((len(sparsities), STEPS + 1), np.inf)
        for row, sparsity in enumerate(sparsities):
            steps = int(np.ceil(costs[name][sparsity] / budget * STEPS - 1e-9))
            if steps <= STEPS:
                totals[row, steps:] = best[: STEPS + 1 - steps] + curve[sparsity]
        chosen.append((name, sparsities, totals.argmin(0)))
        best = totals.min(0)
    if not np.isfinite(best[STEPS]):  # only rounding stands in the way
        return _cheapest(costs)
    left, found = STEPS, {}
    for name, sparsities, rows in reversed(chosen):
        sparsity = sparsities[int(rows[left])]
        found[name] = sparsity
        left -= int(np.ceil(costs[name][sparsity] / budget * STEPS - 1e-9))
    return {name: found[name] for name in losses}


def _cheapest(costs: Curves) -> dict[str, float]:
    return {name: min(curve, key=lambda sparsity: (curve[sparsity], sparsity)) for name, curve in costs.items()}
