"""The dense forms a candidate has to beat: the strongest of them decides."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from tersetorch.conversion.timing import Run
from tersetorch.nn import FlattenedConv2d

Call = tuple[int, Tensor]
# Layers that may be faster in channels_last.
CONVOLUTIONS = (nn.Conv2d, FlattenedConv2d)


def run_of(layers: list[nn.Module], calls: list[Call]) -> Run:
    """Runs every call, (index of the layer, its input), one after another."""

    def run() -> None:
        for index, x in calls:
            layers[index](x)

    return run


def dense_forms(modules: list[nn.Module], calls: list[Call]) -> dict[str, Run]:
    """The layer as it is, and the stronger forms that a user could give it.

    For linear layers, where this CPU's oneDNN takes it, the weight reordered once, which torch.compile with freezing
    uses; for two-dimensional convolutions weight and input in channels_last.
    """
    forms = {"dense": run_of(modules, calls)}
    if all(isinstance(module, CONVOLUTIONS) for module in modules):
        forms["dense channels_last"] = run_of(
            [in_channels_last(module) for module in modules], [(index, last_channels(x)) for index, x in calls]
        )
    packed = _packed(modules, calls)
    if packed is not None:
        forms["dense packed"] = packed
    return forms


def in_channels_last(module: nn.Module) -> nn.Module:
    """A copy of a module with its four-dimensional weights in channels_last."""
    copied: Any = copy.deepcopy(module)
    moved: nn.Module = copied.to(memory_format=torch.channels_last)
    return moved


def last_channels(x: Tensor) -> Tensor:
    """A tensor in channels_last, where it has the four dimensions for it."""
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def _packed(modules: list[nn.Module], calls: list[Call]) -> Run | None:
    weights = [module.weight.detach() for module in modules if isinstance(module, nn.Linear)]
    if len(weights) < len(modules) or not torch.backends.mkldnn.is_available():
        return None
    biases = [module.bias.detach() if isinstance(module.bias, Tensor) else None for module in modules]
    multiply, reorder = torch.ops.mkldnn._linear_pointwise, torch.ops.mkldnn._reorder_linear_weight
    try:
        packed: dict[tuple[int, int], Tensor] = {}
        prepared = []
        for index, x in calls:
            rows = x.numel() // max(1, x.shape[-1])
            # The best layout depends on the number of rows; tied layers share one.
            key = (weights[index].data_ptr(), rows)
            if key not in packed:
                packed[key] = reorder(weights[index], rows)
            prepared.append((x, packed[key], biases[index]))
            multiply(x, packed[key], biases[index], "none", [], "")
    except RuntimeError:
        # oneDNN says so where this CPU lacks the instructions for the dtype.
        return None

    def run() -> None:
        for x, weight, bias in prepared:
            multiply(x, weight, bias, "none", [], "")

    return run
