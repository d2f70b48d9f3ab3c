"""How tensors are rounded to fixed point while a model trains, forward and backward, and with which random bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from tersetorch.formats import FixedFormat
from tersetorch.ops import RANDOM_BLOCK, fixed_round_inference, inside_range

DTYPES = (torch.float32, torch.bfloat16)
NUMBERS = 5  # of a state
# Values that round_ takes at a time: their copy stays in the cache, where a whole tensor's would need fresh pages.
_CHUNK = 1 << 16


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
        """What x, float32 or bfloat16, is rounded to; its random bits in the order of memory, where x is dense."""
        rounded = _round(x, self.format, self.stochastic, self.seed, self.offset)
        if self.stochastic:
            self.offset += -(-x.numel() // RANDOM_BLOCK) * RANDOM_BLOCK
        return rounded

    def round_(self, x: Tensor) -> None:
        """Puts what it is rounded to into x."""
        dense = _in_memory_order(x)
        parts = dense.view(-1).split(_CHUNK) if dense.is_cpu and dense.is_contiguous() else (dense,)
        for part in parts:
            part.copy_(self(part))

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

    What is None rounds nothing. torch.compile leaves all but the nearest without gradients to Python, where the random
    bits are counted.
    """
    if x.requires_grad and torch.is_grad_enabled():
        return _in_python(_apply, x, values, gradients, nearest)
    if values is None:
        return x
    return _nearest(x, values) if nearest else _in_python(_call, values, x)


def _in_python(call: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """call(*arguments), which torch.compile leaves to Python."""
    if torch.compiler.is_compiling():
        # What says so to the compiler imports it, for two seconds that only those who compile shall spend.
        from tersetorch.methods.quantize.uncompiled import uncompiled

        return cast(Tensor, uncompiled(call, *arguments))
    return call(*arguments)


def _apply(x: Tensor, values: Rounding | None, gradients: Rounding | None, nearest: bool) -> Tensor:
    return cast(Tensor, _Rounded.apply(x, values, gradients, nearest))


def _call(values: Rounding, x: Tensor) -> Tensor:
    return values(x)


def _nearest(x: Tensor, values: Rounding) -> Tensor:
    return _round(x, values.format, False, 0, 0)


def _round(x: Tensor, f: FixedFormat, stochastic: bool, seed: int, offset: int) -> Tensor:
    """The op, which gives row-major results, on x as it lies in memory: what is channels_last stays so."""
    way = "stochastic" if stochastic else "nearest"
    dense = _in_memory_order(x)
    y = fixed_round_inference(dense, f.integer_bits, f.fraction_bits, way, seed, offset)
    return y if dense is x else y.movedim(-1, 1)


def _in_memory_order(x: Tensor) -> Tensor:
    """x, or with its channels last where only that is row-major."""
    if x.dim() < 3 or x.is_contiguous():
        return x
    last = x.movedim(1, -1)
    return last if last.is_contiguous() else x


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
            # Nobody writes to a weight, as an activation in place does to what it gets.
            return x.view_as(x) if nearest else x.clone()
        return _nearest(x, values) if nearest else values(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, values, ctx.gradients, _ = inputs
        ctx.save_for_backward(None if values is None else _inside(x, values.format))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (inside,) = ctx.saved_tensors
        if inside is not None:
            gradient = torch.where(inside, gradient, 0)
        if ctx.gradients is not None:
            gradient = ctx.gradients(gradient)
        return gradient, None, None, None


def _inside(x: Tensor, f: FixedFormat) -> Tensor | None:
    """inside_range, or None where that is everywhere: one pass tells, but a GPU would have to wait for it."""
    if x.is_cpu and x.numel():
        low, high = (float(end) for end in _in_memory_order(x.detach()).aminmax())
        if f.low <= low and high <= f.high:
            return None
    return inside_range(x, f.integer_bits, f.fraction_bits)
