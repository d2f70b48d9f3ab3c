"""Prunes the smallest weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from tersetorch.methods.arguments import check_choice, check_number
from tersetorch.methods.parametrization import attach
from tersetorch.methods.selection import Patterns, PerPattern, Target, assign, select

Scope = Literal["layer", "global"]
Sparsity: TypeAlias = float | PerPattern[float]


def magnitude(
    model: nn.Module,
    sparsity: Sparsity | None = None,
    *,
    threshold_std: float | None = None,
    scope: Scope = "layer",
    targets: Patterns | None = None,
    ignore: Patterns | None = None,
) -> nn.Module:
    """Prunes the weights of least |w|, in place, and returns model.

    By sparsity, round(sparsity * n) of a layer's n weights are zero afterwards, of equal ones the first in the
    tensor's order. By threshold, |w| < threshold_std * std is pruned, std being the population standard deviation of
    the layer's weights that no mask prunes yet. With scope "global" both hold for all layers' weights taken together.

    Pruning adds up: weights that are zero or pruned already go first and stay pruned, so asking for a lower sparsity
    than a layer has changes nothing. What survives trains on; the pruned ones have no gradient, keep their former
    values out of sight, and are zero whatever the optimizer does, until finalize ends the method. Sparsity 0 prunes
    nothing but makes the model ready to load the state of a pruned one.

    Args:
        model: any nn.Module; its weights are float16, bfloat16, float32 or float64, of any shape.
        sparsity: part of the weights to be zero, in [0, 1); or one such part for each pattern, which then stands for
            targets too: a path wins over patterns, then the first pattern does.
        threshold_std: at least 0; exactly one of sparsity and threshold_std is given.
        scope: "layer" or "global".
        targets: names, globs, "re:..." patterns or module types, see tersetorch.methods.selection.select; the
            default is every Linear, Conv1d, Conv2d and Conv3d. Only weights are pruned, never biases.
        ignore: the same, for what to leave out.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a number is outside its range, a pattern matches nothing, or a weight cannot be pruned: it holds NaN
            or infinity, has another parametrization, or is no plain parameter. The model is as it was.

    Source:
        Han, Pool, Tran, Dally, Learning both weights and connections (2015), section 3, for the threshold. Where we
        differ: a sparsity may be asked for directly, and the standard deviation is taken again at each call.
    """
    where = "prune.magnitude"
    chosen = choose(where, model, sparsity, threshold_std, scope, targets, ignore)
    weights = [target.weight for target, _ in chosen]
    apply_masks(chosen, masks(chosen, weights, threshold_std, scope))
    return model


def choose(
    where: str,
    model: nn.Module,
    sparsity: Sparsity | None,
    threshold_std: float | None,
    scope: str,
    targets: Patterns | None,
    ignore: Patterns | None,
) -> list[tuple[Target, float]]:
    """The weights to prune, each with its sparsity (0 where threshold_std decides); raises as magnitude does."""
    if (sparsity is None) == (threshold_std is None):
        given = "neither" if sparsity is None else "both"
        raise ValueError(f"{where}: exactly one of sparsity and threshold_std must be given, got {given}; pass one")
    check_choice(where, "scope", scope, get_args(Scope))
    if threshold_std is not None:
        check_number(where, "threshold_std", threshold_std, 0, math.inf)
        return [(target, 0.0) for target in select(where, model, targets, ignore)]
    if isinstance(sparsity, Mapping):
        if targets is not None or scope == "global":
            other = "targets" if targets is not None else 'scope="global"'
            raise ValueError(
                f"{where}: sparsity must be one number where {other} is given, got a mapping; leave one of them out"
            )
        for pattern, part in sparsity.items():
            check_number(where, f"sparsity[{pattern!r}]", part, 0, 1)
        return assign(where, "sparsity", model, sparsity, ignore)
    check_number(where, "sparsity", sparsity, 0, 1)
    assert sparsity is not None
    return [(target, float(sparsity)) for target in select(where, model, targets, ignore)]


def masks(
    chosen: Sequence[tuple[Target, float]], weights: Sequence[Tensor], threshold_std: float | None, scope: str
) -> list[Tensor]:
    """What to keep of each weight, bool of its shape."""
    if scope == "layer":
        return [
            _keep(weight, _alive(target, weight), part, threshold_std)
            for (target, part), weight in zip(chosen, weights, strict=True)
        ]
    wide = torch.float64 if any(weight.dtype == torch.float64 for weight in weights) else torch.float32
    device = weights[0].device
    together = torch.cat([weight.flatten().to(device, wide) for weight in weights])
    each = [_alive(target, weight) for (target, _), weight in zip(chosen, weights, strict=True)]
    alive = torch.cat([mask.flatten().to(device) for mask in each])
    kept = _keep(together, alive, chosen[0][1], threshold_std).split([weight.numel() for weight in weights])
    return [mask.view(weight.shape).to(weight.device) for mask, weight in zip(kept, weights, strict=True)]


def apply_masks(chosen: Sequence[tuple[Target, float]], kept: Sequence[Tensor]) -> None:
    """Prunes what the masks do not keep; a mask that is there keeps its memory, so that compiled models see it."""
    for (target, _), mask in zip(chosen, kept, strict=True):
        attach(target.owners).mask.logical_and_(mask)


def _alive(target: Target, weight: Tensor) -> Tensor:
    compressed = target.compressed
    return torch.ones_like(weight, dtype=torch.bool) if compressed is None else compressed.mask


def _keep(weight: Tensor, alive: Tensor, sparsity: float, threshold_std: float | None) -> Tensor:
    if threshold_std is not None:
        survivors = weight[alive].double()
        if not survivors.numel():
            return torch.ones_like(alive)
        return weight.abs().double() >= threshold_std * survivors.std(correction=0)
    return _keep_largest(weight, round(sparsity * weight.numel()))


def _keep_largest(weight: Tensor, pruned: int) -> Tensor:
    """All but the `pruned` entries of least |w|, of equal ones the first."""
    if pruned == 0:
        return torch.ones_like(weight, dtype=torch.bool)
    size = weight.abs().flatten()
    limit = size.float().kthvalue(pruned).values if size.dtype != torch.float64 else size.kthvalue(pruned).values
    kept = size > limit
    ties = (size == limit).nonzero().flatten()
    kept[ties[pruned - int((size < limit).sum()) :]] = True
    return kept.view(weight.shape)
