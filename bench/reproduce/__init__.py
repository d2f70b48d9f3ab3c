"""Does it repeat a paper's row? Each file trains, compresses and measures one, beside the published figures."""

from __future__ import annotations

from tersetorch.bench.reproduce import (
    dns,
    gong,
    han,
    initialisation,
    kmeans_objective,
    lenet_300_100,
    one_shot,
    optimal_brain_damage,
    optimal_brain_surgeon,
    published_densities,
    trade_off,
)
from tersetorch.bench.reproduce.runs import Reproduction

MODULES = (
    lenet_300_100,
    han,
    initialisation,
    kmeans_objective,
    trade_off,
    dns,
    gong,
    optimal_brain_damage,
    optimal_brain_surgeon,
    one_shot,
    published_densities,
)
ROWS: dict[str, Reproduction] = {row.name: row for module in MODULES for row in module.ROWS}
