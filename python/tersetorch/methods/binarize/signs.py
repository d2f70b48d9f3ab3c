"""Signs that a network trains through, and powers of two in the place of numbers."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from tersetorch.methods.arguments import check_flag, check_floating


def sign(x: Tensor, stochastic: bool = False) -> Tensor:
    """+1 where x >= 0, else -1; stochastic: +1 with probability clip((x + 1) / 2, 0, 1).

    The gradient passes where |x| <= 1 and is 0 elsewhere: that of clip(x, -1, 1), the straight-through estimator.

    Args:
        x: floating-point, any shape; NaN gives -1.
        stochastic: draws from torch's generator of x's device; under torch.func.vmap it needs randomness="different".

    Raises:
        TypeError: x is no floating-point tensor, or stochastic is no bool.
        ValueError: signs would be drawn under another randomness.

    Source:
        Hubara et al., Binarized Neural Networks (2016), equations 1, 2 and 4.
    """
    check_floating("sign", "x", x)
    check_flag("sign", "stochastic", stochastic)
    return cast(Tensor, _Sign.apply(x, stochastic))


class Sign(nn.Module):
    """sign as an activation: stochastic in training if asked for, deterministic in evaluation always.

    Source:
        Hubara et al., Binarized Neural Networks (2016), sections 1.1 and 1.3.
    """

    def __init__(self, stochastic: bool = False) -> None:
        super().__init__()
        check_flag("Sign", "stochastic", stochastic)
        self.stochastic = stochastic

    def forward(self, x: Tensor) -> Tensor:
        """Signs of x's shape and dtype."""
        return sign(x, self.stochastic and self.training)

    def extra_repr(self) -> str:
        """What it was made with."""
        return "stochastic=True" if self.stochastic else ""


def ap2(x: Tensor) -> Tensor:
    """The power of two next to x on a logarithmic scale, sign(x) * 2^round(log2 |x|); 0 for 0.

    A product with it is a shift of the other factor. The gradient passes as that of x.

    Raises:
        TypeError: x is no floating-point tensor.

    Source:
        Hubara et al., Binarized Neural Networks (2016), section 1.5 and footnote 2 ("approximate power of 2").
    """
    check_floating("ap2", "x", x)
    return cast(Tensor, _ApproximatePowerOf2.apply(x))


def signs_of(x: Tensor) -> Tensor:
    """+1 where x >= 0, else -1; of x's dtype, without a gradient."""
    # torch.where takes eight times as long.
    return torch.ge(x, 0, out=torch.empty_like(x)).mul_(2).sub_(1)


def draw_signs(x: Tensor) -> Tensor:
    """+1 with probability clip((x + 1) / 2, 0, 1), else -1; of x's dtype, without a gradient."""
    drawn = torch.rand_like(x).mul_(2).sub_(1)
    return torch.lt(drawn, x, out=drawn).mul_(2).sub_(1)


class _Sign(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, stochastic: bool) -> Tensor:
        return draw_signs(x) if stochastic else signs_of(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        # A product with bools takes twice as long. torch.func.vmap maps this one, by a loop; none with an out.
        return gradient * x.detach().abs().le_(1), None

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, stochastic: bool) -> tuple[Tensor, int | None]:
        if stochastic and info.randomness != "different":
            raise ValueError(
                f"sign: randomness must be 'different' to draw signs under vmap, got {info.randomness!r}; pass it to "
                "torch.func.vmap"
            )
        return cast(Tensor, _Sign.apply(x, stochastic)), in_dims[0]


class _ApproximatePowerOf2(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        # log2 of 0 is -inf, and 2 to that 0.
        return x.sign() * torch.exp2(x.abs().log2().round())

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is saved."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient
