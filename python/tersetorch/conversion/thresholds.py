"""What lies between a product of signs and the next sign, as one integer for each row.

The product is an integer, dot, between -n and n. What follows is evaluated by its own modules, as torch computes it, at
every integer that can occur, and its sign is read off: so thresholds make the decision that the float modules make of
the same product, to the last tie. A batch norm's 0, of either sign, is +1. What the thresholds say of sums that float
arithmetic has to round is another matter: a scale for each row, or a bias, makes the dense layer's result depend on the
order of its sum by some units in the last place, where BinaryLinear's is one rounding of the exact number. A decision
can only differ where the batch norm of the two lies on both sides of 0.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tersetorch.methods.binarize import ShiftBatchNorm1d, ShiftBatchNorm2d
from tersetorch.nn import BinaryConv2d, BinaryLinear

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, ShiftBatchNorm1d, ShiftBatchNorm2d)
# Modules that keep the order of numbers, or reverse it, in each row by itself.
MONOTONE = (*BATCH_NORMS, nn.Hardtanh, nn.Tanh, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d)
ALWAYS, NEVER = torch.iinfo(torch.int32).min, torch.iinfo(torch.int32).max
# Numbers of a row that float32 tells apart.
MAX_PRODUCTS = 1 << 24
# Numbers evaluated at once.
CELLS = 1 << 22


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
    if terms >= MAX_PRODUCTS:
        raise UnfoldableError(f"it adds up {terms} products, which float32 does not count exactly")
    convolves = isinstance(layer, BinaryConv2d)
    dtype = _dtype((*before, *after))
    chain = [[_in_evaluation(module, rows, convolves) for module in part] for part in (before, after)]
    # Every product is +1 or -1, so that sums go in steps of 2, but where a border leaves some of them out.
    borders = isinstance(layer, BinaryConv2d) and layer.padding_value == 0 and any(layer._padding)
    dots = torch.arange(-terms, terms + 1, 1 if borders else 2, dtype=torch.int32)
    count = torch.zeros(rows, dtype=torch.int64)
    inner, outer = _Direction(rows), _Direction(rows)
    for part in dots.split(max(2, CELLS // max(1, rows))):
        y = _scaled(part, layer.scale, layer.bias, rows).to(dtype)
        y = y[..., None, None] if convolves else y
        for module in chain[0]:
            y = module(y)
        inner.see(y.reshape(len(part), rows))
        for module in chain[1]:
            y = module(y)
        y = y.reshape(len(part), rows)
        if bool(y.isnan().any()):
            raise UnfoldableError("what follows it gives NaN")
        positive = y >= 0
        outer.see(positive)
        count += positive.sum(0)
    if not bool((outer.rises | outer.falls).all()) or (pooled and not bool((inner.rises | inner.falls).all())):
        raise UnfoldableError("what follows it neither rises nor falls with its sums")
    # What stands behind the pool falls where all of it and what stands before it go opposite ways.
    level = outer.rises & outer.falls
    flipped = ~level & (inner.rises & ~outer.rises | inner.falls & ~inner.rises & outer.rises)
    if not pooled:
        flipped = torch.zeros_like(flipped)
    rises = torch.where(flipped, outer.falls, outer.rises)
    count = torch.where(flipped, len(dots) - count, count)
    # The least sum that is +1, or, where +1 comes with small sums, minus the largest of these.
    place = torch.where(rises, len(dots) - count, count - 1)
    values = dots[place.clamp(0, max(0, len(dots) - 1))]
    values = torch.where(rises, values, -values)
    values = torch.where(count == len(dots), ALWAYS, torch.where(count == 0, NEVER, values)).to(torch.int32)
    return Thresholds(values, ~rises & (count != 0) & (count != len(dots)), flipped)


class _Direction:
    """Whether each column rises or falls, from parts of its rows in order; a level one does both."""

    def __init__(self, columns: int) -> None:
        self.rises = self.falls = torch.ones(columns, dtype=torch.bool)
        self._last: Tensor | None = None

    def see(self, part: Tensor) -> None:
        whole = part if self._last is None else torch.cat([self._last, part])
        self.rises = self.rises & (whole[1:] >= whole[:-1]).all(0)
        self.falls = self.falls & (whole[1:] <= whole[:-1]).all(0)
        self._last = part[-1:]


def _scaled(dots: Tensor, scale: Tensor | None, bias: Tensor | None, rows: int) -> Tensor:
    """fma(dot, scale, bias) as the kernels round it: float32 [dots, rows]."""
    # A product of two float32 is exact in float64. A sum that is not is set to the odd one of its two neighbours, whose
    # rounding to float32 is that of the exact sum (Boldo and Melquiond, Emulation of FMA and correctly rounded sums,
    # IEEE Transactions on Computers 2008).
    product = dots.double()[:, None] * (torch.ones(rows) if scale is None else scale.cpu()).double()
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


def _in_evaluation(module: nn.Module, rows: int, convolves: bool) -> nn.Module:
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
