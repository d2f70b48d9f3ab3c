"""The sensitivity of layers as a person sees it: one curve a layer."""

from __future__ import annotations

import os

from tersetorch.methods.prune import Sensitivity
from tersetorch.reports.figure import figure_class

__all__ = ["draw_sensitivity"]


def draw_sensitivity(found: Sensitivity, path: str | os.PathLike[str], score: str = "score") -> None:
    """Draws the score over the part of each layer's weights that is kept, one curve a layer, as a PNG or SVG file.

    Args:
        found: what prune.sensitivity gave.
        path: the file, its format by its suffix.
        score: what the score is, for the axis.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.

    Source:
        Han, Pool, Tran, Dally, Learning both weights and connections (2015), figure 6.
    """
    figure = figure_class("draw_sensitivity")(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    markers = "osv^D*PX"
    for index, (name, scores) in enumerate(found.layers.items()):
        points = sorted({0.0: found.baseline, **scores}.items(), reverse=True)
        kept, values = [100 * (1 - sparsity) for sparsity, _ in points], [value for _, value in points]
        axes.plot(kept, values, marker=markers[index % len(markers)], markersize=4, label=name)
    axes.axhline(found.baseline, color="0.6", linewidth=1, linestyle="--")
    axes.set(title="One layer pruned at a time", xlabel="weights of the layer kept, %", ylabel=score, xlim=(100, 0))
    axes.legend(fontsize="small", ncols=1 + len(found.layers) // 12)
    figure.savefig(path)
