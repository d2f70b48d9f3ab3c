"""The dense forms a candidate has to beat: the strongest of them decides."""

import torch
from torch import Tensor, nn

from tersetorch.conversion.timing import Run

Call = tuple[int, Tensor]


def run_of(layers: list[nn.Module], calls: list[Call]) -> Run:
    """Runs every call, (index of the layer, its input), one after another."""

    def run() -> None:
        for index, x in calls:
            layers[index](x)

    return run


def dense_forms(modules: list[nn.Module], calls: list[Call]) -> dict[str, Run]:
    """The layer as it is and, where this CPU's oneDNN takes it, with its weight reordered once.

    The second is what torch.compile with freezing uses for a linear layer.
    """
    forms = {"dense": run_of(modules, calls)}
    packed = _packed(modules, calls)
    if packed is not None:
        forms["dense packed"] = packed
    return forms


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
