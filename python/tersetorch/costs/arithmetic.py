"""The operations of one layer, by kind."""

from __future__ import annotations

from collections import Counter
from math import prod
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from tersetorch.costs import flattened
from tersetorch.costs.count import weight_size
from tersetorch.costs.runs import LayerRun
from tersetorch.nn import FlattenedConv2d, ProductLinear, ResidualLinear
from tersetorch.nn.fixed_module import FixedPointModule
from tersetorch.nn.sign_module import SignModule

# Of what is multiplied: how, what it is added to, and the bits of an operand.
_PRODUCTS = {
    "int8": ("multiply int8", "add int32", 8),
    "float16": ("multiply float16", "add float32", 16),
    "bfloat16": ("multiply bfloat16", "add float32", 16),
    "float32": ("multiply float32", "add float32", 32),
    "float64": ("multiply float64", "add float64", 64),
}
NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def operations(module: nn.Module, run: LayerRun) -> tuple[Counter[str], int]:
    """What a layer does in a run: operations by the names of COEFFICIENTS, and the bits of their operands."""
    if isinstance(module, NORMS):
        return _of_norm(module, run)
    if isinstance(module, SignModule):
        return _of_signs(module, run)
    if isinstance(module, ProductLinear | ResidualLinear):
        return _of_products(module, run)
    if isinstance(module, FixedPointModule):
        return _of_steps(module, run)
    kind = _arithmetic(module)
    multiply, add, bits = _PRODUCTS[kind]
    if isinstance(module, FlattenedConv2d):
        macs, biases = flattened.products(module, run.shapes)[0], flattened.additions(module, run.shapes)
    else:
        macs = run.positions * weight_size(module)[1 if hasattr(type(module), "sparse_weight") else 0]
        biases = run.numbers if getattr(module, "bias", None) is not None else 0
    done = Counter({multiply: macs, add: macs})
    if kind == "int8":  # sums become float32 again
        done["multiply float32"] += run.numbers
    if biases:
        done["add float32" if kind in ("int8", "bfloat16") else f"add {kind}"] += biases
    return done, 2 * bits * macs


def _of_norm(module: nn.Module, run: LayerRun) -> tuple[Counter[str], int]:
    """A multiplication and an addition a number, by statistics that are kept; by its own, of these in three passes."""
    tensors = [*module.parameters(), *(t for t in module.buffers() if t.is_floating_point())]
    kind = _priced(tensors[0].dtype if tensors else torch.float32)
    if getattr(module, "running_mean", None) is not None:
        multiplies = adds = 1
    else:
        scaled, shifted = (getattr(module, name, None) is not None for name in ("weight", "bias"))
        # The mean; the difference from it and its square's mean; the scale. Without a mean the square's mean alone.
        multiplies, adds = 2 + scaled, 1 if isinstance(module, nn.RMSNorm) else 3 + shifted
    done = Counter({f"multiply {kind}": multiplies * run.numbers, f"add {kind}": adds * run.numbers})
    return done, 2 * _PRODUCTS[kind][2] * (multiplies + adds) * run.numbers


def name_of(dtype: torch.dtype) -> str:
    """The name of a dtype in COEFFICIENTS."""
    return str(dtype).removeprefix("torch.")


def _arithmetic(module: nn.Module) -> str:
    """What a layer multiplies: that of its layout, or its weight's dtype."""
    layout = getattr(module, "layout", "")
    for kind in ("int8", "bfloat16"):
        if isinstance(layout, str) and layout.endswith(kind):
            return kind
    if isinstance(module, FlattenedConv2d):
        return "float32" if layout == "fused" else _priced(module.get_parameter(module.weight_parameter).dtype)
    weight: Any = module.weight
    return _priced(weight.dtype)


def _priced(dtype: torch.dtype) -> str:
    """The name of a dtype that has products in COEFFICIENTS."""
    name = name_of(dtype)
    if name not in _PRODUCTS:
        raise ValueError(f"energy: layers must be of {', '.join(_PRODUCTS)}, got one of {name}; convert model")
    return name


def _of_signs(module: SignModule, run: LayerRun) -> tuple[Counter[str], int]:
    rows = module.weight_shape[0]
    macs, sums = run.positions * module.weight_shape.numel(), run.positions * rows
    if module.inputs == "signs":
        done, bits = Counter({"compare and count 1 bit": macs}), 2 * macs
    else:  # a sign adds or subtracts what it meets
        real = module.inputs == "real"
        done, bits = Counter({"add float32" if real else "add int32": macs}), (33 if real else 9) * macs
    if module.thresholds is not None:
        done["add int32"] += sums
    if module.scale is not None:
        done["multiply float32"] += sums
    if module.bias is not None:
        done["add float32"] += sums
    return done, bits


def _of_steps(module: FixedPointModule, run: LayerRun) -> tuple[Counter[str], int]:
    """Whole numbers, whose sum is rounded by an addition."""
    kind = name_of(module.steps.dtype)
    macs, add = run.positions * module.steps.numel(), "add int32" if kind == "int8" else "add int64"
    biased = module.bias is not None
    return Counter(
        {f"multiply {kind}": macs, add: macs + (1 + biased) * run.numbers}
    ), 16 * module.steps.itemsize * macs


def _of_products(module: ProductLinear | ResidualLinear, run: LayerRun) -> tuple[Counter[str], int]:
    """A table of the products of x with every codebook entry, then an addition a code; or plain, where that is less."""
    weight = module.shared_weight
    stages, _, width, entries = weight.codebooks.shape
    segments = -(-weight.columns // width)
    tables, codes = stages * segments * width * entries, weight.rows * stages * segments
    plain = prod(weight.shape)
    macs, adds = (tables, codes) if tables + codes < plain else (plain, 0)
    macs, adds = run.positions * macs, run.positions * adds
    done = Counter({"multiply float32": macs, "add float32": macs + adds})
    if module.bias is not None:
        done["add float32"] += run.numbers
    return done, 64 * macs + 32 * adds
