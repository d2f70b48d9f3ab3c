"""Prunes in rounds, with retraining after each."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from tersetorch.methods.prune.magnitude import Scope, Sparsity, choose, magnitude
from tersetorch.methods.prune.patterns import blocks
from tersetorch.methods.selection import Patterns


def iterative(
    model: nn.Module,
    sparsities: Sequence[Sparsity],
    retrain: Callable[[nn.Module, int], object],
    *,
    scope: Scope = "layer",
    pattern: str | None = None,
    targets: Patterns | None = None,
    ignore: Patterns | None = None,
) -> nn.Module:
    """Prunes model by magnitude to each sparsity in turn, calling retrain(model, round) after each; returns model.

    The survivors train on from their present values; rounds count from 1. All sparsities are checked before the first
    round. An exception from retrain passes through and leaves the model as pruned so far.

    Args:
        model: as in prune.magnitude.
        sparsities: one or more, each as in prune.magnitude, none lower than the one before it.
        retrain: trains model in place; what it returns is not looked at.
        scope: as in prune.magnitude.
        pattern: blocks "RxC" as in prune.magnitude, or None.
        targets: as in prune.magnitude.
        ignore: as in prune.magnitude.

    Raises:
        TypeError: sparsities is no sequence, retrain cannot be called, or as prune.magnitude.
        ValueError: sparsities is empty or falls, or as prune.magnitude.

    Source:
        Han, Pool, Tran, Dally, Learning both weights and connections (2015), section 3.4.
    """
    where = "prune.iterative"
    if not isinstance(sparsities, Sequence) or isinstance(sparsities, str):
        raise TypeError(f"{where}: sparsities must be a list, got {type(sparsities).__name__}; pass one for each round")
    if not sparsities:
        raise ValueError(f"{where}: sparsities must hold at least one, got []; pass one for each round")
    if not callable(retrain):
        raise TypeError(f"{where}: retrain must be callable, got {type(retrain).__name__}; pass retrain(model, round)")
    form = blocks(where, pattern)
    before: dict[str, float] = {}
    for index, sparsity in enumerate(sparsities, 1):
        for target, part in choose(where, model, sparsity, scope, targets, ignore, form):
            if part < before.get(target.name, 0.0):
                raise ValueError(
                    f"{where}: sparsities must not fall, got {part} after {before[target.name]} for {target.name!r} in "
                    f"round {index}; pruned weights stay pruned, so sort them"
                )
            before[target.name] = part
    for index, sparsity in enumerate(sparsities, 1):
        magnitude(model, sparsity, scope=scope, pattern=pattern, targets=targets, ignore=ignore)
        retrain(model, index)
    return model
