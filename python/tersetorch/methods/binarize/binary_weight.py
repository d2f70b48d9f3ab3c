"""How a weight is a sign while its real values train: one parametrization."""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch import Tensor

from tersetorch.methods.binarize.signs import draw_signs, signs_of
from tersetorch.methods.parametrization import BakedWeight

Scale = Literal["none", "row"]


class BinaryWeight(BakedWeight):
    """weight = sign(original), +1 for 0, times 1 or each row's mean |original|.

    Stochastic, weights are drawn anew for each pass of training, +1 with probability clip((original + 1) / 2, 0, 1),
    and evaluation takes the real values. The gradient goes to original as it is: BinaryConnect clips the values, not
    the gradients. With scale "row" it is dL/dweight * (1 / n + mean * 1(|original| < 1)) for the n weights of a row.

    Source:
        Courbariaux, Bengio, David, BinaryConnect (2015), equations 1 to 3 and section 2.6, method 2 for the stochastic
        evaluation; Rastegari et al., XNOR-Net (2016), equations 6 and 11, for the scale and its gradient.
    """

    def __init__(self, stochastic: bool = False, scale: Scale = "none") -> None:
        super().__init__()
        self.stochastic = stochastic
        self.scale = scale

    def forward(self, original: Tensor) -> Tensor:
        """The weight, of original's shape and dtype."""
        if self.stochastic and not self.training:
            return original
        return cast(Tensor, _Binarized.apply(original, self.stochastic, self.scale == "row"))

    def extra_repr(self) -> str:
        """What it was made with."""
        return f"stochastic={self.stochastic}, scale={self.scale!r}"


class _Binarized(torch.autograd.Function):
    @staticmethod
    def forward(original: Tensor, stochastic: bool, scaled: bool) -> Tensor:
        if stochastic:
            return draw_signs(original)
        signs = signs_of(original)
        return signs * _row_means(original) if scaled else signs

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0] if inputs[2] else None)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (original,) = ctx.saved_tensors
        if original is not None:
            inside = (original.abs() < 1).to(gradient.dtype)
            gradient = gradient * (1 / max(1, original.shape[1:].numel()) + _row_means(original) * inside)
        return gradient, None, None


def _row_means(original: Tensor) -> Tensor:
    return original.abs().flatten(1).mean(1).view(-1, *[1] * (original.dim() - 1))
