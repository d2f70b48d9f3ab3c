"""Product of whole numbers in fixed point: exact sums, one conversion for each dot product."""

from typing import cast

import torch
from torch import Tensor

from tersetorch.ops.fixed_round import check_fixed, check_rounding, whole_dtype

MAX_SUM_BITS = 30
_WHOLE = (torch.int8, torch.int16)
_ROOM = {torch.int8: 8, torch.int16: 16, torch.int32: 32, torch.float32: 32}
_fixed_matmul = torch.ops.tersetorch.fixed_matmul.default


def fixed_matmul(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    sum_fraction_bits: int,
    integer_bits: int,
    fraction_bits: int,
    rounding: str = "nearest",
    seed: int = 0,
    offset: int = 0,
    dtype: torch.dtype | None = None,
    relu: bool = False,
) -> Tensor:
    """Returns x @ weight.T + bias of whole numbers, exactly, each sum then rounded once to fixed point <IL,FL>.

    x counts steps of 2^-Fx and weight steps of 2^-Fw, as fixed_round_whole returns them; their sums, and bias, count
    steps of 2^-(Fx + Fw). Lanes of int8 products are 32 bits and of int16 products 64 where they could overflow, so
    that every level, device and number of threads gives the same bits. Rounding is fixed_round's, of the exact sum.

    Args:
        x: int8 or int16 [..., in], any strides.
        weight: int8 or int16 [out, in], in < 2^24. Where only one of them is int16, the other is widened.
        bias: int64 [out], or None for 0; beyond +-2^61 it counts as that.
        sum_fraction_bits: Fx + Fw, from 0 to 30.
        integer_bits: IL of the result, with FL as fixed_round takes them.
        fraction_bits: FL of the result.
        rounding: "nearest" or "stochastic".
        seed: of the random bits; value i in row-major order of the result takes those of number offset + i.
        offset: at least 0.
        dtype: int8, int16 or int32, wide enough for IL + FL bits, for steps of 2^-FL; float32 for the numbers
            themselves; the narrowest of the first three when left out.
        relu: whether negative results become 0.

    Returns:
        [..., out] of dtype, without gradients.

    Raises:
        TypeError: an argument is no tensor, or has another dtype than named here.
        ValueError: shapes or devices do not fit each other, or there is no such format, rounding or dtype.

    Source:
        Gupta et al., Deep Learning with Limited Numerical Precision (2015), section 3.2.
    """
    op = "fixed_matmul"
    for name, tensor, dtypes in (("x", x, _WHOLE), ("weight", weight, _WHOLE), ("bias", bias, (torch.int64,))):
        if tensor is None and name == "bias":
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}; pass a torch.Tensor")
        if tensor.dtype not in dtypes:
            allowed = " or ".join(str(one).removeprefix("torch.") for one in dtypes)
            raise TypeError(f"{op}: {name} must be {allowed}, got {tensor.dtype}; convert it")
        if tensor.device != x.device:
            raise ValueError(
                f"{op}: {name} must be on the device of x, {x.device}, got {tensor.device}; move one of them"
            )
    if x.dim() == 0 or weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"{op}: x must be [..., in] and weight [out, in], got shapes {tuple(x.shape)} and {tuple(weight.shape)}; "
            "pass x with as many features as weight has columns"
        )
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(
            f"{op}: bias must be [{weight.shape[0]}], got shape {tuple(bias.shape)}; pass one for each row"
        )
    check_fixed(op, integer_bits, fraction_bits)
    check_rounding(op, rounding, seed, offset)
    if not 0 <= sum_fraction_bits <= MAX_SUM_BITS:
        raise ValueError(
            f"{op}: sum_fraction_bits must lie in [0, {MAX_SUM_BITS}], got {sum_fraction_bits}; pass the fraction bits "
            "of x and of weight together"
        )
    bits = integer_bits + fraction_bits
    if dtype is None:
        dtype = whole_dtype(bits)
    if _ROOM.get(dtype, 0) < bits:
        raise ValueError(
            f"{op}: dtype must be float32, int8, int16 or int32 and hold {bits} bits, got {dtype}; leave it out"
        )
    sizes = (sum_fraction_bits, integer_bits, fraction_bits)
    return cast(Tensor, _fixed_matmul(x, weight, bias, *sizes, dtype, rounding, seed, offset, relu))


@torch.library.register_fake("tersetorch::fixed_matmul")
def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sum_fraction_bits: int,
    integer_bits: int,
    fraction_bits: int,
    dtype: torch.dtype,
    rounding: str = "nearest",
    seed: int = 0,
    offset: int = 0,
    relu: bool = False,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype)
