"""Does it repeat a paper's row? Each file trains, compresses and measures one, beside the published figures."""

from __future__ import annotations

from tersetorch.bench.reproduce import (
    accuracy_ratio,
    binary_networks,
    deep_compression,
    dns,
    fixed_point,
    flattened,
    gong,
    han,
    initialisation,
    kmeans_objective,
    layer_times,
    low_rank,
    one_shot,
    one_shot_transformer,
    optimal_brain_damage,
    optimal_brain_surgeon,
    published_bits,
    published_densities,
    published_squeezenet,
    squeeze_design,
    trade_off,
)
from tersetorch.bench.reproduce.runs import Reproduction

MODULES = (
    deep_compression,
    accuracy_ratio,
    initialisation,
    kmeans_objective,
    han,
    trade_off,
    dns,
    gong,
    layer_times,
    low_rank,
    flattened,
    fixed_point,
    optimal_brain_damage,
    optimal_brain_surgeon,
    one_shot,
    one_shot_transformer,
    published_densities,
    published_bits,
    published_squeezenet,
    squeeze_design,
    binary_networks,
)
ROWS: dict[str, Reproduction] = {row.name: row for module in MODULES for row in module.ROWS}
