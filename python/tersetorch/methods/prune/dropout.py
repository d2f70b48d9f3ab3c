"""Less dropout where fewer connections are left to drop."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.utils.parametrize import type_before_parametrizations

from tersetorch.methods.arguments import check_int, check_model, check_number
from tersetorch.methods.selection import Target, select

# Where a dropout module keeps (its rate on the dense network, the rate that was set last); in its __dict__, so that
# deepcopy and pickle carry it along; storage takes names that begin so for notes that no forward reads.
MEMORY = "_tersetorch_dropout_rates"


def dropout_rate(rate: float, kept: int, original: int) -> float:
    """The dropout rate * sqrt(kept / original) for a layer with `kept` of its `original` connections.

    Raises:
        TypeError: an argument is no number.
        ValueError: rate is outside [0, 1], original is less than 1, or kept is not from 0 to original.

    Source:
        Han, Pool, Tran, Dally, Learning both weights and connections (2015), equation 2.
    """
    where = "prune.dropout_rate"
    check_number(where, "rate", rate, 0, 1, closed=True)
    check_int(where, "original", original, 1)
    check_int(where, "kept", kept, 0, original)
    return rate * math.sqrt(kept / original)


def rescale_dropout(model: nn.Module, pairs: Mapping[str, str] | None = None) -> nn.Module:
    """Sets the rate of each dropout module by dropout_rate from the layer it regularises, in place; returns model.

    A dropout module regularises the next layer, in module order, that prune.magnitude would prune by default: the one
    whose inputs it drops. One with no such layer after it is left alone. Connections that are kept are the weights
    that are not zero, in live and finalized models alike.

    Calling it again after further pruning starts from the rate of the dense network, which the module remembers (also
    through deepcopy and pickle, not in the state_dict). A rate that was set by hand since then counts as a new rate of
    the dense network. Nothing undoes the scaling, finalize neither.

    Args:
        model: any nn.Module.
        pairs: layer name by dropout name, where module order says something else: only these are scaled then.

    Raises:
        TypeError: model is no module, pairs is no mapping, or it names something that is no dropout module.
        ValueError: pairs is empty or names no module, or no such layer.

    Source:
        Han, Pool, Tran, Dally, Learning both weights and connections (2015), section 3.2.
    """
    where = "prune.rescale_dropout"
    check_model(where, model)
    rates = []
    for dropout, target in _paired(model) if pairs is None else _told(where, model, pairs):
        weight = target.weight
        if not weight.numel():
            continue
        dense, scaled = getattr(dropout, MEMORY, (dropout.p, dropout.p))
        if dropout.p != scaled:
            dense = dropout.p
        rates.append((dropout, dense, dropout_rate(dense, int(weight.count_nonzero()), weight.numel())))
    for dropout, dense, rate in rates:
        dropout.p = rate
        setattr(dropout, MEMORY, (dense, rate))
    return model


def _paired(model: nn.Module) -> list[tuple[_DropoutNd, Target]]:
    dropouts = [module for module in model.modules() if isinstance(module, _DropoutNd)]
    if not dropouts:
        return []
    chosen = select("prune.rescale_dropout", model, None, None, frozen=True)
    layers = {module: target for target in chosen for module, _ in target.owners}
    pairs: list[tuple[_DropoutNd, Target]] = []
    waiting: list[_DropoutNd] = []
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            waiting.append(module)
        elif module in layers:
            pairs.extend((dropout, layers[module]) for dropout in waiting)
            waiting.clear()
    return pairs


def _told(where: str, model: nn.Module, pairs: Mapping[str, str]) -> list[tuple[_DropoutNd, Target]]:
    if not isinstance(pairs, Mapping):
        raise TypeError(f"{where}: pairs must be a mapping, got {type(pairs).__name__}; pass dropout name: layer name")
    if not pairs:
        raise ValueError(f"{where}: pairs must name at least one dropout, got {{}}; leave it out for module order")
    modules = dict(model.named_modules(remove_duplicate=False))
    found = []
    for name, layer in pairs.items():
        dropout = modules.get(name)
        if dropout is None:
            known = [path for path, module in modules.items() if isinstance(module, _DropoutNd)]
            raise ValueError(f"{where}: pairs must name dropout modules, got {name!r}; the model has {known[:5]}")
        if not isinstance(dropout, _DropoutNd):
            kind = type_before_parametrizations(dropout).__name__
            raise TypeError(f"{where}: pairs must name dropout modules, got {name!r}, a {kind}; name another")
        chosen = select(where, model, layer, None, frozen=True)
        if len(chosen) != 1:
            names = ", ".join(target.name for target in chosen)
            raise ValueError(f"{where}: pairs[{name!r}] must match one weight, got {names}; name one of them")
        found.append((dropout, chosen[0]))
    return found
