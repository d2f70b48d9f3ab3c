"""Numbers rounded to fixed point <IL,FL>, to the nearest or at random."""

from numbers import Integral
from typing import Any, cast

import torch
from torch import Tensor

from tersetorch.ops._floats import floats_beside, refusal

MAX_BITS = 24
# Nearest, ties up, or up with the probability of what is cut off.
ROUNDINGS = ("nearest", "stochastic")
# Values that share eight counters: whoever counts offsets by so many draws every counter once.
RANDOM_BLOCK = 64
_BITS = {torch.int8: 8, torch.int16: 16, torch.int32: 32}
_fixed_round = torch.ops.tersetorch.fixed_round.default
_fixed_round_inference = torch.ops.tersetorch.fixed_round_inference.default
_fixed_round_whole = torch.ops.tersetorch.fixed_round_whole.default


def fixed_round(
    x: Tensor, integer_bits: int, fraction_bits: int, rounding: str = "nearest", seed: int = 0, offset: int = 0
) -> Tensor:
    """Returns x in fixed point: multiples of 2^-FL in [-2^(IL-1), 2^(IL-1) - 2^-FL]; what lies outside becomes its end.

    Nearest, ties up: floor(x / step + 1/2). Stochastic: up to the next multiple with the probability of the distance to
    the one below, in steps and rounded to 16 bits, so that the mean is x. Value i in row-major order takes the 16 bits
    of number offset + i under seed from Philox4x32-10 (csrc/kernels/common/philox.h says which), so that the result
    depends on neither threads nor CPU level nor device, and rounding a part with its own offset gives that part.
    Infinity saturates, zeros are +0.0, NaN stays as it is.

    Args:
        x: float32, bfloat16 or on a CUDA device float16 [...], any strides. Where a format has more than 8 bits, its
            numbers are rounded once more to fit bfloat16.
        integer_bits: IL, at least 1: it counts the sign.
        fraction_bits: FL, at least 0; IL + FL from 2 to 24, since float32 has every such number.
        rounding: "nearest" or "stochastic".
        seed: of the random bits, a 64-bit integer.
        offset: at least 0; a caller adds at least x.numel() from call to call.

    Returns:
        [...] of x's dtype. The gradient passes where x lies inside the range, its ends included, and is 0 elsewhere
        and for NaN: the straight-through estimator, as of clip(x, low, high).

    Raises:
        TypeError: x is no such tensor, or a number is no int.
        ValueError: there is no such format, rounding or offset.

    Source:
        Gupta et al., Deep Learning with Limited Numerical Precision (2015), section 3.1.
    """
    _check("fixed_round", x, integer_bits, fraction_bits, rounding, seed, offset)
    return cast(Tensor, _fixed_round(x, integer_bits, fraction_bits, rounding, seed, offset))


def fixed_round_inference(
    x: Tensor, integer_bits: int, fraction_bits: int, rounding: str = "nearest", seed: int = 0, offset: int = 0
) -> Tensor:
    """Returns fixed_round of the same arguments, without gradients and without the checks in Python.

    Raises:
        RuntimeError: an argument does not fit (the native checks remain).
    """
    return cast(Tensor, _fixed_round_inference(x, integer_bits, fraction_bits, rounding, seed, offset))


def fixed_round_whole(
    x: Tensor,
    integer_bits: int,
    fraction_bits: int,
    rounding: str = "nearest",
    seed: int = 0,
    offset: int = 0,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """How many steps fixed_round(x) is: the whole numbers that fixed_matmul takes.

    Args:
        x: as fixed_round takes it, without NaN, and the next ones too.
        integer_bits: IL.
        fraction_bits: FL.
        rounding: "nearest" or "stochastic".
        seed: of the random bits.
        offset: of value 0.
        dtype: int8, int16 or int32, wide enough for IL + FL bits; the first that is when left out.

    Returns:
        [...] of dtype, without gradients. On CUDA NaN becomes 0, since a kernel cannot raise.

    Raises:
        TypeError, ValueError: as fixed_round, and for a dtype that does not fit.
        RuntimeError: x holds NaN.
    """
    op = "fixed_round_whole"
    _check(op, x, integer_bits, fraction_bits, rounding, seed, offset)
    bits = integer_bits + fraction_bits
    if dtype is None:
        dtype = whole_dtype(bits)
    if dtype not in _BITS or _BITS[dtype] < bits:
        raise ValueError(f"{op}: dtype must be int8, int16 or int32 and hold {bits} bits, got {dtype}; leave it out")
    return cast(Tensor, _fixed_round_whole(x, integer_bits, fraction_bits, dtype, rounding, seed, offset))


def whole_dtype(bits: int) -> torch.dtype:
    """The narrowest of int8, int16 and int32 that holds so many bits."""
    return next(dtype for dtype, room in _BITS.items() if bits <= room)


def check_fixed(op: str, integer_bits: int, fraction_bits: int) -> None:
    """Refuses what is no format."""
    for name, bits in (("integer_bits", integer_bits), ("fraction_bits", fraction_bits)):
        check_int(op, name, bits)
    if integer_bits < 1 or fraction_bits < 0 or not 2 <= integer_bits + fraction_bits <= MAX_BITS:
        raise ValueError(
            f"{op}: a format must be <IL,FL> with IL of at least 1, for the sign, FL of at least 0 and 2 to {MAX_BITS} "
            f"bits together, got <{integer_bits},{fraction_bits}>; pass such numbers"
        )


def check_rounding(op: str, rounding: str, seed: int, offset: int) -> None:
    """Refuses what is no way of rounding."""
    if rounding not in ROUNDINGS:
        raise ValueError(f"{op}: rounding must be 'nearest' or 'stochastic', got {rounding!r}; pass one of these")
    for name, number in (("seed", seed), ("offset", offset)):
        check_int(op, name, number)
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"{op}: seed must be a 64-bit integer, got {seed}; pass one in [-2^63, 2^63)")
    if not 0 <= offset < 2**63:
        raise ValueError(f"{op}: offset must be in [0, 2^63), got {offset}; pass how many values came before")


def check_int(op: str, name: str, number: object) -> None:
    """Refuses what is no whole number."""
    if not isinstance(number, (Integral, torch.SymInt)) or isinstance(number, bool):
        raise TypeError(f"{op}: {name} must be an int, got {number!r}; pass a whole number")


def _check(op: str, x: Tensor, integer_bits: int, fraction_bits: int, rounding: str, seed: int, offset: int) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: x must be a tensor, got {type(x).__name__}; pass a torch.Tensor")
    if x.dtype not in floats_beside(x):
        raise refusal(op, "x", x, floats_beside(x))
    check_fixed(op, integer_bits, fraction_bits)
    check_rounding(op, rounding, seed, offset)


@torch.library.register_fake("tersetorch::fixed_round")
@torch.library.register_fake("tersetorch::fixed_round_inference")
def _fake(
    x: Tensor, integer_bits: int, fraction_bits: int, rounding: str = "nearest", seed: int = 0, offset: int = 0
) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("tersetorch::fixed_round_whole")
def _fake_whole(
    x: Tensor,
    integer_bits: int,
    fraction_bits: int,
    dtype: torch.dtype,
    rounding: str = "nearest",
    seed: int = 0,
    offset: int = 0,
) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


def inside_range(x: Tensor, integer_bits: int, fraction_bits: int) -> Tensor:
    """Where rounding moves x by less than a step; False for NaN."""
    end = 2.0 ** (integer_bits - 1)
    return (x >= -end) & (x <= end - 2.0**-fraction_bits)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, integer_bits, fraction_bits, *_ = inputs
    ctx.save_for_backward(inside_range(x, integer_bits, fraction_bits))


def _backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    (inside,) = ctx.saved_tensors
    return (torch.where(inside, grad_y, 0), *[None] * 5)


torch.library.register_autograd("tersetorch::fixed_round", _backward, setup_context=_setup_context)
