"""Takes over what others pruned: plain zeros, and the masks of torch.nn.utils.prune."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod

from tersetorch.methods.arguments import check_model
from tersetorch.methods.parametrization import attach, release_graphs
from tersetorch.methods.prune.magnitude import apply_masks
from tersetorch.methods.selection import Patterns, select


def keep_zeros(model: nn.Module, *, targets: Patterns | None = None, ignore: Patterns | None = None) -> nn.Module:
    """Prunes exactly the weights that are zero, in place, so that they stay zero while model trains; returns model.

    For models that came pruned as plain numbers, from a checkpoint or after finalize. No value changes, so frozen
    weights are taken too.

    Args:
        model: as in prune.magnitude.
        targets: as in prune.magnitude.
        ignore: as in prune.magnitude.

    Raises:
        TypeError, ValueError: as prune.magnitude.
    """
    chosen = [(target, 0.0) for target in select("prune.keep_zeros", model, targets, ignore, frozen=True)]
    apply_masks(chosen, [target.weight != 0 for target, _ in chosen])
    return model


def from_torch(model: nn.Module) -> nn.Module:
    """Replaces the masks of torch.nn.utils.prune in model by ours, in place, and returns model.

    Every tensor that torch prunes, biases too, keeps its mask and its values, those under the mask too; it is the
    Parameter that torch calls `weight_orig`, so that an optimizer goes on with it. What torch has not pruned is left.
    Afterwards the model deep-copies, and every method, finalize and convert know its masks.

    Args:
        model: any nn.Module; one without such masks is returned as it is.

    Raises:
        TypeError: model is no module.
        ValueError: a mask holds something else than 0 and 1, or belongs to a tensor that several modules hold; model is
            as it was.
    """
    where = "prune.from_torch"
    check_model(where, model)
    found: list[tuple[nn.Module, str, int]] = []
    for path, module in model.named_modules():
        for key, hook in module._forward_pre_hooks.items():
            if isinstance(hook, BasePruningMethod):
                tensor = hook._tensor_name
                mask = cast(Tensor, getattr(module, f"{tensor}_mask"))
                if not bool(((mask == 0) | (mask == 1)).all()):
                    raise ValueError(
                        f"{where}: the mask of {path or 'model'}.{tensor} must hold only 0 and 1, got other numbers; "
                        "mend it"
                    )
                found.append((module, tensor, key))
    holders = [id(module._parameters[f"{tensor}_orig"]) for module, tensor, _ in found]
    others = [id(each) for module in model.modules() for each in module._parameters.values() if each is not None]
    for (_, tensor, _), holder in zip(found, holders, strict=True):
        if others.count(holder) > 1:
            raise ValueError(
                f"{where}: each pruned tensor must belong to one module, got a {tensor} that several hold; untie it"
            )
    with torch.no_grad():
        for module, tensor, key in found:
            mask = cast(Tensor, module._buffers.pop(f"{tensor}_mask")).bool()
            original = module._parameters.pop(f"{tensor}_orig")
            del module._forward_pre_hooks[key]
            delattr(module, tensor)
            module.register_parameter(tensor, original)
            attach([(module, tensor)]).mask.logical_and_(mask)
    release_graphs(model)
    return model
