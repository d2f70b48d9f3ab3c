"""The largest sign in each window of images of signs."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from tersetorch.ops._images import Pair, pair_of

_sign_max_pool2d = torch.ops.tersetorch.sign_max_pool2d.default


def sign_max_pool2d(
    x: Tensor,
    kernel_size: Pair,
    stride: Pair | None = None,
    padding: Pair = 0,
    dilation: Pair = 1,
    ceil_mode: bool = False,
    flips: Tensor | None = None,
) -> Tensor:
    """max_pool2d of images of signs, which is an and of bits.

    y[n, i, j, c] = max_(kh, kw) x[n, i * stride + kh * dilation - padding, ..., c], times -1 where bit c of flips is 1.
    Positions outside the image never win; a window that lies outside altogether is refused.

    Args:
        x: packed images int64 [N, H, W, words] or [H, W, words], as sign_pack_images or a product with thresholds
            returns them.
        kernel_size: a number, or one for the height and one for the width; so are the next three.
        stride: steps between windows, by default kernel_size.
        padding: positions on both sides, at most half of kernel_size.
        dilation: steps between taps.
        ceil_mode: whether windows may end outside the image, as torch.nn.MaxPool2d describes.
        flips: int64 [words], bits past the last channel 0, or None for none.

    Returns:
        int64 [N, H', W', words] or [H', W', words]. It has no gradients.

    Raises:
        TypeError: an argument is not a tensor or has another dtype than named here, or a size is no number.
        ValueError: shapes, sizes or devices do not fit each other.

    Source:
        Umuroglu et al., FINN (2017), section 4.2.3.
    """
    op = "sign_max_pool2d"
    for name, tensor in (("x", x), ("flips", flips)):
        if tensor is None and name == "flips":
            continue
        if not isinstance(tensor, Tensor) or tensor.dtype != torch.int64:
            found = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{op}: {name} must be an int64 tensor, got {found}; pass packed signs")
    if x.dim() not in (3, 4):
        raise ValueError(
            f"{op}: x must be [N, H, W, words] or [H, W, words], got shape {tuple(x.shape)}; pass packed images"
        )
    if flips is not None and (flips.device != x.device or flips.shape != x.shape[-1:]):
        raise ValueError(
            f"{op}: flips must be [{x.shape[-1]}] on {x.device}, got shape {tuple(flips.shape)} on {flips.device}; "
            "pass a bit for each channel"
        )
    kernel = pair_of(op, "kernel_size", kernel_size, 1)
    steps = kernel if stride is None else pair_of(op, "stride", stride, 1)
    pads, gaps = pair_of(op, "padding", padding, 0), pair_of(op, "dilation", dilation, 1)
    for i, axis in enumerate(("high", "wide")):
        size, reach = x.shape[i - 3], gaps[i] * (kernel[i] - 1) + 1
        if 2 * pads[i] > kernel[i]:
            raise ValueError(
                f"{op}: padding must be at most half of kernel_size, {kernel[i]} {axis}, got {pads[i]}; "
                "pass that of the layer"
            )
        # With ceil_mode the only window may end outside the image, as later ones may.
        least = max(1, reach - 2 * pads[i] - (steps[i] - 1 if ceil_mode else 0))
        if size < least:
            raise ValueError(
                f"{op}: x must be at least {least} {axis} for these windows and padding, got {size}; pass larger images"
            )
        # Windows that begin before the image may step over a small one: they would have no largest sign.
        if size < gaps[i]:
            windows = _windows(size, kernel[i], steps[i], pads[i], gaps[i], ceil_mode)
            before = range(min(windows, -(-pads[i] // steps[i])))
            if any((n * steps[i] - pads[i]) % gaps[i] >= size for n in before):
                raise ValueError(
                    f"{op}: x must be at least {gaps[i]} {axis}, as dilation is, got {size}; pass larger images"
                )
    images = x if x.dim() == 4 else x.unsqueeze(0)
    y = cast(Tensor, _sign_max_pool2d(images, kernel, steps, pads, gaps, ceil_mode, flips))
    return y if x.dim() == 4 else y.squeeze(0)


@torch.library.register_fake("tersetorch::sign_max_pool2d")
def _fake(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool = False,
    flips: Tensor | None = None,
) -> Tensor:
    pairs = zip(x.shape[1:3], kernel_size, stride, padding, dilation, strict=True)
    return x.new_empty((x.shape[0], *(_windows(*sizes, ceil_mode) for sizes in pairs), x.shape[3]))


def _windows(size: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> int:
    """How many windows an axis has."""
    more = stride - 1 if ceil_mode else 0
    windows = (size + 2 * padding - dilation * (kernel - 1) - 1 + more) // stride + 1
    # The last one begins inside the image or before it.
    return windows - 1 if ceil_mode and (windows - 1) * stride >= size + padding else windows
