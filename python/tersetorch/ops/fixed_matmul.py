"""Product of whole numbers in fixed point: exact sums, one conversion for each dot product."""

from typing import cast

import torch
from torch import Tensor

from tersetorch.ops._packing import pack_on_cpu
from tersetorch.ops.fixed_round import check_fixed, check_int, check_rounding, whole_dtype

MAX_SUM_BITS = 30
_WHOLE = (torch.int8, torch.int16)
_ROOM = {torch.int8: 8, torch.int16: 16, torch.int32: 32, torch.float32: 32}
_fixed_pack = torch.ops.tersetorch.fixed_pack.default
_fixed_matmul = torch.ops.tersetorch.fixed_matmul.default


def fixed_pack(weight: Tensor, segments: int = 1) -> Tensor:
    """Returns a weight in the order in which products with it read it, the same for every CPU level and device.

    Args:
        weight: int8 or int16 [out, in], any strides, in < 2^24.
        segments: how many equal parts in has, each of which is filled up to whole words of 4 bytes: 1 for fixed_matmul.

    Returns:
        [panels, words + 1, 16, numbers] of weight's dtype: panels of 16 rows, words of 4 bytes, hence 4 numbers of int8
        or 2 of int16; after them for each row another word, int32: the sum of its int8, or the largest of its |int16|.

    Raises:
        TypeError: weight is no tensor, or neither int8 nor int16.
        ValueError: weight is no matrix, or segments do not divide its columns.
    """
    op = "fixed_pack"
    check_whole(op, "weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"{op}: weight must be [out, in], got shape {tuple(weight.shape)}; flatten it")
    check_int(op, "segments", segments)
    if segments < 1 or weight.shape[1] % segments:
        raise ValueError(
            f"{op}: segments must divide the columns of weight, {weight.shape[1]}, got {segments}; "
            "pass the taps of the kernel"
        )
    return pack_on_cpu(_fixed_pack, weight, segments)[0]


def fixed_matmul(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None = None,
    *,
    rows: int,
    sum_fraction_bits: int,
    integer_bits: int,
    fraction_bits: int,
    rounding: str = "nearest",
    seed: int = 0,
    offset: int = 0,
    dtype: torch.dtype | None = None,
    relu: bool = False,
) -> Tensor:
    """Returns x @ W.T + bias of whole numbers, exactly, each sum then rounded once to fixed point <IL,FL>.

    x counts steps of 2^-Fx and W steps of 2^-Fw, as fixed_round_whole returns them; their sums, and bias, count
    steps of 2^-(Fx + Fw). Products are added in 32 bits as long as these cannot overflow, then in 64, so that every
    level, device and number of threads gives the same bits. Rounding is fixed_round's, of the exact sum.

    Args:
        x: int8 or int16 [..., in], any strides.
        packed: what fixed_pack returns for W, int8 or int16 [out, in], in < 2^24: int16 where x is.
        bias: int64 [out], or None for 0; beyond +-2^61 it counts as that.
        rows: out.
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
    check_whole(op, "x", x)
    check_int(op, "rows", rows)
    columns = x.shape[-1] if x.dim() else -1
    dtype = check_product(
        op, x, packed, bias, rows, 1, 1, columns, sum_fraction_bits, integer_bits, fraction_bits, dtype, relu
    )
    check_rounding(op, rounding, seed, offset)
    sizes = (sum_fraction_bits, integer_bits, fraction_bits)
    return cast(Tensor, _fixed_matmul(x, packed, bias, rows, *sizes, dtype, rounding, seed, offset, relu))


def check_whole(op: str, name: str, tensor: object) -> None:
    """Refuses what is no tensor of int8 or int16."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}; pass a torch.Tensor")
    if tensor.dtype not in _WHOLE:
        raise TypeError(f"{op}: {name} must be int8 or int16, got {tensor.dtype}; convert it")


def check_product(
    op: str,
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    rows: int,
    groups: int,
    segments: int,
    segment: int,
    sum_fraction_bits: int,
    integer_bits: int,
    fraction_bits: int,
    dtype: torch.dtype | None,
    relu: bool,
) -> torch.dtype:
    """Refuses what does not fit x, whose samples are `segments` of `segment` numbers; returns the dtype of the result.

    Raises:
        TypeError, ValueError: as fixed_matmul does.
    """
    check_whole(op, "packed", packed)
    if bias is not None and not (isinstance(bias, Tensor) and bias.dtype == torch.int64):
        got = bias.dtype if isinstance(bias, Tensor) else type(bias).__name__
        raise TypeError(f"{op}: bias must be int64, in units of the sums, got {got}; convert it")
    if x.dtype == torch.int16 and packed.dtype == torch.int8:
        raise TypeError(f"{op}: packed must be int16 like x, got torch.int8; pack the weight as int16")
    for name, tensor in (("packed", packed), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(
                f"{op}: {name} must be on the device of x, {x.device}, got {tensor.device}; move one of them"
            )
    words = -(-segment // (4 // packed.element_size()))
    if segment < 0 or packed.shape[:3] != (groups * -(-rows // groups // 16), segments * words + 1, 16):
        raise ValueError(
            f"{op}: packed must be what packing returns for {rows} rows of the numbers of a sample of x, got shapes "
            f"{tuple(packed.shape)} and {tuple(x.shape)}; pass x with as many features as the weight has columns"
        )
    if bias is not None and tuple(bias.shape) != (rows,):
        raise ValueError(f"{op}: bias must be [{rows}], got shape {tuple(bias.shape)}; pass one for each row")
    check_fixed(op, integer_bits, fraction_bits)
    check_int(op, "sum_fraction_bits", sum_fraction_bits)
    if not 0 <= sum_fraction_bits <= MAX_SUM_BITS:
        raise ValueError(
            f"{op}: sum_fraction_bits must lie in [0, {MAX_SUM_BITS}], got {sum_fraction_bits}; pass the fraction bits "
            "of x and of the weight together"
        )
    bits = integer_bits + fraction_bits
    if dtype is None:
        dtype = whole_dtype(bits)
    if not isinstance(dtype, torch.dtype) or _ROOM.get(dtype, 0) < bits:
        raise ValueError(
            f"{op}: dtype must be float32, int8, int16 or int32 and hold {bits} bits, got {dtype}; leave it out"
        )
    if not isinstance(relu, bool):
        raise TypeError(f"{op}: relu must be True or False, got {relu!r}; pass one of these")
    return dtype


@torch.library.register_fake("tersetorch::fixed_pack")
def _fake_pack(weight: Tensor, segments: int = 1) -> Tensor:
    of_word = 4 // weight.element_size()
    words = segments * -(-(weight.shape[1] // segments) // of_word)
    return weight.new_empty((-(-weight.shape[0] // 16), words + 1, 16, of_word))


@torch.library.register_fake("tersetorch::fixed_matmul")
def _fake(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    rows: int,
    sum_fraction_bits: int,
    integer_bits: int,
    fraction_bits: int,
    dtype: torch.dtype,
    rounding: str = "nearest",
    seed: int = 0,
    offset: int = 0,
    relu: bool = False,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows), dtype=dtype)
