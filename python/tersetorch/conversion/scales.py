"""A batch norm behind a product of signs, as the product's own scale and bias, where that changes no bit.

In evaluation a batch norm is x * a + b with a number a and b for each channel, and torch rounds it once where the
processor has fused multiplication and addition. The product is an integer, dot, between -n and n: every one of them is
tried, so that what is folded is equal for all inputs, not only for those that were seen.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from tersetorch.conversion.thresholds import UnfoldableError, in_evaluation, scaled, steps
from tersetorch.nn import BinaryConv2d, BinaryLinear

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
# Sums of all rows; there are more of them only where images go on, which rarely ends a chain.
MAX_SUMS = 1 << 23
# Of them, how many are tried at once: they stay in a cache.
NUMBERS = 1 << 15


@torch.no_grad()
def scale_of(layer: BinaryLinear | BinaryConv2d, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Scale and bias, float32 [rows], that make layer return what norm makes of its floats, to the bit.

    Raises:
        UnfoldableError: a sum would be rounded in another way, there are too many of them, or the sizes or dtypes do
            not fit.
    """
    rows, terms = layer.sign_weight.shape
    batch_norm = in_evaluation(norm, rows, isinstance(layer, BinaryConv2d))
    assert isinstance(batch_norm, NORMS)
    mean, variance = batch_norm.running_mean, batch_norm.running_var
    assert mean is not None and variance is not None
    if layer.inputs != "signs" or layer.dtype != torch.float32 or mean.dtype != torch.float32:
        raise UnfoldableError("its numbers are rounded before")
    step = steps(layer)
    if rows * (2 * terms // step + 1) > MAX_SUMS:
        raise UnfoldableError(f"it has more than {MAX_SUMS} sums to try")
    zeros = torch.zeros(rows)
    # The slope as torch rounds it.
    slope = functional.batch_norm(torch.ones(1, rows), zeros, variance, batch_norm.weight, eps=batch_norm.eps)[0]
    shift = scaled(mean, -slope, zeros if batch_norm.bias is None else batch_norm.bias)
    if layer.bias is not None:
        shift = scaled(layer.bias.cpu(), slope, shift)
    scale = slope if layer.scale is None else slope * layer.scale.cpu()
    sums, others = torch.arange(-terms, terms + 1, step), 0
    for some in sums.split(max(1, NUMBERS // max(1, rows))):
        dots = some[:, None].expand(-1, rows)
        y, folded = scaled(dots, layer.scale, layer.bias), scaled(dots, scale, shift)
        if isinstance(layer, BinaryLinear):
            others += int((batch_norm(y) != folded).sum())
        else:
            # Images come with their channels last, or each by itself.
            last = batch_norm(y[..., None, None])[..., 0, 0]
            first = batch_norm(y.T.contiguous()[None, :, None])[0, :, 0].T
            others += int(((last != folded) | (first != folded)).sum())
    if others:
        raise UnfoldableError(f"{others} of its {rows * len(sums)} sums would be rounded in another way")
    return scale, shift
