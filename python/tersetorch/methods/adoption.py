"""How an optimizer that was built before weights were shared comes to train their codebooks."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.optim import LBFGS, Adagrad, Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

# Everything is held weakly: neither a model nor an optimizer lives longer because of it. The numbers keep the order.
_shared: WeakValueDictionary[int, ParametrizationList] = WeakValueDictionary()
_numbers = count()
# How many parameters an optimizer held when it was last looked at.
_seen: WeakKeyDictionary[Optimizer, int] = WeakKeyDictionary()
_hooked = False


def announce(held: ParametrizationList) -> None:
    """Says that held, whose first parametrization has a codebook, is shared now.

    Optimizers that have stepped since tersetorch first shared a weight adopt the codebook at once, any other just
    before its next step.
    """
    global _hooked
    if not _hooked:
        register_optimizer_step_pre_hook(_before_step)
        _hooked = True
    if not any(one is held for one in _shared.values()):
        _shared[next(_numbers)] = held
    for optimizer in list(_seen):
        adopt(optimizer)


def adopt(optimizer: Optimizer) -> None:
    """Adds the codebook of every shared weight that optimizer holds to the weight's group; what it has it keeps.

    It happens by itself before each step. Call it where the codebooks must be there earlier: before
    optimizer.load_state_dict in a resumed run, before torch.amp.GradScaler unscales the first gradients, or before
    torch.compile traces the step.

    Raises:
        TypeError: optimizer is no torch.optim.Optimizer.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"adopt: optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}; pass the optimizer"
        )
    groups = {id(parameter): (group, place) for group, place, parameter in _parameters(optimizer)}
    for held in list(_shared.values()):
        codebook = getattr(held[0], "codebook", None) if len(held) else None
        if not isinstance(codebook, nn.Parameter) or id(held.original) not in groups or id(codebook) in groups:
            continue
        group, place = groups[id(held.original)]
        group["params"].append(codebook)
        if "param_names" in group:
            group["param_names"].append(f"{group['param_names'][place]}.codebook")
        groups[id(codebook)] = group, len(group["params"]) - 1
        _start(optimizer, group, codebook)
    _seen[optimizer] = _count(optimizer)


def replace(former: nn.Parameter, successor: nn.Parameter | None) -> None:
    """Puts successor in the place of the codebook former in every optimizer known to hold it, or takes it out."""
    former.requires_grad_(False)
    former.grad = None
    for optimizer in list(_seen):
        for group, place, parameter in list(_parameters(optimizer)):
            if parameter is former:
                optimizer.state.pop(former, None)
                if successor is not None:
                    group["params"][place] = successor
                    _start(optimizer, group, successor)
                else:
                    del group["params"][place]
                    if "param_names" in group:
                        del group["param_names"][place]
                    _start(optimizer, group, None)
        _seen[optimizer] = _count(optimizer)


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if not torch.compiler.is_compiling() and _seen.get(optimizer) != _count(optimizer):
        adopt(optimizer)


def _parameters(optimizer: Optimizer) -> Iterator[tuple[dict[str, Any], int, nn.Parameter]]:
    for group in optimizer.param_groups:
        for place, parameter in enumerate(group["params"]):
            yield group, place, parameter


def _count(optimizer: Optimizer) -> int:
    return sum(len(group["params"]) for group in optimizer.param_groups)


def _start(optimizer: Optimizer, group: dict[str, Any], codebook: nn.Parameter | None) -> None:
    """Does for codebook what the two optimizers that make their state early, not at a parameter's first step, need."""
    if isinstance(optimizer, Adagrad) and codebook is not None:
        optimizer.state[codebook]["step"] = torch.tensor(0.0)
        optimizer.state[codebook]["sum"] = torch.full_like(codebook, group["initial_accumulator_value"]).detach()
    elif isinstance(optimizer, LBFGS):
        # Its history is of directions in the old number of dimensions.
        optimizer._numel_cache = None
        optimizer.state.clear()
