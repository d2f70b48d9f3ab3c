"""Products of 8-bit numbers with a weight of signs: the first layer of a binary network, exact."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from tersetorch.ops._images import Pair, conv_sizes
from tersetorch.ops.sign_pack import sign_words
from tersetorch.ops.xnor_matmul import TILE_ROWS

MAX_COLUMNS = 2**23  # whose sums fit int32
LARGEST = 255
_bitplane_matmul = torch.ops.tersetorch.bitplane_matmul.default
_bitplane_conv2d = torch.ops.tersetorch.bitplane_conv2d.default


def bitplane_matmul(
    x: Tensor,
    weight: Tensor,
    *,
    in_features: int,
    out_features: int,
    step: int = 1,
    zero: int = 0,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    thresholds: Tensor | None = None,
) -> Tensor:
    """The product of 8-bit x with the signs W [out, in], exact.

    dot[..., r] = sum_c W[r, c] * (step * x[..., c] - zero) = step * sum_b 2^b * (W[r] . plane b of x) - zero * (W[r] .
    1). Pixels k / 255 are step 1, zero 0 and 1 / 255 in scale; pixels 2 k / 255 - 1 are step 2, zero 255 and the same.

    Args:
        x: uint8 [..., in], any strides; to_pixels makes it of floats.
        weight: what xnor_pack returns, int64 [ceil(out / 32), ceil(in / 64), 32].
        in_features: columns of W, at most 2^23.
        out_features: rows of W.
        step: 1 or 2.
        zero: 0 to 255 with step 1, 255 with step 2, so that step * x - zero lies in [-255, 255].
        scale: float32 [out], or None for 1.
        bias: float32 [out], or None for 0.
        thresholds: int32 [out], instead of these: y is the sign that is +1 where dot >= threshold, packed.

    Returns:
        int32 [..., out], dot; with scale or bias float32, fma(dot, scale, bias); with thresholds packed signs int64
        [..., ceil(out / 64)], which xnor_matmul takes. It has no gradients, and is the same under autocast.

    Raises:
        TypeError: an argument is not a tensor or has another dtype than named here.
        ValueError: shapes, numbers or devices do not fit each other, or thresholds come with scale or bias.

    Source:
        Courbariaux et al., Binarized Neural Networks (2016), section 1.5, equation 3: the planes of the first layer's
        inputs. csrc/kernels/bitplane_matmul for the method.
    """
    op = "bitplane_matmul"
    _check(op, x, weight, in_features, out_features, step, zero, scale, bias, thresholds)
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(
            f"{op}: x must be [..., {in_features}], got shape {tuple(x.shape)}; pass x with as many features as W has "
            "columns"
        )
    return cast(Tensor, _bitplane_matmul(x, weight, in_features, out_features, step, zero, scale, bias, thresholds))


def bitplane_conv2d(
    x: Tensor,
    weight: Tensor,
    *,
    out_channels: int,
    kernel_size: Pair,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    step: int = 1,
    zero: int = 0,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    thresholds: Tensor | None = None,
) -> Tensor:
    """conv2d of 8-bit images with the signs W [out, C, kh, kw], exact.

    dot[n, o, i, j] = sum_(c, kh, kw) W[o, c, kh, kw] * (step * x - zero) at the positions inside the image; those
    outside add nothing, so that step * x - zero is what is padded with 0.

    Args:
        x: uint8 [N, C, H, W] or [C, H, W], any strides.
        weight: xnor_pack(sign_pack(W.flatten(1))), int64 [ceil(out / 32), ceil(C * kh * kw / 64), 32].
        out_channels: filters of W.
        kernel_size: a number, or one for the height and one for the width; so are the next three.
        stride: steps between outputs.
        padding: positions on both sides that add nothing.
        dilation: steps between taps.
        step: as bitplane_matmul has it.
        zero: as bitplane_matmul has it.
        scale: float32 [out], or None for 1.
        bias: float32 [out], or None for 0.
        thresholds: int32 [out], instead of these: y is the sign that is +1 where dot >= threshold, packed.

    Returns:
        int32 [N, out, H', W'], dot, channels_last; with scale or bias float32, fma(dot, scale, bias); with thresholds
        packed images int64 [N, H', W', ceil(out / 64)], which xnor_conv2d takes. It has no gradients.

    Raises:
        TypeError: an argument is not a tensor or has another dtype than named here, or a size is no number.
        ValueError: shapes, sizes, numbers or devices do not fit each other, or thresholds come with scale or bias.

    Source:
        As bitplane_matmul.
    """
    op = "bitplane_conv2d"
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: x must be a tensor, got {type(x).__name__}; pass a torch.Tensor")
    if x.dim() not in (3, 4):
        raise ValueError(f"{op}: x must be [N, C, H, W] or [C, H, W], got shape {tuple(x.shape)}; reshape it")
    sizes = conv_sizes(op, x.shape, out_channels, kernel_size, stride, padding, dilation, 1)[:4]
    columns = x.shape[-3] * sizes[0][0] * sizes[0][1]
    _check(op, x, weight, columns, out_channels, step, zero, scale, bias, thresholds)
    images = x if x.dim() == 4 else x.unsqueeze(0)
    y = cast(Tensor, _bitplane_conv2d(images, weight, out_channels, *sizes, step, zero, scale, bias, thresholds))
    return y if x.dim() == 4 else y.squeeze(0)


def to_pixels(x: Tensor, *, scale: float = 1 / 255, offset: float = 0.0) -> Tensor:
    """The uint8 k with x = scale * k + offset, for x that is such a number everywhere.

    Args:
        x: floats of any shape; each is scale * k + offset for a k in 0 to 255, rounded to its dtype.
        scale: between neighbouring pixels; 2 / 255 for pixels in [-1, 1].
        offset: of pixel 0; -1 for those.

    Raises:
        TypeError: x is no tensor of floats.
        ValueError: a number of x is further than its dtype's rounding from all 256 pixels, or scale is 0.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        found = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"to_pixels: x must be a tensor of floats, got {found}; pass images before they are uint8")
    if scale == 0:
        raise ValueError("to_pixels: scale must not be 0, got 0; pass the step between neighbouring pixels")
    pixels = ((x.double() - offset) / scale).round().nan_to_num(0, 0, 0).clamp(0, LARGEST)
    # A few roundings of numbers up to the largest pixel, as dividing and shifting them before makes.
    rounding = 4 * torch.finfo(x.dtype).eps * max(abs(offset), abs(offset + LARGEST * scale))
    off = (pixels * scale + offset - x.double()).abs()
    if not bool((off <= rounding).all()):
        worst = x.flatten()[off.nan_to_num(torch.inf, torch.inf).flatten().argmax()].item()
        raise ValueError(
            f"to_pixels: x must be {scale:g} * k + {offset:g} for k in 0 to 255 everywhere, got {worst:g}; pass "
            "the images as they were loaded, or their scale and offset"
        )
    return pixels.to(torch.uint8)


def _check(
    op: str,
    x: Tensor,
    weight: Tensor,
    columns: int,
    rows: int,
    step: int,
    zero: int,
    scale: Tensor | None,
    bias: Tensor | None,
    thresholds: Tensor | None,
) -> None:
    for name, tensor, dtype in (
        ("x", x, torch.uint8),
        ("weight", weight, torch.int64),
        ("scale", scale, torch.float32),
        ("bias", bias, torch.float32),
        ("thresholds", thresholds, torch.int32),
    ):
        if tensor is None and name not in ("x", "weight"):
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}; pass a torch.Tensor")
        if tensor.dtype != dtype:
            fix = "to_pixels makes it of floats" if name == "x" else "convert it"
            raise TypeError(f"{op}: {name} must be {str(dtype).removeprefix('torch.')}, got {tensor.dtype}; {fix}")
        if tensor.device != x.device:
            raise ValueError(
                f"{op}: {name} must be on the device of x, {x.device}, got {tensor.device}; move one of them"
            )
        if name in ("scale", "bias", "thresholds") and tuple(tensor.shape) != (rows,):
            raise ValueError(f"{op}: {name} must be [{rows}], got shape {tuple(tensor.shape)}; pass one for each row")
    if thresholds is not None and (scale is not None or bias is not None):
        raise ValueError(
            f"{op}: thresholds stand in for scale and bias, got them together; fold these into the thresholds"
        )
    if step not in (1, 2) or not LARGEST * (step - 1) <= zero <= LARGEST:
        raise ValueError(
            f"{op}: step * x - zero must lie in [-255, 255] for x of 0 to 255 and step 1 or 2, got step {step} and "
            f"zero {zero}; pass zero in [0, 255] with step 1, or 255 with step 2"
        )
    if columns > MAX_COLUMNS:
        raise ValueError(f"{op}: W must have at most {MAX_COLUMNS} columns, got {columns}; split it")
    expected = (-(-rows // TILE_ROWS), sign_words(columns), TILE_ROWS)
    if tuple(weight.shape) != expected:
        raise ValueError(
            f"{op}: weight must be {list(expected)} for {rows} rows of {columns} signs, got shape "
            f"{tuple(weight.shape)}; pass what xnor_pack returns"
        )


@torch.library.register_fake("tersetorch::bitplane_matmul")
def _fake(
    x: Tensor,
    weight: Tensor,
    in_features: int,
    out_features: int,
    step: int = 1,
    zero: int = 0,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    thresholds: Tensor | None = None,
) -> Tensor:
    if thresholds is not None:
        return x.new_empty((*x.shape[:-1], sign_words(out_features)), dtype=torch.int64)
    dtype = torch.int32 if scale is None and bias is None else torch.float32
    return x.new_empty((*x.shape[:-1], out_features), dtype=dtype)


@torch.library.register_fake("tersetorch::bitplane_conv2d")
def _fake_conv(
    x: Tensor,
    weight: Tensor,
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    step: int = 1,
    zero: int = 0,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    thresholds: Tensor | None = None,
) -> Tensor:
    out = [
        (x.shape[i + 2] + 2 * padding[i] - dilation[i] * (kernel_size[i] - 1) - 1) // stride[i] + 1 for i in range(2)
    ]
    if thresholds is not None:
        return x.new_empty((x.shape[0], *out, sign_words(out_channels)), dtype=torch.int64)
    dtype = torch.int32 if scale is None and bias is None else torch.float32
    return torch.empty(
        (x.shape[0], out_channels, *out), dtype=dtype, device=x.device, memory_format=torch.channels_last
    )
