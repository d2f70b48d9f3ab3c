"""The energy of models as a person sees it: a bar a model, by what takes it, and a bar a layer."""

from __future__ import annotations

import os
from collections.abc import Mapping

from rich.table import Table

from tersetorch.costs import ModelEnergy
from tersetorch.costs.coefficients import ACCESSES
from tersetorch.reports.figure import figure_class

__all__ = ["draw_energy", "energy_table", "layer_parts"]

PARTS = {"arithmetic": "#1f6f8b", "register": "#7fb7be", "sram": "#e0a458", "dram": "#b23a48"}
MICROJOULE = 1e6  # picojoules


def draw_energy(models: Mapping[str, ModelEnergy], path: str | os.PathLike[str]) -> None:
    """Draws what models take in microjoules, by arithmetic and memory: in all, and by layer, as a PNG or SVG file.

    Args:
        models: what costs.energy gave, under the names to show, such as before and after.
        path: the file, its format by its suffix.

    Raises:
        ValueError: models is empty.
        ModuleNotFoundError: matplotlib is not installed.
    """
    if not models:
        raise ValueError("draw_energy: models must name at least one, got none; pass {'dense': energy(model, x)}")
    rows = [
        (f"{title}: {layer.name or layer.kind}", layer) for title, found in models.items() for layer in found.layers
    ]
    figure = figure_class("draw_energy")(figsize=(10, 2.5 + 0.22 * max(len(rows), 4)), layout="constrained")
    whole, layers = figure.subplots(1, 2, width_ratios=(2, 3))
    for axes, names, parts in (
        (whole, list(models), [_sum([layer_parts(layer.picojoules) for layer in m.layers]) for m in models.values()]),
        (layers, [name for name, _ in rows], [layer_parts(layer.picojoules) for _, layer in rows]),
    ):
        places, left = range(len(names)), [0.0] * len(names)
        for part, colour in PARTS.items():
            widths = [each[part] / MICROJOULE for each in parts]
            axes.barh(places, widths, left=left, color=colour, label=part)
            left = [start + width for start, width in zip(left, widths, strict=True)]
        for place, end in zip(places, left, strict=True):  # the small ones are the news
            axes.annotate(f"{end:.3g}", (end, place), (3, 0), textcoords="offset points", va="center", fontsize="small")
        axes.margins(x=0.15)
        axes.set(yticks=places, yticklabels=names, xlabel="microjoules")
        axes.invert_yaxis()
    whole.set(title="One inference")
    layers.set(title="By layer")
    figure.legend(*whole.get_legend_handles_labels(), loc="outside lower center", ncols=len(PARTS), fontsize="small")
    figure.savefig(path)


def energy_table(models: Mapping[str, ModelEnergy]) -> Table:
    """The same as a table: a row a model, and a note of the figures that were inferred."""
    shown = Table(title="Energy of one inference, 45 nm, microjoules", title_justify="left")
    shown.add_column("")
    for heading in (*PARTS, "all"):
        shown.add_column(heading, justify="right")
    for title, found in models.items():
        parts = layer_parts(found.picojoules)
        shown.add_row(title, *(f"{value / MICROJOULE:,.4g}" for value in (*parts.values(), found.total)))
    inferred = sorted({name for found in models.values() for name in found.inferred})
    if inferred:
        shown.caption = f"No source states {', '.join(inferred)}: see costs.COEFFICIENTS."
    return shown


def layer_parts(picojoules: Mapping[str, float]) -> dict[str, float]:
    """Picojoules by part: all operations together, and each memory."""
    arithmetic = sum(energy for name, energy in picojoules.items() if name not in ACCESSES)
    return {"arithmetic": arithmetic, **{name: picojoules.get(name, 0.0) for name in ACCESSES}}


def _sum(parts: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(part[name] for part in parts) for name in PARTS}
