"""Prunes the smallest weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from tersetorch.methods.arguments import check_choice, check_number
from tersetorch.methods.parametrization import attach
from tersetorch.methods.prune.patterns import GroupPattern, Pattern, check_weights, keep, keep_together, parse
from tersetorch.methods.selection import Patterns, PerPattern, Target, assign, select

Scope = Literal["layer", "global"]
Sparsity: TypeAlias = float | PerPattern[float]


def magnitude(
    model: nn.Module,
    sparsity: Sparsity | None = None,
    *,
    threshold_std: float | None = None,
    scope: Scope = "layer",
    pattern: str | None = None,
    targets: Patterns | None = None,
    ignore: Patterns | None = None,
) -> nn.Module:
    """Prunes the weights of least |w|, in place, and returns model.

    By sparsity, round(sparsity * n) of a layer's n weights are zero afterwards, of equal ones the first in the
    tensor's order. By threshold, |w| < threshold_std * std is pruned, std being the population standard deviation of
    the layer's weights that no mask prunes yet. With scope "global" both hold for all layers' weights taken together.

    By pattern "N:M", of every M consecutive input channels (dimension 1 of the weight) the N of greatest |w| stay at
    each output and kernel position. By pattern "RxC", whole blocks of R x C of the weight as a matrix [out, rest] go,
    those of least mean |w|, as many as fit into round(sparsity * n); zeros that lie scattered do not count towards it.

    Pruning adds up: weights that are zero or pruned already go first and stay pruned, so asking for a lower sparsity
    than a layer has changes nothing. What survives trains on; the pruned ones have no gradient, keep their former
    values out of sight, and are zero whatever the optimizer does, until finalize ends the method. Sparsity 0 prunes
    nothing but makes the model ready to load the state of a pruned one.

    Args:
        model: any nn.Module; its weights are float16, bfloat16, float32 or float64, of any shape.
        sparsity: part of the weights to be zero, in [0, 1); or one such part for each pattern, which then stands for
            targets too: a path wins over patterns, then the first pattern does.
        threshold_std: at least 0; exactly one of sparsity, threshold_std and a pattern "N:M" is given.
        scope: "layer" or "global".
        pattern: None for each weight alone, "N:M" such as "2:4", which says the sparsity itself, or "RxC" such as
            "4x1", which goes with sparsity.
        targets: names, globs, "re:..." patterns or module types, see tersetorch.methods.selection.select; the
            default is every Linear, Conv1d, Conv2d and Conv3d. Only weights are pruned, never biases.
        ignore: the same, for what to leave out.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a number is outside its range, a pattern matches nothing, or a weight cannot be pruned: it is
            frozen (requires no gradient), holds NaN or infinity, has another parametrization, is no plain parameter, or
            its input channels do not divide into groups of M. The model is as it was.

    Source:
        Han, Pool, Tran, Dally, Learning both weights and connections (2015), section 3, for the threshold. Where we
        differ: a sparsity may be asked for directly, and the standard deviation is taken again at each call. Mishra et
        al., Accelerating sparse deep neural networks (2021), for 2:4.
    """
    where = "prune.magnitude"
    form = parse(where, pattern)
    chosen = choose(where, model, sparsity, scope, targets, ignore, form, threshold_std)
    sizes = [target.weight.abs() for target, _ in chosen]
    if threshold_std is not None:
        apply_masks(chosen, _above(chosen, sizes, threshold_std, scope))
    else:
        apply_masks(chosen, masks(chosen, sizes, scope, form))
    return model


def choose(
    where: str,
    model: nn.Module,
    sparsity: Sparsity | None,
    scope: str,
    targets: Patterns | None,
    ignore: Patterns | None,
    pattern: Pattern = None,
    threshold_std: float | None = None,
) -> list[tuple[Target, float]]:
    """The weights to prune, each with its sparsity (0 where something else decides); raises as magnitude does."""
    grouped = isinstance(pattern, GroupPattern)
    given = [
        name
        for name, there in (
            ("sparsity", sparsity is not None),
            ("threshold_std", threshold_std is not None),
            ("a pattern 'N:M'", grouped),
        )
        if there
    ]
    if len(given) != 1:
        raise ValueError(
            f"{where}: exactly one of sparsity, threshold_std and a pattern 'N:M' must be given, got "
            f"{' and '.join(given) or 'none'}; pass one"
        )
    check_choice(where, "scope", scope, get_args(Scope))
    if pattern is not None and threshold_std is not None:
        raise ValueError(f"{where}: pattern must be left out where threshold_std is given, got both; pass sparsity")
    if grouped and scope == "global":
        raise ValueError(f"{where}: scope must be 'layer' where the pattern is N:M, got 'global'; leave it out")
    if isinstance(sparsity, Mapping):
        if targets is not None or scope == "global":
            other = "targets" if targets is not None else 'scope="global"'
            raise ValueError(
                f"{where}: sparsity must be one number where {other} is given, got a mapping; leave one of them out"
            )
        for name, part in sparsity.items():
            check_number(where, f"sparsity[{name!r}]", part, 0, 1)
        return assign(where, "sparsity", model, sparsity, ignore)
    if threshold_std is not None:
        check_number(where, "threshold_std", threshold_std, 0, math.inf)
    elif not grouped:
        check_number(where, "sparsity", sparsity, 0, 1)
    chosen = select(where, model, targets, ignore)
    check_weights(where, pattern, chosen)
    return [(target, float(sparsity or 0)) for target in chosen]


def masks(
    chosen: Sequence[tuple[Target, float]], scores: Sequence[Tensor], scope: str, pattern: Pattern
) -> list[Tensor]:
    """What to keep of each weight, bool of its shape, by scores that are not negative."""
    alive = [_alive(target, score) for (target, _), score in zip(chosen, scores, strict=True)]
    if scope == "global":
        return keep_together(scores, alive, chosen[0][1], pattern)
    return [keep(score, each, part, pattern) for (_, part), score, each in zip(chosen, scores, alive, strict=True)]


def apply_masks(chosen: Sequence[tuple[Target, float]], kept: Sequence[Tensor]) -> None:
    """Prunes what the masks do not keep; a mask that is there keeps its memory, so that compiled models see it."""
    for (target, _), mask in zip(chosen, kept, strict=True):
        attach(target.owners).mask.logical_and_(mask)


def _alive(target: Target, weight: Tensor) -> Tensor:
    compressed = target.compressed
    return torch.ones_like(weight, dtype=torch.bool) if compressed is None else compressed.mask


def _above(
    chosen: Sequence[tuple[Target, float]], sizes: Sequence[Tensor], threshold_std: float, scope: str
) -> list[Tensor]:
    """The weights of at least threshold_std standard deviations of the layer's survivors, or of all layers'."""
    # The deviation of signed weights: sizes alone do not know it.
    survivors = [target.weight[_alive(target, size)].double() for (target, _), size in zip(chosen, sizes, strict=True)]
    if scope == "global":
        device = sizes[0].device
        survivors = [torch.cat([each.to(device) for each in survivors])] * len(sizes)
    return [
        size.double() >= threshold_std * each.std(correction=0).to(size.device)
        if each.numel()
        else torch.ones_like(size, dtype=torch.bool)
        for size, each in zip(sizes, survivors, strict=True)
    ]
