"""Weights as signs: the binary baseline that codebooks of more entries are held against."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tersetorch.methods.arguments import check_choice

Scale = Literal["none", "tensor", "row"]


def binary(weight: Tensor, scale: Scale = "tensor") -> Tensor:
    """The signs of weight, +1 for zeros too, times a scale: what one bit a weight can say, in weight's shape and dtype.

    Args:
        weight: finite, floating-point, of two or more dimensions, rows first.
        scale: "none" (1), "tensor" or "row": mean |w| over all or over each row, which brings a * sign(w) nearest to w
            in squared error.

    Raises:
        TypeError: weight is no floating-point tensor.
        ValueError: scale is none of these, or weight has another number of dimensions or is not finite.

    Source:
        Gong et al., Compressing deep convolutional networks using vector quantization (2014), section 3.2.1, for the
        signs alone; Rastegari et al., XNOR-Net (2016), section 3.1, for the scale.
    """
    where = "quantize.binary"
    check_matrix(where, weight)
    check_choice(where, "scale", scale, ("none", "tensor", "row"))
    signs = torch.where(weight < 0, -1.0, 1.0).to(weight.dtype)
    if scale == "none" or not weight.numel():
        return signs
    sizes = weight.double().abs()
    mean = sizes.mean() if scale == "tensor" else sizes.flatten(1).mean(1).view(-1, *[1] * (weight.dim() - 1))
    return signs * mean.to(weight.dtype)


def check_matrix(where: str, weight: object) -> None:
    """Refuses what is no finite weight of two or more dimensions."""
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        kind = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"{where}: weight must be a floating-point tensor, got {kind}; pass a layer's weight")
    if weight.dim() < 2:
        raise ValueError(f"{where}: weight must have two or more dimensions, got {weight.dim()}; pass a layer's weight")
    if weight.is_meta:
        raise ValueError(f"{where}: weight must hold numbers, got a tensor on meta; load the model first")
    if not bool(weight.isfinite().all()):
        raise ValueError(f"{where}: weight must be finite, got NaN or infinity; repair the training")
