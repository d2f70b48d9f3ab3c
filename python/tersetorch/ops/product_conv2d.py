"""Convolution of images with a weight that is made of shared sub-vectors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from tersetorch.ops._autocast import enabled_for
from tersetorch.ops._images import Pair, conv_sizes
from tersetorch.ops.product_matmul import check_product, product_decode


def product_conv2d(
    x: Tensor,
    codes: Tensor,
    codebooks: Tensor,
    bias: Tensor | None = None,
    *,
    out_channels: int,
    kernel_size: Pair,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    relu: bool = False,
) -> Tensor:
    """Returns conv2d(x, W) + bias, at least 0 with relu, where row o of the weight that codes name is W[o] flattened.

    W[o, c, i, j] is column (c * kernel_size[0] + i) * kernel_size[1] + j of row o of product_decode. W is decoded for
    each call and multiplied by torch's own convolution: what is saved is memory, not time.

    Args:
        x: float32, bfloat16 or on a CUDA device float16 [N, C, H, W] or [C, H, W], contiguous or channels_last. Under
            autocast as csr_matmul takes it.
        codes: uint8, as product_pack lays them out for out_channels rows.
        codebooks: float32 [stages, segments or 1, width, entries], as product_matmul takes them; segments cover the
            C / groups * height * width columns of a filter.
        bias: float32, bfloat16 or on a CUDA device float16 [out_channels], or None.
        out_channels: filters of W.
        kernel_size: a number, or one for the height and one for the width; so are the next three.
        stride: steps between outputs.
        padding: zeros on both sides.
        dilation: steps between taps.
        groups: divides C and O; filters of one group see its channels only.
        relu: whether negative results become 0; NaN stays NaN.

    Returns:
        [N, O, H', W'] or [O, H', W'] of x's dtype; gradients of every order reach x, codebooks and bias.

    Raises:
        TypeError: an argument is not a tensor or has another dtype than named here, or a size is no number.
        ValueError: shapes, sizes or devices do not fit each other.
        RuntimeError: a code names no entry (on a CUDA device its filter is NaN instead).

    Source:
        Gong et al., Compressing deep convolutional networks using vector quantization (2014), sections 3.3 and 3.4.
    """
    op = "product_conv2d"
    if isinstance(x, Tensor) and x.dim() not in (3, 4):
        raise ValueError(f"{op}: x must be [N, C, H, W] or [C, H, W], got shape {tuple(x.shape)}; reshape it")
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: x must be a tensor, got {type(x).__name__}; pass a torch.Tensor")
    sizes = conv_sizes(op, x.shape, out_channels, kernel_size, stride, padding, dilation, groups)
    columns = x.shape[-3] // groups * sizes[0][0] * sizes[0][1]
    check_product(op, x, codes, codebooks, bias, out_channels, columns, "weights in a filter")
    images = x if x.dim() == 4 else x.unsqueeze(0)
    y = product_conv2d_inference(images, codes, codebooks, bias, out_channels, *sizes, relu)
    return y if x.dim() == 4 else y.squeeze(0)


def product_conv2d_inference(
    x: Tensor,
    codes: Tensor,
    codebooks: Tensor,
    bias: Tensor | None,
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    relu: bool = False,
) -> Tensor:
    """Returns product_conv2d of the same arguments without its checks.

    x must be [N, C, H, W], the sizes two numbers each.

    Raises:
        RuntimeError: an argument does not fit, or a code names no entry.
    """
    if enabled_for(x):
        device = x.device.type
        with torch.autocast(device, enabled=False):
            y = product_conv2d_inference(
                x.float(), codes, codebooks, bias, out_channels, kernel_size, stride, padding, dilation, groups, relu
            )
        return y.to(torch.get_autocast_dtype(device))
    channels = x.shape[1] // groups
    columns = channels * kernel_size[0] * kernel_size[1]
    weight = product_decode(codes, codebooks, out_features=out_channels, in_features=columns)
    y = functional.conv2d(
        x.float(),
        weight.view(out_channels, channels, kernel_size[0], kernel_size[1]),
        None if bias is None else bias.float(),
        list(stride),
        list(padding),
        list(dilation),
        groups,
    )
    return (y.relu() if relu else y).to(x.dtype)
