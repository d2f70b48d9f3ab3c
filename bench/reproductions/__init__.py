"""Does it repeat a paper's row? Each file trains, compresses and measures one, beside the published figures."""

from __future__ import annotations

from tersetorch.bench.reproductions import han, lenet_300_100, published_densities, trade_off
from tersetorch.bench.reproductions.runs import Reproduction

ROWS: dict[str, Reproduction] = {
    row.name: row for module in (lenet_300_100, han, trade_off, published_densities) for row in module.ROWS
}
