"""What ops on images share: sizes of convolutions, and the images that come out."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

MAX_SIZE = 2**31 - 1
MAX_INT8_WEIGHTS = 128 * 1024

Pair = int | Sequence[int]


def pair_of(op: str, name: str, value: Pair, least: int) -> list[int]:
    """Two numbers, of one or of two that lie in [least, MAX_SIZE]."""
    # What nearly every call has, told apart first: the checks below cost a microsecond.
    if type(value) is int and least <= value <= MAX_SIZE:
        return [value, value]
    if type(value) is tuple and len(value) == 2:
        height, width = value
        if type(height) is type(width) is int and least <= min(value) and max(value) <= MAX_SIZE:
            return [height, width]
    pair = list(value) if isinstance(value, Sequence) else [value, value]
    if len(pair) != 2 or any(isinstance(n, bool) or not isinstance(n, int | torch.SymInt) for n in pair):
        raise TypeError(f"{op}: {name} must be an int or two ints, got {value!r}; pass (height, width)")
    if min(pair) < least:
        raise ValueError(f"{op}: {name} must be at least {least}, got {value!r}; pass that of the layer")
    if max(pair) > MAX_SIZE:
        raise ValueError(f"{op}: {name} must be at most {MAX_SIZE}, got {value!r}; pass that of the layer")
    return pair


def conv_sizes(
    op: str,
    shape: Sequence[int],
    out_channels: int,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
) -> tuple[list[int], list[int], list[int], list[int], int]:
    """The sizes of a convolution of images [..., C, H, W] as its op takes them: two numbers each, and the groups.

    Raises:
        TypeError: a size is not a number or two.
        ValueError: a size is out of range, or x is smaller than the kernel.
    """
    kernel, steps = pair_of(op, "kernel_size", kernel_size, 1), pair_of(op, "stride", stride, 1)
    pads, gaps = pair_of(op, "padding", padding, 0), pair_of(op, "dilation", dilation, 1)
    channels = shape[-3]
    if groups < 1 or channels % groups or out_channels % groups:
        raise ValueError(
            f"{op}: groups must divide the channels, got {groups} groups of {channels} channels in and "
            f"{out_channels} out; pass the groups of the weight"
        )
    for i, axis in enumerate(("high", "wide")):
        size, reach = shape[i - 2], gaps[i] * (kernel[i] - 1) + 1
        if size + 2 * pads[i] < reach:
            raise ValueError(
                f"{op}: x must be at least {reach - 2 * pads[i]} {axis} for this kernel and padding, got "
                f"{size}; pass larger images or more padding"
            )
    return kernel, steps, pads, gaps, groups


def check_filters(op: str, mode: str, weights: int) -> None:
    """Refuses filters of more weights than sums of int8 products have room for."""
    if mode == "int8" and weights > MAX_INT8_WEIGHTS:
        raise ValueError(
            f"{op}: a filter must have at most {MAX_INT8_WEIGHTS} weights in mode 'int8', got {weights}; "
            "use another mode"
        )


def conv_gradients(
    ctx: Any, grad_y: Tensor, x: Tensor, weight: Tensor, wants_x: bool, wants_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x and of weight [filters, columns], those of torch's convolution, which have gradients in turn.

    Args:
        ctx: has kernel_size, stride, padding, dilation and groups.
        grad_y: of y.
        x: the images.
        weight: dense, float32.
        wants_x: whether that of x is asked for; else it is None.
        wants_weight: the same of the weight.
    """
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad_y.float(),
        x.float(),
        weight.view(weight.shape[0], x.shape[1] // ctx.groups, *ctx.kernel_size),
        None,
        ctx.stride,
        ctx.padding,
        ctx.dilation,
        False,
        [0, 0],
        ctx.groups,
        [wants_x, wants_weight, False],
    )
    return grad_x.to(x.dtype) if wants_x else None, grad_weight.reshape(weight.shape) if wants_weight else None


def empty_images(
    x: Tensor,
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    dtype: torch.dtype | None = None,
) -> Tensor:
    """What a convolution makes of x, uninitialised, in its memory format and, unless another is given, its dtype."""
    size = [
        (x.shape[i + 2] + 2 * padding[i] - dilation[i] * (kernel_size[i] - 1) - 1) // stride[i] + 1 for i in range(2)
    ]
    last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    memory_format = torch.channels_last if last else torch.contiguous_format
    shape = x.shape[0], out_channels, *size
    return torch.empty(shape, dtype=dtype or x.dtype, device=x.device, memory_format=memory_format)
