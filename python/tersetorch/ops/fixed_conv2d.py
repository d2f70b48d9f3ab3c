"""Convolution of whole numbers in fixed point: exact sums, one conversion for each dot product."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from tersetorch.ops._images import Pair, conv_sizes, empty_images, pair_of
from tersetorch.ops.fixed_matmul import check_product, check_whole, fixed_pack
from tersetorch.ops.fixed_round import check_int

PANEL = 16
_fixed_conv2d = torch.ops.tersetorch.fixed_conv2d.default


def fixed_conv2d_groups(out_channels: int, groups: int) -> int:
    """The groups that fixed_conv2d_pack makes of so many groups of filters."""
    if groups == 1:
        return 1
    most = max(1, PANEL * groups // max(1, out_channels))
    return groups // max(n for n in range(1, most + 1) if groups % n == 0)


def fixed_conv2d_pack(weight: Tensor, dilation: Pair = 1, groups: int = 1) -> tuple[Tensor, int]:
    """Returns filters in the order in which fixed_conv2d reads them, and the groups that it takes with them.

    Groups of few filters are put together, up to 16 filters, with weights of 0 between them: a panel has 16 rows.

    Args:
        weight: int8 or int16 [O, C / groups, kernel height, kernel width].
        dilation: steps between taps, a number or two.
        groups: divides O.

    Returns:
        What fixed_pack returns for the filters of a group, whose channels of a tap lie together, one group after the
        other; and the number of these groups.

    Raises:
        TypeError: weight is no tensor, or neither int8 nor int16.
        ValueError: weight has other dimensions, or groups do not divide O.
    """
    op = "fixed_conv2d_pack"
    check_whole(op, "weight", weight)
    if weight.dim() != 4 or groups < 1 or weight.shape[0] % groups:
        raise ValueError(
            f"{op}: weight must be [O, C / groups, height, width], with O a multiple of groups, got shape "
            f"{tuple(weight.shape)} and {groups} groups; pass the weight and the groups of the layer"
        )
    rows, (channels, high, wide) = weight.shape[0] // groups, weight.shape[1:]
    together = groups // fixed_conv2d_groups(weight.shape[0], groups)
    groups //= together
    each = weight.permute(0, 2, 3, 1).reshape(groups, together, rows, high * wide, channels)
    whole = each.new_zeros(groups, together, rows, high * wide, together, channels)
    for i in range(together):
        whole[:, i, :, :, i] = each[:, i]
    segments = high if groups == 1 and pair_of(op, "dilation", dilation, 1)[1] == 1 else high * wide
    parts = whole.view(groups, together * rows, high * wide * together * channels)
    return torch.cat([fixed_pack(part, segments) for part in parts]), groups


def fixed_conv2d(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None = None,
    *,
    out_channels: int,
    kernel_size: Pair,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    sum_fraction_bits: int,
    integer_bits: int,
    fraction_bits: int,
    dtype: torch.dtype | None = None,
    relu: bool = False,
) -> Tensor:
    """Returns conv2d(x, W) + bias of whole numbers, exactly, each sum then rounded once to the nearest of <IL,FL>.

    Numbers, bias and conversion are those of fixed_matmul; windows are read where they lie, in an image whose channels
    of a pixel lie together.

    Args:
        x: int8 or int16 [N, C, H, W], contiguous or channels_last.
        packed: what fixed_conv2d_pack returns for W: int16 where x is.
        bias: int64 [out_channels], or None for 0.
        out_channels: filters of W.
        kernel_size: a number, or one for the height and one for the width; so are the next three.
        stride: steps between outputs.
        padding: zeros on both sides.
        dilation: steps between taps, those W was packed with.
        groups: what fixed_conv2d_pack returned.
        sum_fraction_bits: fraction bits of x and of W together, from 0 to 30.
        integer_bits: IL of the result.
        fraction_bits: FL of the result.
        dtype: as fixed_matmul takes it.
        relu: whether negative results become 0.

    Returns:
        [N, out_channels, H', W'] of dtype in the memory format of x, without gradients.

    Raises:
        TypeError: an argument is no tensor, or has another dtype than named here, or a size is no number.
        ValueError: shapes, sizes or devices do not fit each other, or there is no such format or dtype.

    Source:
        Gupta et al., Deep Learning with Limited Numerical Precision (2015), section 3.2.
    """
    op = "fixed_conv2d"
    check_whole(op, "x", x)
    if x.dim() != 4:
        raise ValueError(f"{op}: x must be [N, C, H, W], got shape {tuple(x.shape)}; reshape it")
    check_int(op, "out_channels", out_channels)
    check_int(op, "groups", groups)
    sizes = conv_sizes(op, x.shape, out_channels, kernel_size, stride, padding, dilation, groups)
    (high, wide), _, _, (_, gap), _ = sizes
    parts = high if groups == 1 and gap == 1 else high * wide
    part = x.shape[1] // groups * high * wide // parts
    bits = sum_fraction_bits, integer_bits, fraction_bits
    dtype = check_product(op, x, packed, bias, out_channels, groups, parts, part, *bits, dtype, relu)
    return cast(Tensor, _fixed_conv2d(x, packed, bias, out_channels, *sizes, *bits, dtype, relu))


@torch.library.register_fake("tersetorch::fixed_conv2d")
def _fake(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    rows: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    sum_fraction_bits: int,
    integer_bits: int,
    fraction_bits: int,
    dtype: torch.dtype,
    relu: bool = False,
) -> Tensor:
    return empty_images(x, rows, kernel_size, stride, padding, dilation, dtype)
