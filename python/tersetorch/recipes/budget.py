"""Sparsities found automatically: within a budget, or as sparse as an accuracy allows."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from numbers import Real
from typing import Any, get_args

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import nn
from torch.utils import _pytree as pytree

from tersetorch.methods import finalize, prune
from tersetorch.methods.arguments import check_choice, check_int, check_number
from tersetorch.methods.distributed import check_alike, failing_together
from tersetorch.methods.parametrization import release_graphs
from tersetorch.methods.prune import Sensitivity
from tersetorch.methods.prune.patterns import blocks
from tersetorch.methods.selection import Patterns, Target, select
from tersetorch.recipes.allocation import BudgetError, Curves, allocate
from tersetorch.recipes.cost_curves import CostCurves, Unit, cost_curves, file_bytes
from tersetorch.recipes.run_folder import RunFolder, fingerprint
from tersetorch.zoo.ranks import alike, everyone, from_rank_0

SPARSITIES = (0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97)
# How often sparsities are chosen within a budget of bytes: each time by what the last file took beyond the curves.
ATTEMPTS = 8
Method = Callable[[nn.Module, dict[str, float]], object]


@dataclass(frozen=True)
class BudgetTrial:
    """One choice of sparsities that was pruned, trained and scored.

    Attributes:
        limit: the cost it had to stay within.
        cost: what it costs by the curves; in bytes, of the file that tersetorch.save writes of it, finalized.
        predicted_drop: the sum of the layers' losses by the curves.
        sparsities: of each layer.
        score: of the model that was pruned so, and retrained.
    """

    limit: float
    cost: float
    predicted_drop: float
    sparsities: dict[str, float]
    score: float


@dataclass(frozen=True)
class BudgetReport:
    """What prune_to_budget tried, and what it chose.

    Attributes:
        unit: "bytes", "operations" or "milliseconds".
        budget: as it was asked for, or None.
        baseline: the score of the model as it came.
        floor: the score that had to be kept.
        dense_cost: the cost at the least sparsities.
        losses: for each layer, what it loses at each sparsity.
        costs: for each layer, what it costs at each sparsity.
        fixed_cost: what the rest of the model costs.
        trials: in the order they were made.
        chosen: index of the trial that the model was left with, or None where none kept the floor.
    """

    unit: str
    budget: float | None
    baseline: float
    floor: float
    dense_cost: float
    losses: dict[str, dict[float, float]]
    costs: dict[str, dict[float, float]]
    fixed_cost: float
    trials: tuple[BudgetTrial, ...]
    chosen: int | None

    @property
    def sparsities(self) -> dict[str, float] | None:
        """What was chosen: a valid `sparsity` of prune.magnitude; None where no trial kept the floor."""
        return None if self.chosen is None else self.trials[self.chosen].sparsities

    def to_dict(self) -> dict[str, Any]:
        """Plain data for json.dumps."""
        plain = asdict(self)
        for name in ("losses", "costs"):
            plain[name] = {layer: sorted(curve.items()) for layer, curve in plain[name].items()}
        return plain

    def __str__(self) -> str:
        table = Table(
            title=f"baseline {self.baseline:.6g}, floor {self.floor:.6g}, dense {self.dense_cost:.6g} {self.unit}"
        )
        for heading in ("trial", f"limit, {self.unit}", self.unit, "smaller", "predicted drop", "score", "sparsities"):
            table.add_column(heading, overflow="fold")
        for index, trial in enumerate(self.trials):
            table.add_row(
                f"{index}{' chosen' if index == self.chosen else ''}",
                f"{trial.limit:.6g}",
                f"{trial.cost:.6g}{'' if _within(trial.cost, self.budget) else ' too much'}",
                f"{self.dense_cost / trial.cost:.3g}x" if trial.cost else "",
                f"{trial.predicted_drop:.4g}",
                f"{trial.score:.6g}{'' if trial.score >= self.floor else ' too low'}",
                ", ".join(f"{name} {sparsity:g}" for name, sparsity in trial.sparsities.items()),
            )
        console = Console(file=io.StringIO(), width=160, no_color=True)
        console.print(table, markup=False)
        assert isinstance(console.file, io.StringIO)
        return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def prune_to_budget(
    model: nn.Module,
    evaluate: Callable[[nn.Module], float],
    *,
    max_drop: float,
    budget: float | None = None,
    unit: Unit = "bytes",
    example_inputs: Any = None,
    retrain: Callable[[nn.Module], object] | None = None,
    losses: Sensitivity | Curves | None = None,
    sparsities: Sequence[float] = SPARSITIES,
    trials: int = 6,
    pattern: str | None = None,
    method: Method | None = None,
    targets: Patterns | None = None,
    ignore: Patterns | None = None,
    folder: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> BudgetReport:
    """Chooses a sparsity for each layer, prunes model so in place, and reports what was tried.

    With a budget, one trial: the sparsities that lose least within it. Bytes are those of the file that tersetorch.save
    writes of the pruned, retrained and finalized model: where it exceeds the budget, there is another trial within a
    lower limit, 8 at most. Without a budget, `trials` of them, which halve the range of limits: the least cost at which
    the score still keeps the floor, baseline - max_drop. A trial prunes a copy by method, retrains it, and scores it;
    the chosen one's weights and masks are then loaded into model, which is ready to train on, as after
    prune.magnitude. When no trial keeps the floor, model stays as it was and the report's chosen is None.

    What a layer loses is added up over the layers: by prune.sensitivity the drop of the score when it alone is pruned
    (raised to what a lower sparsity loses already), or numbers of yours, such as what prune.saliencies gives by its
    losses(sparsities).

    Where torch.distributed has started, every rank must call it with the same arguments: all start from rank 0's model,
    what rank 0 measures of files, operations and times counts, and of what evaluate gives on each rank, rank 0's.

    Example:
        found = tt.prune_to_budget(model, accuracy, max_drop=0.005, budget=200_000, retrain=train, folder="run")
        print(found)

    Args:
        model: as in prune.magnitude.
        evaluate: gives the score of a model, greater being better, such as accuracy on held-out data.
        max_drop: how far the score may fall, at least 0.
        budget: what the model may cost, positive; None for as little as the floor allows.
        unit: what is paid, see tersetorch.recipes.cost_curves: "bytes", "operations" or "milliseconds".
        example_inputs: as in tersetorch.convert; not needed for bytes.
        retrain: trains a pruned model in place, keeping its modules and masks; None where it is not retrained.
        losses: what prune.sensitivity gave for these sparsities, or for each layer a loss at each sparsity, in any
            unit; None to scan the sensitivity now.
        sparsities: to choose from, each in [0, 1).
        trials: at most so many without a budget, at least 1.
        pattern: blocks "RxC" as in prune.magnitude, or None.
        method: prunes a copy in place, as method(model, {layer name: sparsity}); prune.magnitude unless given, such as
            lambda model, sparsities: tt.prune.obs(model, batches, sparsities, refine=3). It must leave the same on
            every rank. Sensitivity and costs, which only say what to try, come from magnitude all the same.
        targets: as in prune.magnitude.
        ignore: as in prune.magnitude.
        folder: where every score, cost and the best weights so far are stored: the same call goes on from there after
            an interruption and ends with the same bits, if retrain is deterministic, and one with another budget,
            max_drop or trials from the scores and costs of single layers. Made where it is missing.
        progress: bars are added to it.

    Raises:
        TypeError: an argument has another type.
        ValueError: an argument is out of range, no choice tried costs as little as budget, folder holds another run
            or one that was changed since, another run uses it, method or retrain leaves other tensors in the state than
            masks and weights, ranks were called with other arguments, or as prune.magnitude. model is as it was.
        OSError: folder cannot be written.
    """
    where = "prune_to_budget"
    with failing_together(everyone()):
        chosen = _check(
            where,
            model,
            evaluate,
            max_drop,
            budget,
            unit,
            example_inputs,
            retrain,
            sparsities,
            trials,
            pattern,
            method,
            targets,
            ignore,
        )
    alike(model)
    grid = sorted({float(sparsity) for sparsity in sparsities})
    settings = {
        "weights": fingerprint(model),
        "layers": [target.name for target in chosen],
        "sparsities": grid,
        "unit": unit,
        "pattern": pattern,
        "method": method is not None,
        "losses": None if losses is None else _digest(losses),
        "example_inputs": _shapes(example_inputs),
    }
    # What the layers lose and cost was measured for any of these.
    limits = {"budget": budget, "max_drop": max_drop, "trials": trials}
    check_alike(where, "layers and arguments", settings | limits, everyone())
    parts: dict[str, Any] = {"sensitivity": None, "costs": None, "trials": []}
    with RunFolder(where, folder, settings, limits, restart=["trials"], **parts) as run:
        told = _scan(run, where, model, evaluate, losses, chosen, grid, pattern, progress)
        curves = _costs(run, model, chosen, grid, unit, example_inputs, pattern, progress)
        searched = _Search(where, model, evaluate, retrain, told, curves, max_drop, unit, budget, pattern, method, run)
        dense = curves.total(dict.fromkeys(curves.layers, grid[0]))
        least = curves.total(dict.fromkeys(curves.layers, grid[-1]))
        task = None if progress is None else progress.add_task("trials", total=trials if budget is None else 1)
        low, high = least, dense
        for index in range(trials if budget is None else 1):
            limit = low if index == 0 else (low + high) / 2
            kept = searched.trial(limit) if budget is None else searched.within(budget)
            if progress is not None and task is not None:
                progress.advance(task)
            if kept and index == 0:
                break
            low, high = (low, limit) if kept else (limit, high)
        return searched.finish(dense)


class _Search:
    """Trials on copies of a model, and the best of them."""

    def __init__(
        self,
        where: str,
        model: nn.Module,
        evaluate: Callable[[nn.Module], float],
        retrain: Callable[[nn.Module], object] | None,
        told: tuple[float, Curves],
        curves: CostCurves,
        max_drop: float,
        unit: Unit,
        budget: float | None,
        pattern: str | None,
        method: Method | None,
        run: RunFolder,
    ) -> None:
        self.where, self.model, self.evaluate, self.retrain = where, model, evaluate, retrain
        self.baseline, self.losses = told
        self.floor = self.baseline - max_drop
        self.curves, self.pattern, self.method, self.run = curves, pattern, method, run
        self.unit, self.budget = unit, budget
        self.least = sum(min(curve.values()) for curve in curves.layers.values())
        self.trials: list[BudgetTrial] = []
        self.state: dict[str, torch.Tensor] | None = None
        self.chosen: int | None = None

    def within(self, budget: float) -> bool:
        """Tries the best sparsities within budget, again while the cost exceeds it; whether they keep the floor."""
        limit, whole = budget, self.curves.fixed + self.least
        for _ in range(ATTEMPTS):
            kept = self.trial(limit)
            cost, expected = self.trials[-1].cost, self.curves.total(self.trials[-1].sparsities)
            if _within(cost, budget):
                return kept
            if _within(expected, whole):
                break
            # Below what the curves expected of this choice, so that it is another one each time.
            limit = max(whole, budget - (cost - expected))
        least = min(trial.cost for trial in self.trials)
        raise self._refused(least, "the least that was reached once pruned and retrained", budget)

    def trial(self, limit: float) -> bool:
        """Tries the best sparsities within limit; whether they keep the floor."""
        whole = self.curves.fixed + self.least
        if limit < whole * (1 - 1e-12):
            raise self._refused(whole, "the cost at the largest sparsities", limit)
        # Rounding of the sum must not leave less room than the cheapest choice takes.
        sparsities = allocate(self.losses, self.curves.layers, max(limit - self.curves.fixed, self.least))
        index = len(self.trials)
        stored = self.run.record["trials"]
        drop = sum(self.losses[name][sparsity] for name, sparsity in sparsities.items())
        if index < len(stored):
            self.trials.append(BudgetTrial(**stored[index]))
        else:
            same = next((each for each in self.trials if each.sparsities == sparsities), None)
            candidate = None
            if same is not None:
                cost, score = same.cost, same.score
            else:
                candidate = self._prune(sparsities)
                score = _score(self.where, self.evaluate, candidate)
                cost = self._cost(candidate, sparsities)
            self.trials.append(BudgetTrial(limit, cost, drop, sparsities, score))
            if candidate is not None and self._is_best(index):
                self.state = self.run.keep(candidate, f"trial_{index}")
            self.run.store(trials=[asdict(each) for each in self.trials])
        if self._is_best(index):
            if self.chosen is not None:
                self.run.forget(f"trial_{self.chosen}")
            self.chosen = index
        return self.trials[index].score >= self.floor

    def _refused(self, least: float, what: str, budget: float) -> BudgetError:
        return BudgetError(
            f"{self.where}: budget must be at least {least:.6g}, {what}, got {budget:.6g}; raise it, or add larger "
            "sparsities",
            least,
        )

    def finish(self, dense: float) -> BudgetReport:
        """Loads the chosen trial into the model."""
        if self.chosen is not None:
            state = self.state if self.state is not None else self.run.kept(f"trial_{self.chosen}")
            if state is None:  # the run was stored, its weights were deleted
                state = self._prune(self.trials[self.chosen].sparsities).state_dict()
            names = list(self.curves.layers)
            prune.magnitude(self.model, 0.0, targets=names)
            self.model.load_state_dict(state)
        return BudgetReport(
            unit=self.unit,
            budget=self.budget,
            baseline=self.baseline,
            floor=self.floor,
            dense_cost=dense,
            losses={name: dict(curve) for name, curve in self.losses.items()},
            costs=self.curves.layers,
            fixed_cost=self.curves.fixed,
            trials=tuple(self.trials),
            chosen=self.chosen,
        )

    def _prune(self, sparsities: Mapping[str, float]) -> nn.Module:
        candidate = prune.magnitude(copy.deepcopy(self.model), 0.0, targets=list(sparsities))
        masked = _layout(candidate.state_dict())
        if self.method is None:
            prune.magnitude(candidate, dict(sparsities), pattern=self.pattern)
        else:
            self.method(candidate, dict(sparsities))
            self._check_layout("method", masked, candidate)
        if self.retrain is not None:
            self.retrain(candidate)
            self._check_layout("retrain", masked, candidate)
        return candidate

    def _check_layout(self, name: str, masked: dict[str, tuple[torch.dtype, torch.Size]], model: nn.Module) -> None:
        changed = {tensor for tensor, _ in masked.items() ^ _layout(model.state_dict()).items()}
        if changed:
            raise ValueError(
                f"{self.where}: {name} must leave the model's modules, masks and shapes, got another "
                f"{min(changed)!r}; prune and train in place, and finalize or share weights afterwards"
            )

    def _cost(self, candidate: nn.Module, sparsities: dict[str, float]) -> float:
        if self.unit != "bytes":
            return self.curves.total(sparsities)
        release_graphs(candidate)
        return from_rank_0(lambda: file_bytes(finalize(copy.deepcopy(candidate))).whole)

    def _is_best(self, index: int) -> bool:
        """Whether a trial keeps floor and budget at the least cost so far, of equal costs with the best score."""
        trial = self.trials[index]
        if not (trial.score >= self.floor and _within(trial.cost, self.budget)):
            return False
        best = None if self.chosen is None else self.trials[self.chosen]
        return best is None or (trial.cost, -trial.score) < (best.cost, -best.score)


def _scan(
    run: RunFolder,
    where: str,
    model: nn.Module,
    evaluate: Callable[[nn.Module], float],
    losses: Sensitivity | Curves | None,
    chosen: Sequence[Target],
    grid: Sequence[float],
    pattern: str | None,
    progress: Progress | None,
) -> tuple[float, Curves]:
    """The score of the model, and for each layer what it loses at each sparsity."""
    names = [target.name for target in chosen]
    release_graphs(model)
    if losses is None:
        known = run.record["sensitivity"]
        losses = prune.sensitivity(
            model,
            lambda tried: _score(where, evaluate, tried),
            grid,
            pattern=pattern,
            targets=names,
            known=None if known is None else Sensitivity.from_dict(known),
            on_score=lambda found: run.store(sensitivity=found.to_dict()),
            progress=progress,
        )
    if isinstance(losses, Sensitivity):
        baseline = losses.baseline
        curves: Curves = {
            name: {sparsity: baseline - score for sparsity, score in scores.items()}
            for name, scores in losses.layers.items()
        }
    else:
        known = run.record["sensitivity"]
        baseline = known["baseline"] if known is not None else _score(where, evaluate, copy.deepcopy(model))
        run.store(sensitivity={"baseline": baseline, "layers": {}})
        curves = losses
    rising = {}
    for name in names:
        curve = curves.get(name, {})
        missing = [sparsity for sparsity in grid if not math.isfinite(curve.get(sparsity, math.nan))]
        if missing:
            raise ValueError(
                f"{where}: losses must hold a finite number for each layer and sparsity, got none for {name!r} at "
                f"{missing[0]}; add it, or leave that out of sparsities"
            )
        # Noise may make a sparser layer look better: it is not worth more for that.
        rising[name] = {sparsity: max(curve[each] for each in grid if each <= sparsity) for sparsity in grid}
    return baseline, rising


def _costs(
    run: RunFolder,
    model: nn.Module,
    chosen: Sequence[Target],
    grid: Sequence[float],
    unit: Unit,
    example_inputs: Any,
    pattern: str | None,
    progress: Progress | None,
) -> CostCurves:
    known = run.record["costs"]
    if known is not None:
        layers = {name: {sparsity: cost for sparsity, cost in curve} for name, curve in known["layers"].items()}
        return CostCurves(known["fixed"], layers)
    curves = from_rank_0(lambda: cost_curves(model, chosen, grid, unit, example_inputs, pattern, progress))
    plain = {name: sorted(curve.items()) for name, curve in curves.layers.items()}
    run.store(costs={"fixed": curves.fixed, "layers": plain})
    return curves


def _score(where: str, evaluate: Callable[[nn.Module], float], model: nn.Module) -> float:
    """What evaluate gives, on rank 0 where there are several: each calls it, since it may share the work out itself."""
    with failing_together(everyone()):
        value = evaluate(model)
        if not isinstance(value, Real):
            raise TypeError(f"{where}: evaluate must give a number, got {type(value).__name__}; return a float")
    return from_rank_0(lambda: float(value))


def _digest(losses: Sensitivity | Curves) -> str:
    """What tells one set of losses from another."""
    curves = losses.layers if isinstance(losses, Sensitivity) else losses
    plain = {name: sorted(curve.items()) for name, curve in curves.items()}
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=float).encode()).hexdigest()


def _shapes(example_inputs: Any) -> list[str]:
    leaves = pytree.tree_leaves(example_inputs)
    return [str(tuple(leaf.shape)) if isinstance(leaf, torch.Tensor) else type(leaf).__name__ for leaf in leaves]


def _within(cost: float, limit: float | None) -> bool:
    """Whether cost is at most limit, but for rounding of its sum."""
    return limit is None or cost <= limit * (1 + 1e-12)


def _layout(state: Mapping[str, torch.Tensor]) -> dict[str, tuple[torch.dtype, torch.Size]]:
    return {name: (tensor.dtype, tensor.shape) for name, tensor in state.items()}


def _check(
    where: str,
    model: nn.Module,
    evaluate: object,
    max_drop: float,
    budget: float | None,
    unit: str,
    example_inputs: object,
    retrain: object,
    sparsities: object,
    trials: int,
    pattern: str | None,
    method: object,
    targets: Patterns | None,
    ignore: Patterns | None,
) -> list[Target]:
    if not callable(evaluate):
        raise TypeError(f"{where}: evaluate must be callable, got {type(evaluate).__name__}; pass evaluate(model)")
    if retrain is not None and not callable(retrain):
        raise TypeError(f"{where}: retrain must be callable, got {type(retrain).__name__}; pass retrain(model)")
    if method is not None and not callable(method):
        raise TypeError(
            f"{where}: method must be callable, got {type(method).__name__}; pass method(model, sparsities)"
        )
    check_number(where, "max_drop", max_drop, 0, math.inf)
    if budget is not None:
        check_number(where, "budget", budget, 0, math.inf)
    check_choice(where, "unit", unit, get_args(Unit))
    if unit != "bytes" and example_inputs is None:
        raise ValueError(
            f"{where}: example_inputs must be given where unit is {unit!r}, got None; pass the model's input"
        )
    if not isinstance(sparsities, Sequence) or isinstance(sparsities, str) or not sparsities:
        raise ValueError(
            f"{where}: sparsities must be a list of numbers in [0, 1), got {sparsities!r}; pass at least one"
        )
    for sparsity in sparsities:
        check_number(where, "sparsities", sparsity, 0, 1)
    check_int(where, "trials", trials, 1)
    blocks(where, pattern)
    return select(where, model, targets, ignore)
