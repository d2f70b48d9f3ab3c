"""What layers are handed and give when a model runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from tersetorch.costs import flattened
from tersetorch.methods.modes import evaluating
from tersetorch.nn import FlattenedConv2d
from tersetorch.nn.sign_module import SignModule


@dataclass
class LayerRun:
    """What one module did in one run of its model, all calls together.

    Attributes:
        calls: how often it ran.
        positions: rows of a linear layer's input, output pixels of a convolution, input pixels of a transposed one.
        moved: bytes of the tensors that each call was handed and gave, step by step where there are several.
        written: bytes of those that it gave.
        numbers: values of these.
        shapes: of the first tensor that each call was handed.
    """

    calls: int = 0
    positions: int = 0
    moved: list[int] = field(default_factory=list)
    written: int = 0
    numbers: int = 0
    shapes: list[torch.Size] = field(default_factory=list)


def arguments(where: str, model: nn.Module, example_inputs: object) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and keyword arguments that example_inputs stand for, with model checked."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{where}: model must be a torch.nn.Module, got {type(model).__name__}; pass a network")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            raise ValueError(f"{where}: model must know its shapes, got lazy {name}; run it once on an input")
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, tuple):
        return example_inputs, {}
    if isinstance(example_inputs, Mapping) and all(isinstance(key, str) for key in example_inputs):
        return (), dict(example_inputs)
    raise TypeError(
        f"{where}: example_inputs must be a tensor, a tuple of arguments or a dict of keyword arguments, "
        f"got {type(example_inputs).__name__}; wrap a single argument in a tuple"
    )


def run(
    model: nn.Module, layers: Iterable[nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[nn.Module, LayerRun]:
    """Runs model once, in evaluation mode and without gradients; what each of layers did, for those that ran."""
    runs: dict[nn.Module, LayerRun] = {}

    def record(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: object) -> None:
        here = runs.setdefault(module, LayerRun())
        read, written = _tensors((*inputs, *named.values())), _tensors((output,))
        here.calls += 1
        here.positions += _positions(module, read, written)
        here.shapes += [tensor.shape for tensor in read[:1]]
        taken, given = (sum(tensor.nbytes for tensor in tensors) for tensors in (read, written))
        if isinstance(module, FlattenedConv2d):
            here.moved += flattened.moved(module, taken, given, read[0].shape)
        else:
            here.moved.append(taken + given)
        here.written += given
        here.numbers += sum(tensor.numel() for tensor in written)

    handles = [module.register_forward_hook(record, with_kwargs=True) for module in layers]
    try:
        with torch.no_grad(), evaluating(model):
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return runs


def _tensors(values: Iterable[object]) -> list[Tensor]:
    return [value for value in values if isinstance(value, Tensor)]


def _positions(module: nn.Module, read: list[Tensor], written: list[Tensor]) -> int:
    seen, channels = written[:1], getattr(module, "out_features", None) or getattr(module, "out_channels", 0)
    if isinstance(module, _ConvTransposeNd):
        seen, channels = read[:1], module.in_channels
    if isinstance(module, SignModule) and module.thresholds is not None and seen:
        channels = seen[0].shape[-1]  # words of packed signs
    return seen[0].numel() // channels if channels and seen else 0
