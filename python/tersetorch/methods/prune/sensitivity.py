"""How much each layer can lose: one layer is pruned at a time, and the model scored."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Self

from rich.progress import Progress
from torch import nn

from tersetorch.methods.arguments import check_number
from tersetorch.methods.parametrization import release_graphs
from tersetorch.methods.prune.magnitude import magnitude
from tersetorch.methods.prune.patterns import blocks
from tersetorch.methods.selection import Patterns, select

SPARSITIES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)


@dataclass(frozen=True)
class Sensitivity:
    """The scores of a model with one layer pruned at a time.

    Attributes:
        baseline: the score of the model as it is.
        layers: for each layer, in the model's order, the score at each sparsity.
    """

    baseline: float
    layers: Mapping[str, Mapping[float, float]]

    def sparsities(self, max_drop: float) -> dict[str, float]:
        """For each layer the largest sparsity up to which no score falls more than max_drop below the baseline.

        It is a valid `sparsity` of prune.magnitude. Layers are scanned one at a time: pruning all of them together
        loses more, so retrain, or ask for a smaller drop.

        Raises:
            TypeError: max_drop is no number.
            ValueError: max_drop is negative or not finite.
        """
        check_number("Sensitivity.sparsities", "max_drop", max_drop, 0, math.inf)
        chosen = {}
        for name, scores in self.layers.items():
            chosen[name] = 0.0
            for sparsity, score in sorted(scores.items()):
                if not score >= self.baseline - max_drop:  # NaN ends it too
                    break
                chosen[name] = sparsity
        return chosen

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: {"baseline": score, "layers": {name: [[sparsity, score], ...]}}."""
        rows = {name: [list(pair) for pair in sorted(scores.items())] for name, scores in self.layers.items()}
        return {"baseline": self.baseline, "layers": rows}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Self:
        """What to_dict gave.

        Raises:
            ValueError: record is something else.
        """
        try:
            layers = {
                str(name): {float(sparsity): float(score) for sparsity, score in rows}
                for name, rows in record["layers"].items()
            }
            return cls(float(record["baseline"]), layers)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"Sensitivity.from_dict: record must be what to_dict gave, got {record!r:.80}; pass that"
            ) from error


def sensitivity(
    model: nn.Module,
    evaluate: Callable[[nn.Module], float],
    sparsities: Sequence[float] = SPARSITIES,
    *,
    pattern: str | None = None,
    targets: Patterns | None = None,
    ignore: Patterns | None = None,
    known: Sensitivity | None = None,
    on_score: Callable[[Sensitivity], object] | None = None,
    progress: Progress | None = None,
) -> Sensitivity:
    """Scores model with each layer alone pruned by magnitude to each sparsity, the others as they are.

    Args:
        model: as in prune.magnitude; it is not changed, copies of it are pruned.
        evaluate: gives the score of a model, greater being better, such as accuracy on held-out data; what it does to
            the model it is given stays in a copy.
        sparsities: parts of a layer's weights, each in [0, 1); at a sparsity that a layer has already, it is scored as
            it is.
        pattern: blocks "RxC" as in prune.magnitude, or None.
        targets: as in prune.magnitude.
        ignore: as in prune.magnitude.
        known: an earlier result for the same model, such as one that on_score stored: what it holds is not scored
            again.
        on_score: called after every score with what there is so far, to store it.
        progress: a bar for the scan is added to it.

    Raises:
        TypeError: sparsities is no sequence, evaluate cannot be called or gives no number, or as prune.magnitude.
        ValueError: sparsities is empty, or as prune.magnitude.

    Source:
        Han, Pool, Tran, Dally, Learning both weights and connections (2015), section 5 and figure 6.
    """
    where = "prune.sensitivity"
    if not callable(evaluate):
        raise TypeError(f"{where}: evaluate must be callable, got {type(evaluate).__name__}; pass evaluate(model)")
    if not isinstance(sparsities, Sequence) or isinstance(sparsities, str):
        raise TypeError(f"{where}: sparsities must be a list, got {type(sparsities).__name__}; pass numbers in [0, 1)")
    if not sparsities:
        raise ValueError(f"{where}: sparsities must hold at least one, got []; pass numbers in [0, 1)")
    for sparsity in sparsities:
        check_number(where, "sparsities", sparsity, 0, 1)
    blocks(where, pattern)
    chosen = select(where, model, targets, ignore)
    grid = sorted({float(sparsity) for sparsity in sparsities})
    task = None if progress is None else progress.add_task("sensitivity", total=1 + len(chosen) * len(grid))

    def score(candidate: nn.Module) -> float:
        value = evaluate(candidate)
        if not isinstance(value, Real):
            raise TypeError(f"{where}: evaluate must give a number, got {type(value).__name__}; return a float")
        return float(value)

    def advance(scored: bool) -> None:
        if scored and on_score is not None:
            on_score(Sensitivity(baseline, {name: dict(scores) for name, scores in layers.items()}))
        if progress is not None and task is not None:
            progress.advance(task)

    layers: dict[str, dict[float, float]] = {}
    release_graphs(model)
    baseline = score(copy.deepcopy(model)) if known is None else known.baseline
    advance(known is None)
    for target in chosen:
        scores = {} if known is None else dict(known.layers.get(target.name, {}))
        layers[target.name] = scores
        for sparsity in grid:
            missing = sparsity not in scores
            if missing:
                pruned = magnitude(copy.deepcopy(model), sparsity, pattern=pattern, targets=target.name)
                scores[sparsity] = score(pruned)
            advance(missing)
    return Sensitivity(baseline, layers)
