"""Trains some layers while the others stand still."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from tersetorch.methods.parametrization import live_weights
from tersetorch.methods.selection import Patterns, select


@contextmanager
def only(model: nn.Module, targets: Patterns, ignore: Patterns | None = None) -> Iterator[nn.Module]:
    """Inside the with block only the layers of targets train: every other parameter of model requires no gradient.

    Layers are pruned group by group this way: prune the convolutions and retrain them alone, then the linear layers.
    The gradients of what is frozen are dropped, so that an optimizer that holds it leaves it as it is, momentum and
    weight decay included. Afterwards every parameter that was frozen here requires gradients again. Methods that
    change weights refuse frozen ones: inside, name in their targets what trains.

    Example:
        for group in (torch.nn.Conv2d, torch.nn.Linear):
            tt.prune.magnitude(model, 0.9, targets=group)
            with tt.prune.only(model, group):
                train(model)

    Args:
        model: any nn.Module.
        targets: as in prune.magnitude; of each layer it selects, the bias trains too.
        ignore: as in prune.magnitude.

    Raises:
        TypeError, ValueError: as prune.magnitude.

    Source:
        Han, Pool, Tran, Dally, Learning both weights and connections (2015), section 3.3 (local pruning and parameter
        co-adaptation); Guo, Yao, Chen, Dynamic network surgery (2016), section 3.3.
    """
    chosen = select("prune.only", model, targets, ignore, frozen=True)
    training = {id(parameter) for target in chosen for module, _ in target.owners for parameter in module.parameters()}
    frozen = [
        parameter for parameter in model.parameters() if parameter.requires_grad and id(parameter) not in training
    ]
    for parameter in frozen:
        parameter.requires_grad_(False)
        parameter.grad = None
    try:
        yield model
    finally:
        # What was shared inside trains by its codebook from then on.
        shared = {id(live.original): live.compressed.codebook for live in live_weights(model)}
        for parameter in frozen:
            codebook = shared.get(id(parameter))
            (parameter if codebook is None else codebook).requires_grad_(True)
