"""Trains some layers while the others stand still."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from tersetorch.methods.parametrization import live_weights, parametrization_list, parametrized_tensors
from tersetorch.methods.selection import Patterns, find_weights, select


@contextmanager
def only(model: nn.Module, targets: Patterns, ignore: Patterns | None = None) -> Iterator[nn.Module]:
    """Inside the with block only the weights of targets train: every other parameter of model requires no gradient.

    Layers are pruned group by group this way: prune the convolutions and retrain them alone, then the linear layers.
    The gradients of what is frozen are dropped, so that an optimizer that holds it leaves it as it is, momentum and
    weight decay included. Afterwards every parameter that was frozen here requires gradients again. Methods that change
    weights refuse frozen ones: inside, name in their targets what trains.

    Example:
        for group in (torch.nn.Conv2d, torch.nn.Linear):
            tt.prune.magnitude(model, 0.9, targets=group)
            with tt.prune.only(model, group):
                train(model)

    Args:
        model: any nn.Module.
        targets: as in prune.magnitude; what else the module of a weight holds itself, such as its bias, trains too, but
            neither its other weights and their biases nor the modules in it. Frozen weights stay frozen.
        ignore: as in prune.magnitude.

    Raises:
        TypeError, ValueError: as prune.magnitude.

    Source:
        Han, Pool, Tran, Dally, Learning both weights and connections (2015), section 3.3 (local pruning and parameter
        co-adaptation); Guo, Yao, Chen, Dynamic network surgery (2016), section 3.3.
    """
    chosen = select("prune.only", model, targets, ignore, frozen=True)
    selected = {owner for target in chosen for owner in target.owners}
    others = {owner for target in find_weights(model) for owner in target.owners} - selected
    others |= {(module, tensor.replace("weight", "bias")) for module, tensor in others}
    training = {
        id(parameter)
        for module, _ in selected
        for tensor in (*module._parameters, *parametrized_tensors(module))
        if (module, tensor) not in others
        for parameter in _parameters_of(module, tensor)
    }
    frozen = [
        parameter for parameter in model.parameters() if parameter.requires_grad and id(parameter) not in training
    ]
    # A codebook stands for its weight, which may be shared anew, or no longer be, when the block ends.
    originals = {id(live.compressed.codebook): live.original for live in live_weights(model)}
    for parameter in frozen:
        parameter.requires_grad_(False)
        parameter.grad = None
    try:
        yield model
    finally:
        shared = {id(live.original): live.compressed.codebook for live in live_weights(model)}
        for parameter in frozen:
            weight = originals.get(id(parameter), parameter)
            codebook = shared.get(id(weight))
            (weight if codebook is None else codebook).requires_grad_(True)


def _parameters_of(module: nn.Module, tensor: str) -> list[nn.Parameter]:
    held = parametrization_list(module, tensor)
    if held is not None:
        return list(held.parameters())
    parameter = module._parameters[tensor]
    return [] if parameter is None else [parameter]
