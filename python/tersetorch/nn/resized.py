"""How an optimizer goes on with a parameter that a state dict gave another shape."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Adagrad, Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakTensorKeyDictionary

# Held weakly, and looked for before each step of any optimizer from the first such parameter on.
_resized: Any = WeakTensorKeyDictionary()
_hooked = False


def resize(tensor: Tensor, shape: torch.Size) -> None:
    """Makes room for other numbers in tensor, which stays the same object.

    An optimizer that holds it as a parameter starts anew with it at its next step: what it remembers is of the old
    numbers. A gradient is gone.
    """
    global _hooked
    tensor.data = tensor.new_empty(shape)
    if isinstance(tensor, nn.Parameter):
        tensor.grad = None
        _resized[tensor] = True
        if not _hooked:
            register_optimizer_step_pre_hook(_before_step)
            _hooked = True


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if torch.compiler.is_compiling():
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter not in _resized:
                continue
            if isinstance(optimizer, LBFGS):
                _forget_directions(optimizer)
            elif not all(_fits(value, parameter) for value in optimizer.state.get(parameter, {}).values()):
                del optimizer.state[parameter]
                if isinstance(optimizer, Adagrad):  # the one that makes its state early
                    total = torch.full_like(parameter, group["initial_accumulator_value"]).detach()
                    optimizer.state[parameter] = {"step": torch.tensor(0.0), "sum": total}


def _fits(value: Any, parameter: Tensor) -> bool:
    """Whether a part of a state may belong to a parameter of this shape: some optimizers keep rows' or columns' own."""
    if not isinstance(value, Tensor) or not value.dim():
        return True
    sizes = zip(value.shape, parameter.shape, strict=False)
    return value.dim() == parameter.dim() and all(size in (1, whole) for size, whole in sizes)


def _forget_directions(optimizer: LBFGS) -> None:
    """Clears a history of directions in another number of dimensions."""
    numbers = sum(one.numel() for group in optimizer.param_groups for one in group["params"])
    if optimizer._numel_cache not in (None, numbers):
        optimizer._numel_cache = None
        optimizer.state.clear()
