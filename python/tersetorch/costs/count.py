"""Parameters, bytes and multiply-accumulates of every layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from tersetorch.costs import flattened
from tersetorch.costs.runs import LayerRun, arguments, run
from tersetorch.nn import CodebookEmbedding, FlattenedConv2d
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
        macs: multiply-accumulates of the dense layer; of a flattened one those of its 1-D filters.
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
    those. A flattened convolution counts each of its 1-D filters where that is applied. Sparse layers, layers of codes,
    signs or steps and layers that are being pruned or shared count by the weight they compute with; an embedding
    multiplies nothing.

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
    args, kwargs = arguments("count", model, example_inputs)
    modules = list(own_modules(model))
    sizes = {module: weight_size(module) for _, module in modules if multiplies(module)}
    runs = run(model, sizes, args, kwargs)
    seen: set[int] = set()
    layers = []
    for name, module in modules:
        # Codes stand for parameters, looked up ones too.
        own = weight_size(module) if isinstance(module, SharedModule) else sizes.get(module)
        if isinstance(module, FlattenedConv2d):
            own = None  # its parameters are what it multiplies by
        parameters, nonzeros, held = _holds(module, own, seen)
        size, left = sizes.get(module, (0, 0))
        if held or parameters or module in sizes:
            ran = runs.get(module, LayerRun())
            macs, effective = ran.positions * size, ran.positions * left
            if isinstance(module, FlattenedConv2d):
                macs, effective = flattened.products(module, ran.shapes)
            layers.append(LayerCount(name, kind_of(module), ran.calls, parameters, nonzeros, held, macs, effective))
    uncounted = tuple(name for name, module in modules if module not in sizes and hides_products(module))
    return ModelCount(tuple(layers), uncounted)


def own_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module once, parametrizations apart: they belong to the layer whose weight they make."""
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module not in inside:
            yield name, module
            if nn.utils.parametrize.is_parametrized(module):
                inside |= set(module.parametrizations.modules())


def kind_of(module: nn.Module) -> str:
    """The name of module's class, as it was before parametrizations."""
    kind: str = nn.utils.parametrize.type_before_parametrizations(module).__name__
    return kind


def multiplies(module: nn.Module) -> bool:
    """Whether module is a linear or convolutional layer, one of ours too."""
    ours = isinstance(module, FixedPointModule | SharedProduct | SignModule) or hasattr(type(module), "sparse_weight")
    return ours or isinstance(module, FlattenedConv2d | nn.Linear | _ConvNd)


def weight_size(module: nn.Module) -> tuple[int, int]:
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


def hides_products(module: nn.Module) -> bool:
    """Whether module may multiply by parameters of its own without being a layer that is counted."""
    return not isinstance(module, _LOOKUPS) and any(tensor.ndim >= 2 for tensor in module.parameters(recurse=False))
