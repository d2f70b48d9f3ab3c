"""Product of signs with a weight of signs: exclusive or and population count."""

from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from tersetorch.ops._floats import floats_beside, refusal
from tersetorch.ops.sign_pack import check_size, sign_words

TILE_ROWS = 32  # of a packed weight
_xnor_matmul = torch.ops.tersetorch.xnor_matmul.default


def xnor_matmul(
    x: Tensor,
    weight: Tensor,
    *,
    in_features: int,
    out_features: int,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    thresholds: Tensor | None = None,
) -> Tensor:
    """The product of the signs of x with the signs W [out, in].

    dot[..., r] = sum_c W[r, c] * sign(x)[..., c] = in - 2 * popcount(W[r] ^ x), exact.

    Args:
        x: float32, bfloat16 or on a CUDA device float16 [..., in], of which the signs count as sign_pack takes them; or
            what sign_pack or a product with thresholds returns, int64 [..., words], unused bits all 0.
        weight: what xnor_pack returns, int64 [ceil(out / 32), words, 32]; words are ceil(in / 64), or more where unused
            bits lie between the columns, as those of a flattened packed image do, which x then must be.
        in_features: columns of W, below 2^31.
        out_features: rows of W.
        scale: float32 [out], or None for 1.
        bias: float32 [out], or None for 0.
        thresholds: int32 [out], instead of these: y is the sign that is +1 where dot >= threshold, packed.

    Returns:
        int32 [..., out], dot; with scale or bias float32, fma(dot, scale, bias); with thresholds packed signs int64
        [..., ceil(out / 64)], which the next product takes. It has no gradients.

    Raises:
        TypeError: an argument is not a tensor or has another dtype than named here, or a size is no int.
        ValueError: shapes or devices do not fit each other, or thresholds come with scale or bias.

    Source:
        Courbariaux et al., Binarized Neural Networks (2016), section 1.4; Rastegari et al., XNOR-Net (2016), section
        3.2, for the scale.
    """
    op = "xnor_matmul"
    check_size(op, "in_features", in_features)
    check_size(op, "out_features", out_features)
    for name, tensor, dtypes in (
        ("x", x, (*floats_beside(x), torch.int64)),
        ("weight", weight, (torch.int64,)),
        ("scale", scale, (torch.float32,)),
        ("bias", bias, (torch.float32,)),
        ("thresholds", thresholds, (torch.int32,)),
    ):
        if tensor is None and name not in ("x", "weight"):
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}; pass a torch.Tensor")
        if tensor.dtype not in dtypes:
            raise refusal(op, name, tensor, dtypes)
        if tensor.device != x.device:
            raise ValueError(
                f"{op}: {name} must be on the device of x, {x.device}, got {tensor.device}; move one of them"
            )
        if name in ("scale", "bias", "thresholds") and tuple(tensor.shape) != (out_features,):
            raise ValueError(
                f"{op}: {name} must be [{out_features}], got shape {tuple(tensor.shape)}; pass one for each row"
            )
    if thresholds is not None and (scale is not None or bias is not None):
        raise ValueError(
            f"{op}: thresholds stand in for scale and bias, got them together; fold these into the thresholds"
        )
    least = sign_words(in_features)
    words = max(least, weight.shape[1]) if weight.dim() == 3 else least
    expected = (-(-out_features // TILE_ROWS), words, TILE_ROWS)
    if tuple(weight.shape) != expected:
        raise ValueError(
            f"{op}: weight must be [{expected[0]}, {least} or more, {TILE_ROWS}] for {out_features} rows of "
            f"{in_features} signs, got shape {tuple(weight.shape)}; pass what xnor_pack returns"
        )
    if x.dtype != torch.int64 and words != least:
        raise ValueError(
            f"{op}: x must be packed for a weight of {words} words a row, of which {in_features} signs fill {least}, "
            f"got {x.dtype}; pass packed signs"
        )
    last = words if x.dtype == torch.int64 else in_features
    if x.dim() == 0 or x.shape[-1] != last:
        raise ValueError(
            f"{op}: x must be [..., {last}], got shape {tuple(x.shape)}; pass x with as many features as W has columns"
        )
    return cast(Tensor, _xnor_matmul(x, weight, in_features, out_features, scale, bias, thresholds))


def xnor_pack(bits: Tensor) -> Tensor:
    """Lays rows of packed signs out for xnor_matmul.

    Args:
        bits: int64 [out, words], as sign_pack returns them.

    Returns:
        int64 [ceil(out / 32), words, 32]: the words of 32 rows side by side, 0 for rows past the last.

    Raises:
        TypeError: bits is no int64 tensor.
        ValueError: bits is not 2-D.
    """
    if not isinstance(bits, Tensor) or bits.dtype != torch.int64:
        found = bits.dtype if isinstance(bits, Tensor) else type(bits).__name__
        raise TypeError(f"xnor_pack: bits must be an int64 tensor, got {found}; pass what sign_pack returns")
    if bits.dim() != 2:
        raise ValueError(f"xnor_pack: bits must be [out, words], got shape {tuple(bits.shape)}; reshape it")
    rows, words = bits.shape
    tiles = -(-rows // TILE_ROWS)
    whole = pad(bits, (0, 0, 0, tiles * TILE_ROWS - rows))
    return whole.view(tiles, TILE_ROWS, words).transpose(1, 2).contiguous()


def xnor_unpack(weight: Tensor, out_features: int) -> Tensor:
    """The rows of packed signs, int64 [out, words], that xnor_pack laid out."""
    tiles, words, _ = weight.shape
    return weight.transpose(1, 2).reshape(tiles * TILE_ROWS, words)[:out_features]


@torch.library.register_fake("tersetorch::xnor_matmul")
def _fake(
    x: Tensor,
    weight: Tensor,
    in_features: int,
    out_features: int,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    thresholds: Tensor | None = None,
) -> Tensor:
    leading = x.shape[:-1]
    if thresholds is not None:
        return x.new_empty((*leading, sign_words(out_features)), dtype=torch.int64)
    scaled = scale is not None or bias is not None
    return x.new_empty((*leading, out_features), dtype=torch.float32 if scaled else torch.int32)
