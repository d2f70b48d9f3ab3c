"""Parameters, bytes and multiply-accumulates of every layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from tersetorch.methods.modes import evaluating
from tersetorch.nn import CodebookEmbedding
from tersetorch.nn.fixed_module import FixedPointModule
from tersetorch.nn.shared_module import SharedModule, SharedProduct
from tersetorch.nn.sign_module import SignModule

# What has a matrix of parameters and multiplies by none of it.
_LOOKUPS = (nn.Embedding, nn.EmbeddingBag, CodebookEmbedding)


@dataclass(frozen=True)
class LayerCount:
    """What one module holds, and what it did with the example inputs.

    Attributes:
        name: its path in the model, "" for the model itself.
        kind: its class.
        calls: how often it ran.
        parameters: values of its weight and bias, zeros included, in whichever format they are kept; a parameter that
            several modules share counts at the first.
        nonzeros: those that are not zero, or that a sparse format stores; all of them on device meta.
        bytes: its parameters and buffers as they are in memory.
        macs: multiply-accumulates of the dense layer.
        effective_macs: those whose weight is not zero.
    """

    name: str
    kind: str
    calls: int
    parameters: int
    nonzeros: int
    bytes: int
    macs: int
    effective_macs: int

    @property
    def effective(self) -> float:
        """The part of macs that is left when zero weights are passed over; 1.0 where there are none."""
        return self.effective_macs / self.macs if self.macs else 1.0


@dataclass(frozen=True)
class ModelCount:
    """The counts of a model.

    Attributes:
        layers: every module that holds parameters or buffers, in the model's order.
        uncounted: paths of modules whose products are not in macs: recurrent layers, attention, a module of your own
            that multiplies by its parameters itself.
    """

    layers: tuple[LayerCount, ...]
    uncounted: tuple[str, ...]

    @property
    def parameters(self) -> int:
        """Sum of the layers'."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def nonzeros(self) -> int:
        """Sum of the layers'."""
        return sum(layer.nonzeros for layer in self.layers)

    @property
    def bytes(self) -> int:
        """Sum of the layers'."""
        return sum(layer.bytes for layer in self.layers)

    @property
    def macs(self) -> int:
        """Sum of the layers'."""
        return sum(layer.macs for layer in self.layers)

    @property
    def effective_macs(self) -> int:
        """Sum of the layers'."""
        return sum(layer.effective_macs for layer in self.layers)

    @property
    def effective(self) -> float:
        """The part of macs that is left when zero weights are passed over; 1.0 where there are none."""
        return self.effective_macs / self.macs if self.macs else 1.0


def count(model: nn.Module, example_inputs: Tensor | tuple[Any, ...] | Mapping[str, Any]) -> ModelCount:
    """Counts model by running it once, in evaluation mode and without gradients, on the example inputs.

    A linear or convolutional layer takes positions x (weights of the layer) multiply-accumulates, effectively
    positions x (non-zero weights): positions are the rows of a linear layer's input, the output pixels of a
    convolution, the input pixels of a transposed one, over the whole batch. Padding counts as input, biases,
    normalisation, activations and pooling count nothing, as in the papers' tables; give a batch of one to compare with
    those. Sparse layers, layers of codes, signs or steps and layers that are being pruned or shared count by the weight
    they compute with; an embedding multiplies nothing.

    Args:
        model: on any device; on meta, with inputs there, nothing is computed and no memory taken.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments.

    Returns:
        Counts of every module that holds a parameter or a buffer. model is left as it was.

    Raises:
        TypeError: model is no nn.Module, or example_inputs is none of the three.
        ValueError: model still has lazy parameters, whose number is not known.

    Source:
        Han et al., Learning both weights and connections (2015), tables 3 to 5: weights and FLOP that are left.
    """
    args, kwargs = _arguments(model, example_inputs)
    modules = list(_own_modules(model))
    sizes = {module: _weight_size(module) for _, module in modules if multiplies(module)}
    calls, positions = _run(model, sizes, args, kwargs)
    seen: set[int] = set()
    layers = []
    for name, module in modules:
        # Codes stand for parameters, looked up ones too.
        own = _weight_size(module) if isinstance(module, SharedModule) else sizes.get(module)
        parameters, nonzeros, held = _holds(module, own, seen)
        size, left = sizes.get(module, (0, 0))
        if held or parameters or module in sizes:
            here = positions.get(module, 0)
            ran = calls.get(module, 0)
            kind = nn.utils.parametrize.type_before_parametrizations(module).__name__
            layers.append(LayerCount(name, kind, ran, parameters, nonzeros, held, here * size, here * left))
    uncounted = tuple(name for name, module in modules if module not in sizes and _hides_products(module))
    return ModelCount(tuple(layers), uncounted)


def _arguments(model: nn.Module, example_inputs: object) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"count: model must be a torch.nn.Module, got {type(model).__name__}; pass a network")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            raise ValueError(f"count: model must know its shapes, got lazy {name}; run it once on an input")
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, tuple):
        return example_inputs, {}
    if isinstance(example_inputs, Mapping) and all(isinstance(key, str) for key in example_inputs):
        return (), dict(example_inputs)
    raise TypeError(
        "count: example_inputs must be a tensor, a tuple of arguments or a dict of keyword arguments, "
        f"got {type(example_inputs).__name__}; wrap a single argument in a tuple"
    )


def _own_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module once, parametrizations apart: they belong to the layer whose weight they make."""
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module not in inside:
            yield name, module
            if nn.utils.parametrize.is_parametrized(module):
                inside |= set(module.parametrizations.modules())


def multiplies(module: nn.Module) -> bool:
    """Whether module is a linear or convolutional layer, one of ours too."""
    ours = isinstance(module, FixedPointModule | SharedProduct | SignModule) or hasattr(type(module), "sparse_weight")
    return ours or isinstance(module, nn.Linear | _ConvNd)


def _weight_size(module: nn.Module) -> tuple[int, int]:
    """Values of the dense weight, and those that are not zero or are stored."""
    if hasattr(type(module), "sparse_weight"):
        sparse: Any = module.sparse_weight
        return prod(sparse.shape), sparse.nnz
    if isinstance(module, SignModule):
        return module.weight_shape.numel(), module.weight_shape.numel()
    if isinstance(module, SharedModule) and module.codes.is_meta:
        size = prod(module.shared_weight.shape)
        return size, size
    weight: Any = module.weight
    return weight.numel(), _nonzeros(weight)


def _nonzeros(tensor: Tensor) -> int:
    return tensor.numel() if tensor.is_meta else int(torch.count_nonzero(tensor.detach()))


def _holds(module: nn.Module, weight: tuple[int, int] | None, seen: set[int]) -> tuple[int, int, int]:
    """Parameters, non-zeros and bytes of module that no earlier one had; weight are the sizes of a layer's weight."""
    # A layer also holds what its parametrizations keep; other children stand for themselves.
    whole = nn.utils.parametrize.is_parametrized(module)
    parameters = {id(tensor): tensor for tensor in module.parameters(recurse=whole) if id(tensor) not in seen}
    buffers = {id(tensor): tensor for tensor in module.buffers(recurse=whole) if id(tensor) not in seen}
    seen |= parameters.keys() | buffers.keys()
    held = sum(tensor.nbytes for tensor in (parameters | buffers).values())
    total = left = 0
    if weight is not None:
        bias = getattr(module, "bias", None)
        if isinstance(bias, Tensor) and parameters.pop(id(bias), None) is not None:
            total, left = bias.numel(), _nonzeros(bias)
        if parameters or buffers:  # a format without gradients is all buffers
            total, left = total + weight[0], left + weight[1]
        return total, left, held
    total = sum(tensor.numel() for tensor in parameters.values())
    return total, sum(_nonzeros(tensor) for tensor in parameters.values()), held


def _hides_products(module: nn.Module) -> bool:
    return not isinstance(module, _LOOKUPS) and any(tensor.ndim >= 2 for tensor in module.parameters(recurse=False))


def _run(
    model: nn.Module, layers: Mapping[nn.Module, object], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[dict[nn.Module, int], dict[nn.Module, int]]:
    """Calls and positions of each of layers when model runs."""
    calls: dict[nn.Module, int] = {}
    positions: dict[nn.Module, int] = {}

    def record(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> None:
        calls[module] = calls.get(module, 0) + 1
        seen, channels = output, getattr(module, "out_features", None) or getattr(module, "out_channels", 0)
        if isinstance(module, _ConvTransposeNd):
            seen, channels = inputs[0] if inputs else next(iter(named.values())), module.in_channels
        if isinstance(module, SignModule) and module.thresholds is not None:
            channels = output.shape[-1]  # words of packed signs
        positions[module] = positions.get(module, 0) + (seen.numel() // channels if channels else 0)

    handles = [module.register_forward_hook(record, with_kwargs=True) for module in layers]
    try:
        with torch.no_grad(), evaluating(model):
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return calls, positions
