"""Signs as bits: what the binary products take."""

from typing import cast

import torch
from torch import Tensor

from tersetorch.ops._floats import floats_beside, refusal

WORD_BITS = 64
_sign_pack = torch.ops.tersetorch.sign_pack.default
_sign_pack_images = torch.ops.tersetorch.sign_pack_images.default


def sign_pack(x: Tensor) -> Tensor:
    """The signs of x as bits: 0 (for +1) where x >= 0, -0 too; 1 (for -1) elsewhere, NaN too.

    Args:
        x: float32, bfloat16 or on a CUDA device float16 [..., n], any strides.

    Returns:
        int64 [..., ceil(n / 64)]; element c is bit c % 64 of word c // 64, bits past the last are 0. It has no
        gradients.

    Raises:
        TypeError: x is no such tensor.
        ValueError: x is a scalar.

    Source:
        Hubara et al., Binarized Neural Networks (2016), equation 1.
    """
    _check("sign_pack", x)
    if x.dim() == 0:
        raise ValueError("sign_pack: x must be [..., n], got a scalar; reshape it")
    return cast(Tensor, _sign_pack(x))


def sign_pack_images(x: Tensor) -> Tensor:
    """The signs of images as bits, the channels of a pixel side by side.

    Args:
        x: float32, bfloat16 or on a CUDA device float16 [N, C, H, W] or [C, H, W]; contiguous and channels_last images
            are read as they are.

    Returns:
        int64 [N, H, W, ceil(C / 64)] or [H, W, ceil(C / 64)]: what sign_pack makes of the channels of each pixel. It
        has no gradients.

    Raises:
        TypeError: x is no such tensor.
        ValueError: x has other dimensions.
    """
    _check("sign_pack_images", x)
    if x.dim() not in (3, 4):
        raise ValueError(
            f"sign_pack_images: x must be [N, C, H, W] or [C, H, W], got shape {tuple(x.shape)}; reshape it"
        )
    if x.dim() == 3:
        return cast(Tensor, _sign_pack_images(x.unsqueeze(0))).squeeze(0)
    return cast(Tensor, _sign_pack_images(x))


def _check(op: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: x must be a tensor, got {type(x).__name__}; pass a torch.Tensor")
    if x.dtype not in floats_beside(x):
        raise refusal(op, "x", x, floats_beside(x))


def sign_unpack(bits: Tensor, n: int) -> Tensor:
    """The signs +1 and -1, float32 [..., n], that sign_pack packed."""
    places = torch.arange(WORD_BITS, device=bits.device)
    signs = (bits.unsqueeze(-1) >> places & 1).flatten(-2)[..., :n]
    return 1.0 - 2.0 * signs


def check_size(op: str, name: str, value: int) -> None:
    """Refuses what is no int of at least 0."""
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise TypeError(f"{op}: {name} must be an int, got {value!r}; pass a whole number")
    if value < 0:
        raise ValueError(f"{op}: {name} must be at least 0, got {value}; pass that of the weight")


def sign_words(n: int) -> int:
    """Words that n signs take."""
    return -(-n // WORD_BITS)


@torch.library.register_fake("tersetorch::sign_pack")
def _fake(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], sign_words(x.shape[-1])), dtype=torch.int64)


@torch.library.register_fake("tersetorch::sign_pack_images")
def _fake_images(x: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], *x.shape[2:], sign_words(x.shape[1])), dtype=torch.int64)
