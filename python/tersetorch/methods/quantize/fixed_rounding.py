"""How tensors are rounded to fixed point while a model trains, forward and backward, and with which random bits."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from tersetorch.formats import FixedFormat
from tersetorch.ops import RANDOM_BLOCK, fixed_round_inference, inside_range

DTYPES = (torch.float32, torch.bfloat16)
NUMBERS = 5  # of a state


class Rounding:
    """Rounds tensors to a format, one after the other, each with random bits that no other gets.

    Attributes:
        format: the numbers there are.
        stochastic: whether rounding is stochastic, else to the nearest.
        seed: of the random bits.
        offset: how many values have had theirs, rounded up to whole blocks for each tensor.
    """

    def __init__(self, format: FixedFormat, stochastic: bool, seed: int, offset: int = 0) -> None:
        self.format = format
        self.stochastic = stochastic
        self.seed = seed
        self.offset = offset

    def __call__(self, x: Tensor) -> Tensor:
        """What x, float32 or bfloat16, is rounded to."""
        if not self.stochastic:
            return self.format.nearest(x)
        f = self.format
        rounded = fixed_round_inference(x, f.integer_bits, f.fraction_bits, "stochastic", self.seed, self.offset)
        self.offset += -(-x.numel() // RANDOM_BLOCK) * RANDOM_BLOCK
        return rounded

    def numbers(self) -> list[int]:
        """All that there is to it."""
        f = self.format
        return [f.integer_bits, f.fraction_bits, int(self.stochastic), self.seed, self.offset]

    @classmethod
    def from_numbers(cls, numbers: list[int]) -> Rounding:
        """The rounding that has these numbers."""
        return cls(FixedFormat(numbers[0], numbers[1]), bool(numbers[2]), numbers[3], numbers[4])


def rounded(x: Tensor, values: Rounding | None, gradients: Rounding | None, nearest: bool = False) -> Tensor:
    """Returns x rounded by values, or to their nearest; its gradient, 0 outside their range, is rounded by gradients.

    What is None rounds nothing.
    """
    if not (x.requires_grad and torch.is_grad_enabled()):
        return x if values is None else values.format.nearest(x) if nearest else values(x)
    return cast(Tensor, _Rounded.apply(x, values, gradients, nearest))


def to_state(roundings: list[Rounding | None]) -> Tensor:
    """What from_state reads, int64 [roundings, 5]; zeros for None."""
    return torch.tensor([[0] * NUMBERS if one is None else one.numbers() for one in roundings], dtype=torch.int64)


def from_state(where: str, state: Any, count: int) -> list[Rounding | None]:
    """The roundings that to_state wrote.

    Raises:
        ValueError: state is none of them.
    """
    if not isinstance(state, Tensor) or state.dtype != torch.int64 or state.shape != (count, NUMBERS):
        raise ValueError(
            f"{where}: a state must be int64 [{count}, {NUMBERS}], got {state!r}; load a state of fixed_point"
        )
    return [Rounding.from_numbers(numbers) if any(numbers) else None for numbers in state.tolist()]


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, values: Rounding | None, gradients: Rounding | None, nearest: bool) -> Tensor:
        if values is None:
            return x.clone()
        return values.format.nearest(x) if nearest else values(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, values, ctx.gradients, _ = inputs
        inside = None if values is None else inside_range(x, values.format.integer_bits, values.format.fraction_bits)
        ctx.save_for_backward(inside)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (inside,) = ctx.saved_tensors
        if inside is not None:
            gradient = torch.where(inside, gradient, 0)
        if ctx.gradients is not None:
            gradient = ctx.gradients(gradient)
        return gradient, None, None, None
