"""Convolution of images of signs with a weight of signs: exclusive or and population count."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from tersetorch.ops._floats import floats_beside, refusal
from tersetorch.ops._images import MAX_SIZE, Pair, conv_sizes
from tersetorch.ops.sign_pack import sign_words

TILE_FILTERS = 32  # of a packed weight
_DTYPES: tuple[tuple[str, tuple[torch.dtype, ...]], ...] = (
    ("x", (torch.int64,)),  # and floats
    ("weight", (torch.int32,)),
    ("scale", (torch.float32,)),
    ("bias", (torch.float32,)),
    ("thresholds", (torch.int32,)),
)
_xnor_conv2d = torch.ops.tersetorch.xnor_conv2d.default


def xnor_conv2d(
    x: Tensor,
    weight: Tensor,
    *,
    in_channels: int,
    out_channels: int,
    kernel_size: Pair,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    padding_value: int = 0,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    thresholds: Tensor | None = None,
) -> Tensor:
    """conv2d of the signs of x with the signs W [out, in / groups, kh, kw], exact.

    dot[n, o, i, j] = sum_(c, kh, kw) W[o, c, kh, kw] * sign(x)[n, c, i * stride + kh * dilation - padding, ...], where
    x counts as padding_value outside its borders. Each sum is taps * in / groups - 2 * popcount(W ^ x).

    Args:
        x: float32, bfloat16 or on a CUDA device float16 [N, C, H, W], of which the signs count as sign_pack takes them;
            or packed images int64 [N, H, W, ceil(C / 64)], as sign_pack_images, a convolution with thresholds or
            sign_max_pool2d returns them, bits past the last channel all 0. Or one of these without N.
        weight: what xnor_conv2d_pack returns for the same groups.
        in_channels: C.
        out_channels: filters of W.
        kernel_size: a number, or one for the height and one for the width; so are the next three.
        stride: steps between outputs.
        padding: positions on both sides where x counts as padding_value.
        dilation: steps between taps.
        groups: divides in_channels and out_channels; filters of one group see its channels only. Groups of a multiple
            of 64 channels and 32 filters take no longer than their share; others fill both up.
        padding_value: 0, which adds nothing to a sum, 1 or -1.
        scale: float32 [out], or None for 1.
        bias: float32 [out], or None for 0.
        thresholds: int32 [out], instead of these: y is the sign that is +1 where dot >= threshold, packed.

    Returns:
        int32 [N, out, H', W'], dot, channels_last; with scale or bias float32, fma(dot, scale, bias); with thresholds
        packed images int64 [N, H', W', ceil(out / 64)], which the next convolution takes. It has no gradients, and is
        the same under autocast.

    Raises:
        TypeError: an argument is not a tensor or has another dtype than named here, or a size is no number.
        ValueError: shapes, sizes or devices do not fit each other, a filter has 2^31 signs or more, or thresholds come
            with scale or bias.

    Source:
        Rastegari et al., XNOR-Net (2016), section 3.2; csrc/kernels/xnor_conv2d for the method.
    """
    op = "xnor_conv2d"
    for (name, dtypes), tensor in zip(_DTYPES, (x, weight, scale, bias, thresholds), strict=True):
        if tensor is None and name not in ("x", "weight"):
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}; pass a torch.Tensor")
        if tensor is x:
            dtypes = (*floats_beside(x), *dtypes)
        if tensor.dtype not in dtypes:
            raise refusal(op, name, tensor, dtypes)
        if tensor.device != x.device:
            raise ValueError(
                f"{op}: {name} must be on the device of x, {x.device}, got {tensor.device}; move one of them"
            )
        if tensor is not x and tensor is not weight and tensor.shape != (out_channels,):
            raise ValueError(
                f"{op}: {name} must be [{out_channels}], got shape {tuple(tensor.shape)}; pass one for each filter"
            )
    if thresholds is not None and (scale is not None or bias is not None):
        raise ValueError(
            f"{op}: thresholds stand in for scale and bias, got them together; fold these into the thresholds"
        )
    if padding_value not in (0, 1, -1):
        raise ValueError(f"{op}: padding_value must be 0, 1 or -1, got {padding_value!r}; pass what x is outside")
    packed = x.dtype == torch.int64
    words = sign_words(in_channels)
    layout = (
        f"[N, H, W, {words}] or [H, W, {words}]" if packed else f"[N, {in_channels}, H, W] or [{in_channels}, H, W]"
    )
    if x.dim() not in (3, 4) or x.shape[-1 if packed else -3] != (words if packed else in_channels):
        raise ValueError(
            f"{op}: x must be {layout}, got shape {tuple(x.shape)}; pass x with as many channels as W is for"
        )
    height, width = x.shape[-3:-1] if packed else x.shape[-2:]
    sizes = conv_sizes(op, (in_channels, height, width), out_channels, kernel_size, stride, padding, dilation, groups)
    taps = sizes[0][0] * sizes[0][1]
    if in_channels // groups * taps > MAX_SIZE:
        raise ValueError(
            f"{op}: a filter must have at most {MAX_SIZE} signs, got {in_channels // groups * taps}; "
            "split the convolution"
        )
    expected = (*_tiles(out_channels, groups), *sizes[0], 2 * sign_words(in_channels // groups), TILE_FILTERS)
    if weight.shape != expected:
        raise ValueError(
            f"{op}: weight must be {list(expected)} for {out_channels} filters of {in_channels // groups} channels, "
            f"got shape {tuple(weight.shape)}; pass what xnor_conv2d_pack returns"
        )
    images = x if x.dim() == 4 else x.unsqueeze(0)
    y = cast(
        Tensor,
        _xnor_conv2d(images, weight, in_channels, out_channels, *sizes, padding_value, scale, bias, thresholds),
    )
    return y if x.dim() == 4 else y.squeeze(0)


def _tiles(out_channels: int, groups: int) -> tuple[int]:
    return (groups * -(-(out_channels // groups) // TILE_FILTERS),)


def xnor_conv2d_pack(bits: Tensor, groups: int = 1) -> Tensor:
    """Lays the signs of filters out for xnor_conv2d.

    Args:
        bits: int64 [out, kh, kw, words], as sign_pack_images makes them of a weight [out, in / groups, kh, kw].
        groups: of the convolution; divides out.

    Returns:
        int32 [groups * ceil(out / groups / 32), kh, kw, 2 * words, 32]: the halves of words, the low one first, of 32
        filters of one group side by side, 0 for filters past its last.

    Raises:
        TypeError: bits is no int64 tensor.
        ValueError: bits is not 4-D, or groups does not divide its filters.
    """
    op = "xnor_conv2d_pack"
    if not isinstance(bits, Tensor) or bits.dtype != torch.int64:
        found = bits.dtype if isinstance(bits, Tensor) else type(bits).__name__
        raise TypeError(f"{op}: bits must be an int64 tensor, got {found}; pass what sign_pack_images returns")
    if bits.dim() != 4:
        raise ValueError(f"{op}: bits must be [out, kh, kw, words], got shape {tuple(bits.shape)}; reshape it")
    out, kernel_h, kernel_w, words = bits.shape
    if groups < 1 or out % groups:
        raise ValueError(f"{op}: groups must divide the {out} filters, got {groups}; pass those of the convolution")
    of_group = out // groups
    tiles = -(-of_group // TILE_FILTERS)
    halves = torch.stack([bits << 32 >> 32, bits >> 32], -1).to(torch.int32)
    rows = halves.view(groups, of_group, kernel_h * kernel_w * 2 * words)
    whole = pad(rows, (0, 0, 0, tiles * TILE_FILTERS - of_group))
    tiled = whole.view(groups * tiles, TILE_FILTERS, kernel_h, kernel_w, 2 * words)
    return tiled.movedim(1, -1).contiguous()


def xnor_conv2d_unpack(weight: Tensor, out_channels: int, groups: int = 1) -> Tensor:
    """The signs of filters, int64 [out, kh, kw, words], that xnor_conv2d_pack laid out for these groups."""
    tiles, kernel_h, kernel_w, halves, _ = weight.shape
    rows = weight.movedim(-1, 1).reshape(groups, tiles // groups * TILE_FILTERS, kernel_h, kernel_w, halves // 2, 2)
    low, high = rows[:, : out_channels // groups].flatten(0, 1).long().unbind(-1)
    return high << 32 | low & 0xFFFFFFFF


@torch.library.register_fake("tersetorch::xnor_conv2d")
def _fake(
    x: Tensor,
    weight: Tensor,
    in_channels: int,
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    padding_value: int = 0,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    thresholds: Tensor | None = None,
) -> Tensor:
    sizes = x.shape[1:3] if x.dtype == torch.int64 else x.shape[2:]
    out = [(sizes[i] + 2 * padding[i] - dilation[i] * (kernel_size[i] - 1) - 1) // stride[i] + 1 for i in range(2)]
    if thresholds is not None:
        return x.new_empty((x.shape[0], *out, sign_words(out_channels)), dtype=torch.int64)
    dtype = torch.int32 if scale is None and bias is None else torch.float32
    return torch.empty(
        (x.shape[0], out_channels, *out), dtype=dtype, device=x.device, memory_format=torch.channels_last
    )
