"""What prune_to_budget tried, as a person sees it: each trial's score and cost, and what the chosen one keeps."""

from __future__ import annotations

import os

from tersetorch.recipes.budget import BudgetReport
from tersetorch.reports.figure import figure_class

__all__ = ["draw_budget"]


def draw_budget(found: BudgetReport, path: str | os.PathLike[str], score: str = "score") -> None:
    """Draws the trials, score over cost with the floor, and the part of each layer kept, as a PNG or SVG file.

    Args:
        found: what prune_to_budget gave.
        path: the file, its format by its suffix.
        score: what the score is, for the axis.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    figure = figure_class("draw_budget")(figsize=(10, 4.5), layout="constrained")
    tried, kept = figure.subplots(1, 2)
    tried.axhline(found.floor, color="0.4", linewidth=1, linestyle="--", label="floor")
    tried.plot(found.dense_cost, found.baseline, "s", color="0.4", label="as it came")
    for name, marker, some in (
        ("too low", "x", [trial for trial in found.trials if trial.score < found.floor]),
        ("kept the floor", "o", [trial for trial in found.trials if trial.score >= found.floor]),
        ("chosen", "*", [] if found.chosen is None else [found.trials[found.chosen]]),
    ):
        if some:
            size = 14 if name == "chosen" else 7
            tried.plot([each.cost for each in some], [each.score for each in some], marker, markersize=size, label=name)
    if found.budget is not None:
        tried.axvline(found.budget, color="0.4", linewidth=1, linestyle=":", label="budget")
    tried.set(title="What was tried", xlabel=found.unit, ylabel=score)
    tried.legend(fontsize="small")
    for index, trial in enumerate(found.trials):
        names = list(trial.sparsities)
        parts = [100 * (1 - trial.sparsities[name]) for name in names]
        chosen = index == found.chosen
        kept.plot(parts, names, "*" if chosen else ".", color=None if chosen else "0.7", markersize=12 if chosen else 5)
    kept.set(title="Weights kept, by layer", xlabel="%", xlim=(0, 100))
    kept.invert_yaxis()
    figure.savefig(path)
