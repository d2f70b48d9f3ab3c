"""What lies between a product of signs and the next sign, as one integer for each row.

The product is an integer, dot, between -n and n. What follows is evaluated by its own modules, as torch computes it,
and its sign is read off. Each of their operations is a rounding of a function that rises or falls, and so rises or
falls itself: a binary search finds the integer where the sign changes, and thresholds make the decision that the float
modules make of the same product, to the last tie. A batch norm's 0, of either sign, is +1. What the thresholds say of
sums that float arithmetic has to round is another matter: a scale for each row, or a bias, makes the dense layer's
result depend on the order of its sum by some units in the last place, where BinaryLinear's is one rounding of the exact
number. A decision can only differ where the batch norm of the two lies on both sides of 0.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tersetorch.methods.binarize import ShiftBatchNorm1d, ShiftBatchNorm2d
from tersetorch.nn import BinaryConv2d, BinaryLinear
from tersetorch.nn.sign_module import PIXELS

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, ShiftBatchNorm1d, ShiftBatchNorm2d)
# Modules that keep the order of numbers, or reverse it, in each row by itself.
MONOTONE = (*BATCH_NORMS, nn.Hardtanh, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d)
ALWAYS, NEVER = torch.iinfo(torch.int32).min, torch.iinfo(torch.int32).max
# Numbers of a row that float32 tells apart.
MAX_PRODUCTS = 1 << 24


class UnfoldableError(Exception):
    """Modules that no threshold stands for; the message says why."""


@dataclass(frozen=True)
class Thresholds:
    """The sign of row r is +1 where dot >= values[r], of a weight whose negated rows have the other signs.

    Attributes:
        values: int32 [rows]; ALWAYS and NEVER for rows that always or never are +1.
        negated: bool [rows].
        flipped: bool [rows], rows whose signs are the other ones once they have been pooled.
    """

    values: Tensor
    negated: Tensor
    flipped: Tensor


@torch.no_grad()
def thresholds_of(
    layer: BinaryLinear | BinaryConv2d,
    before: Sequence[nn.Module],
    after: Sequence[nn.Module] = (),
    pooled: bool = False,
) -> Thresholds:
    """Thresholds for what layer returns, run through before, a max-pool where there is one, after, and a sign.

    A maximum over positions is one over their signs where what follows it rises: max(sign) = sign(max). Where it falls,
    as a batch norm with a negative weight does, the sign behind the pool is the smallest of the positions', so that the
    largest of the other signs is taken and turned round behind the pool. Without a pool a falling row is one whose
    weight is negated.

    Raises:
        UnfoldableError: a batch norm has no statistics of its own or gives NaN, or sizes do not fit.
    """
    weight = layer.sign_weight
    rows, terms = weight.shape
    scale, bias = layer.scale, layer.bias
    if layer.inputs != "signs":
        terms, scale = terms * PIXELS, layer.unit_scale()
    if terms >= MAX_PRODUCTS:
        raise UnfoldableError(f"it adds up {terms} products, which float32 does not count exactly")
    convolves = isinstance(layer, BinaryConv2d)
    dtype = _dtype((*before, *after))
    chain = [[in_evaluation(module, rows, convolves) for module in part] for part in (before, after)]
    step = steps(layer)

    def after_layer(places: Tensor) -> tuple[Tensor, Tensor]:
        """What before returns, and the sign behind all of it, for one sum of each row, counted from -terms in steps."""
        y = scaled(step * places - terms, scale, bias).to(dtype)[None]
        y = y[..., None, None] if convolves else y
        for module in chain[0]:
            y = module(y)
        inner = y.reshape(rows)
        for module in chain[1]:
            y = module(y)
        y = y.reshape(rows)
        if bool(y.isnan().any()) or bool(inner.isnan().any()):
            raise UnfoldableError("what follows it gives NaN")
        return inner, y >= 0

    last = 2 * terms // step
    low = torch.zeros(rows, dtype=torch.int64)
    high = low + last
    (inner_low, at_low), (inner_high, at_high) = after_layer(low), after_layer(high)
    level = at_low == at_high
    # What stands behind the pool falls where all of it and what stands before it go opposite ways.
    flipped = torch.zeros_like(level)
    if pooled:
        flipped = ~level & ((inner_low < inner_high) != at_high)
    # Between low, whose sign is that of the least sum, and high, whose sign is that of the largest.
    for _ in range(last.bit_length()):
        middle = (low + high) // 2
        same = after_layer(middle)[1] == at_low
        low, high = torch.where(same, middle, low), torch.where(same, high, middle)
    rises = at_high ^ flipped
    # The least sum that is +1, or, where +1 comes with small sums, minus the largest of these.
    values = torch.where(rises, step * high - terms, terms - step * low)
    values = torch.where(level, torch.where(at_low, ALWAYS, NEVER), values).to(torch.int32)
    return Thresholds(values, ~rises & ~level, flipped)


def steps(layer: BinaryLinear | BinaryConv2d) -> int:
    """How far the sums of a layer lie apart."""
    # Every product is +1 or -1, so that sums go in steps of 2, but where a border leaves some of them out.
    borders = isinstance(layer, BinaryConv2d) and layer.padding_value == 0 and any(layer._padding)
    return 1 if borders or layer.inputs == "pixels" else 2


def scaled(dots: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """fma(dot, scale, bias) as the kernels round it: float32 of dots' shape [..., rows]."""
    # A product of two float32 is exact in float64. A sum that is not is set to the odd one of its two neighbours, whose
    # rounding to float32 is that of the exact sum (Boldo and Melquiond, Emulation of FMA and correctly rounded sums,
    # IEEE Transactions on Computers 2008).
    product = dots.double() if scale is None else dots.double() * scale.cpu().double()
    if bias is None:
        return product.float()
    added = bias.cpu().double().expand_as(product)
    total = product + added
    shadow = total - product
    error = (product - (total - shadow)) + (added - shadow)
    words = total.view(torch.int64)
    step = torch.where((error > 0) == (total > 0), 1, -1)
    odd = torch.where((error != 0) & (words % 2 == 0), words + step, words)
    return odd.view(torch.float64).float()


def in_evaluation(module: nn.Module, rows: int, convolves: bool) -> nn.Module:
    """A copy of module as it computes in evaluation.

    Raises:
        UnfoldableError: it is a batch norm without statistics, or of something else than a layer's rows.
    """
    if isinstance(module, BATCH_NORMS):
        if module.running_mean is None or module.running_var is None:
            raise UnfoldableError(f"its {type(module).__name__} takes the statistics of each batch")
        if module.num_features != rows or isinstance(module, nn.BatchNorm2d | ShiftBatchNorm2d) != convolves:
            raise UnfoldableError(f"its {type(module).__name__} normalises something else than its {rows} rows")
    copied: nn.Module = copy.deepcopy(module).cpu().eval()
    return copied


def _dtype(modules: Sequence[nn.Module]) -> torch.dtype:
    """What the modules are given: their own dtype, or float32."""
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                if tensor.dtype not in (torch.float32, torch.bfloat16):
                    raise UnfoldableError(f"its {type(module).__name__} is {tensor.dtype}")
                return tensor.dtype
    return torch.float32
