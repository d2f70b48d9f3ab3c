"""Optimal Brain Damage: prunes the weights whose removal raises the loss least, by its second derivatives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from rich.progress import Progress
from torch import Tensor, nn

from tersetorch.methods.arguments import check_int, check_number
from tersetorch.methods.prune.magnitude import Scope, Sparsity, apply_masks, choose, masks
from tersetorch.methods.prune.output_losses import Loss
from tersetorch.methods.prune.patterns import GroupPattern, parse
from tersetorch.methods.prune.second_derivatives import Batch, Form, check_pass, curvature
from tersetorch.methods.selection import Patterns, Target, select


@dataclass(frozen=True)
class Saliencies:
    """What the quadratic model of the loss says of each weight.

    Attributes:
        loss: E, the mean loss over the data.
        second: h_kk = d2E/dw_k^2 by the weights' names, of their shapes; float64 for a float64 weight, else float32.
        saliency: s_k = h_kk w_k^2 / 2, the rise of E that removing weight k is predicted to cost, of the same shapes.
            Negative where h_kk is, which only the exact form can give.
        alive: bool, which weights are not zero, of the same shapes.
    """

    loss: float
    second: dict[str, Tensor]
    saliency: dict[str, Tensor]
    alive: dict[str, Tensor]

    def curve(self) -> Tensor:
        """The predicted rise of E after removing the n least salient weights of all, float64 [alive weights + 1].

        Negative saliencies are ordered as zeros and counted as they are, as obd does.
        """
        device = next(iter(self.saliency.values())).device
        flat = torch.cat([self.saliency[name][alive].double().to(device) for name, alive in self.alive.items()])
        order = flat.clamp(min=0).argsort(stable=True)
        return torch.cat([flat.new_zeros(1), flat[order].cumsum(0)])

    def losses(self, sparsities: Sequence[float]) -> dict[str, dict[float, float]]:
        """For each layer the predicted rise of E when its least salient weights go, at each sparsity.

        What prune_to_budget takes as `losses`: the second-order trade between layers, in place of a sensitivity scan.
        Weights that are zero go first; negative saliencies count as zeros.

        Raises:
            TypeError, ValueError: a sparsity is no number in [0, 1).
        """
        found: dict[str, dict[float, float]] = {}
        for name, saliency in self.saliency.items():
            alive = self.alive[name]
            rise = saliency[alive].double().clamp(min=0).sort().values.cumsum(0)
            dead = alive.numel() - len(rise)
            found[name] = {}
            for sparsity in sparsities:
                check_number("Saliencies.losses", "sparsities", sparsity, 0, 1)
                gone = round(sparsity * alive.numel()) - dead
                found[name][float(sparsity)] = float(rise[gone - 1]) if gone > 0 else 0.0
        return found


@dataclass(frozen=True)
class Deletion:
    """One round of obd.

    Attributes:
        round: counts from 1.
        loss: E before the deletion.
        predicted_rise: the sum of the saliencies of what was deleted.
        deleted: weights that became zero in this round.
        kept: selected weights that are not zero after it.
    """

    round: int
    loss: float
    predicted_rise: float
    deleted: int
    kept: int


def saliencies(
    model: nn.Module,
    data: Iterable[Batch],
    loss: Loss,
    *,
    form: Form = "levenberg_marquardt",
    targets: Patterns | None = None,
    ignore: Patterns | None = None,
    progress: Progress | None = None,
) -> Saliencies:
    """Each weight's saliency s_k = h_kk w_k^2 / 2, h_kk as prune.diagonal_hessian gives it; model is not changed.

    At a minimum of E, where gradients vanish, and as long as second derivatives between weights do not matter, E rises
    by the sum of the saliencies of the weights that are set to zero.

    Args:
        model: as in prune.diagonal_hessian.
        data: as in prune.diagonal_hessian.
        loss: as in prune.diagonal_hessian.
        form: as in prune.diagonal_hessian.
        targets: as in prune.magnitude.
        ignore: as in prune.magnitude.
        progress: a bar for the batches is added to it.

    Raises:
        TypeError, ValueError: as prune.diagonal_hessian.

    Source:
        LeCun, Denker, Solla, Optimal Brain Damage (1990), section 2.
    """
    where = "prune.saliencies"
    check_pass(where, data, loss, form)
    return _saliencies(where, model, data, loss, form, select(where, model, targets, ignore, frozen=True), progress)


def obd(
    model: nn.Module,
    data: Iterable[Batch],
    loss: Loss,
    sparsity: Sparsity | None = None,
    *,
    pattern: str | None = None,
    scope: Scope = "layer",
    form: Form = "levenberg_marquardt",
    rounds: int = 1,
    retrain: Callable[[nn.Module, int], object] | None = None,
    history: list[Deletion] | None = None,
    targets: Patterns | None = None,
    ignore: Patterns | None = None,
    progress: Progress | None = None,
) -> nn.Module:
    """Prunes the weights of least saliency h_kk w_k^2 / 2, in rounds with retraining, in place, and returns model.

    Each round computes h_kk = d2E/dw_k^2 on data (prune.diagonal_hessian says how), ranks the weights by saliency,
    masks the least, and calls retrain(model, round). Round r of R leaves (1 - sparsity)^(r / R) of the weights, so that
    every round takes the same part of what is there. The model should be trained to a minimum first: the gradients are
    taken to be zero.

    What is counted, masked and kept is as in prune.magnitude, with saliencies in the place of |w|: what was pruned
    stays pruned, zeros go first, pruned weights have no gradient, finalize ends it. Saliencies of different layers
    compare, so scope "global" needs no scale. A negative h_kk, which only form "exact" can give, ranks as zero: along
    such a weight the loss is at no minimum and its quadratic model says nothing; the Levenberg-Marquardt form has none.

    Given a DistributedDataParallel, on every rank, it averages the second derivatives over the ranks' data, so that all
    delete the same weights; the bare module is decided from the data of the calling rank alone.

    Args:
        model: as in prune.diagonal_hessian; its weights may be tied, pruned or shared.
        data: as in prune.diagonal_hessian; with more than one round it is read once a round, so an iterator is refused.
        loss: as in prune.diagonal_hessian.
        sparsity: as in prune.magnitude; left out where pattern is "N:M".
        pattern: as in prune.magnitude: None, "N:M" or "RxC".
        scope: "layer" or "global".
        form: as in prune.diagonal_hessian.
        rounds: at least 1; 1 where pattern is "N:M".
        retrain: trains model in place after each round, the last one too; what it returns is not looked at. None
            trains nothing.
        history: a Deletion is appended to it for each round.
        targets: as in prune.magnitude.
        ignore: as in prune.magnitude.
        progress: bars for the passes over data are added to it.

    Raises:
        TypeError, ValueError: an argument has the wrong type or is outside its range, or as prune.magnitude and
            prune.diagonal_hessian. The model is as it was; in a later round, as the rounds before it left it.

    Source:
        LeCun, Denker, Solla, Optimal Brain Damage (1990), section 2. Where we differ: only weights are deleted, no
        biases, and the sparsity of each round follows from the last one's.
    """
    where = "prune.obd"
    check_pass(where, data, loss, form)
    check_int(where, "rounds", rounds, 1)
    if retrain is not None and not callable(retrain):
        raise TypeError(f"{where}: retrain must be callable, got {type(retrain).__name__}; pass retrain(model, round)")
    if history is not None and not isinstance(history, list):
        raise TypeError(f"{where}: history must be a list, got {type(history).__name__}; pass one to be appended to")
    if rounds > 1 and isinstance(data, Iterator):
        raise TypeError(
            f"{where}: data must be readable once a round, got a {type(data).__name__}, which ends after one; pass a "
            "list or a DataLoader"
        )
    grouping = parse(where, pattern)
    if rounds > 1 and isinstance(grouping, GroupPattern):
        raise ValueError(f"{where}: rounds must be 1 where the pattern is N:M, got {rounds}; leave it out")
    for index in range(1, rounds + 1):
        final = choose(where, model, sparsity, scope, targets, ignore, grouping)
        chosen = [(target, part if index == rounds else 1 - (1 - part) ** (index / rounds)) for target, part in final]
        found = _saliencies(where, model, data, loss, form, [target for target, _ in chosen], progress)
        scores = [found.saliency[target.name].clamp(min=0) for target, _ in chosen]
        apply_masks(chosen, masks(chosen, scores, scope, grouping))
        if history is not None:
            history.append(_deletion(index, found, [target for target, _ in chosen]))
        if retrain is not None:
            retrain(model, index)
    return model


def _saliencies(
    where: str,
    model: nn.Module,
    data: Iterable[Batch],
    loss: Loss,
    form: Form,
    chosen: Sequence[Target],
    progress: Progress | None,
) -> Saliencies:
    found = curvature(where, model, data, loss, form, chosen, progress)
    weights: Mapping[str, Tensor] = {target.name: target.weight for target in chosen}
    return Saliencies(
        found.loss,
        found.second,
        {name: second * weights[name].to(second.dtype).square() / 2 for name, second in found.second.items()},
        {name: weight != 0 for name, weight in weights.items()},
    )


def _deletion(index: int, found: Saliencies, chosen: Sequence[Target]) -> Deletion:
    after = {target.name: target.weight != 0 for target in chosen}
    gone = {name: alive & ~after[name] for name, alive in found.alive.items()}
    return Deletion(
        index,
        found.loss,
        sum(float(found.saliency[name][each].double().sum()) for name, each in gone.items()),
        sum(int(each.sum()) for each in gone.values()),
        sum(int(each.sum()) for each in after.values()),
    )
