"""How many of the values that reach a layer are not zero."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tersetorch.costs.count import multiplies
from tersetorch.methods.modes import evaluating


@dataclass(frozen=True)
class ActivationDensity:
    """The values that one layer was handed.

    Attributes:
        nonzeros: those that are not zero.
        total: all of them.
    """

    nonzeros: int
    total: int

    @property
    def density(self) -> float:
        """The part that is not zero; 1 where nothing came."""
        return self.nonzeros / self.total if self.total else 1.0


def activation_density(
    model: nn.Module, data: Iterable[Tensor | tuple[Any, ...] | Mapping[str, Any]]
) -> dict[str, ActivationDensity]:
    """Counts the non-zero values of the input of every linear and convolutional layer, over all batches of data.

    A layer's input is what the layers before it leave after their activations: the papers' Act% of a layer is the
    density of the input of the layer that follows it, and the part of a layer's multiply-accumulates that is left when
    zero weights and zero activations are passed over is its weight density times its input density.

    Args:
        model: runs in evaluation mode, without gradients; it is left as it was.
        data: batches, each a tensor, a tuple or list of arguments or a dict of keyword arguments of model.

    Returns:
        By layer, in the model's order, sparse ones too; layers that never ran have a total of 0.

    Raises:
        TypeError: model is no nn.Module, data cannot be iterated over, or a batch is none of the three.
        ValueError: data holds no batch.

    Source:
        Han, Pool, Tran, Dally, Learning both weights and connections (2015), tables 3 to 5, column Act%.
    """
    where = "activation_density"
    if not isinstance(model, nn.Module):
        raise TypeError(f"{where}: model must be a torch.nn.Module, got {type(model).__name__}; pass a network")
    if isinstance(data, Tensor | Mapping) or not isinstance(data, Iterable):
        raise TypeError(f"{where}: data must hold batches, got {type(data).__name__}; pass a list or a DataLoader")
    layers = {name: module for name, module in model.named_modules() if multiplies(module)}
    nonzeros, totals = dict.fromkeys(layers, 0), dict.fromkeys(layers, 0)

    def counter(name: str) -> Any:
        def count_input(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            x = inputs[0] if inputs else next(iter(named.values()))
            nonzeros[name] += int(x.count_nonzero())
            totals[name] += x.numel()

        return count_input

    handles = [module.register_forward_pre_hook(counter(name), with_kwargs=True) for name, module in layers.items()]
    batches = 0
    try:
        with torch.no_grad(), evaluating(model):
            for batch in data:
                batches += 1
                if isinstance(batch, Tensor):
                    model(batch)
                elif isinstance(batch, tuple | list):
                    model(*batch)
                elif isinstance(batch, Mapping):
                    model(**batch)
                else:
                    raise TypeError(
                        f"{where}: each batch must be a tensor, a tuple of arguments or a dict of keyword arguments, "
                        f"got {type(batch).__name__}; leave labels out"
                    )
    finally:
        for handle in handles:
            handle.remove()
    if not batches:
        raise ValueError(f"{where}: data must hold at least one batch, got none; a generator is spent after one pass")
    return {name: ActivationDensity(nonzeros[name], totals[name]) for name in layers}
