"""Product of few dense samples with a sparse weight that is kept as one bit for each weight and its non-zeros."""

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tersetorch.ops._autocast import compute_in_float32
from tersetorch.ops._floats import FLOATS, floats_beside, floats_of, refusal
from tersetorch.ops._packing import pack_on_cpu

MAX_ENTRIES = 256
MODES = ("exact", "int8")
WORD = 64

_bitmap_matmul = torch.ops.tersetorch.bitmap_matmul.default
_bitmap_matmul_inference = torch.ops.tersetorch.bitmap_matmul_inference.default
_bitmap_pack = torch.ops.tersetorch.bitmap_pack.default
_bitmap_from_rows = torch.ops.tersetorch.bitmap_from_rows.default
_bitmap_to_rows = torch.ops.tersetorch.bitmap_to_rows.default
_csr_grad_x = torch.ops.tersetorch.csr_matmul_grad_x.default
_csr_grad_values = torch.ops.tersetorch.csr_matmul_grad_values.default


def bitmap_matmul(
    x: Tensor,
    bitmap: Tensor,
    row_offsets: Tensor,
    values: Tensor,
    bias: Tensor | None = None,
    codebook: Tensor | None = None,
    scales: Tensor | None = None,
    mode: str = "exact",
    relu: bool = False,
) -> Tensor:
    """Returns x @ W.T + bias, at least 0 with relu, for a W kept as a bitmap and its non-zeros.

    Bit j of bitmap[r, w] tells whether W[r, 64 w + j] is stored; the stored weights of row r are those at
    [row_offsets[r], row_offsets[r + 1]), in the order of the columns. Weight k is values[k], codebook[values[k]] or
    scales[r] * values[k]. Accumulated in float32. Weights that are not stored count as absent, not as zero. Made for
    1 to 4 samples; more are multiplied 4 at a time.

    In mode "int8" x is rounded too: sample n to q = x / s to the nearest integer with s = max |x| / 127, and y[n, r] =
    s * scales[r] * sum of values[k] * q + bias[r], the sum being exact. Each product is then off by at most
    s / 2 * |W[r, c]|, a hundredth of y as a rule. A sample with an infinity or NaN gives NaN.

    Args:
        x: float32, bfloat16 or on a CUDA device float16 [..., in], any strides. Under autocast as csr_matmul takes it.
        bitmap: int64 [out, ceil(in / 64)], 0 past the last column.
        row_offsets: int32 [out + 1], from 0 to nnz.
        values: float32, bfloat16, or int8 beside scales [nnz]; with a codebook, uint8 codes, each below entries.
        bias: float32, bfloat16 or on a CUDA device float16 [out], or None.
        codebook: float32 [entries] or [1, entries], at most 256, the first 0; or None. Up to 32 are fastest.
        scales: float32 [out], or None.
        mode: "exact", or "int8" for int8 values and at most 131,072 features.
        relu: whether negative results become 0; NaN stays NaN.

    Returns:
        [..., out] of x's dtype. In mode "exact" gradients reach x, float values or codebook, and bias, once; they take
        compressed rows, which are built anew at each call: to train, use csr_matmul.

    Raises:
        TypeError: an argument is not a tensor or has another dtype than named here.
        ValueError: shapes, devices or the mode do not fit each other.
        RuntimeError: a row's bits do not count its values, or a code lies outside the codebook (found while
            multiplying; nothing outside the tensors is read), or forward-mode differentiation is asked for, or
            gradients in mode "int8". On a CUDA device, where finding damage would make every call wait, such a row is
            NaN in y instead, and the first entry of codebook is not looked at.

    Source:
        Rhu et al., Compressing DMA Engine (2018), section IV, for the bitmap; Han et al., EIE (2016), for compressed
        layers at one sample.
    """
    _check(x, bitmap, row_offsets, values, bias, codebook, scales, mode)
    if forward_ad._current_level >= 0:
        for name, tensor in (("x", x), ("values", values), ("bias", bias), ("codebook", codebook)):
            if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
                raise RuntimeError(
                    f"bitmap_matmul: {name} must not carry a forward-mode tangent, got one; use reverse mode (backward)"
                )
    return cast(Tensor, _bitmap_matmul(x, bitmap, row_offsets, values, bias, codebook, scales, mode, relu))


def bitmap_matmul_inference(
    x: Tensor,
    bitmap: Tensor,
    row_offsets: Tensor,
    values: Tensor,
    bias: Tensor | None = None,
    codebook: Tensor | None = None,
    scales: Tensor | None = None,
    mode: str = "exact",
    relu: bool = False,
) -> Tensor:
    """Returns bitmap_matmul of the same arguments, without gradients and without the checks in Python.

    Raises:
        RuntimeError: an argument does not fit (the native checks remain, those of every row included).
    """
    return cast(Tensor, _bitmap_matmul_inference(x, bitmap, row_offsets, values, bias, codebook, scales, mode, relu))


def bitmap_pack(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Takes the non-zeros out of a dense weight; 0.0 and -0.0 are left out, NaN is kept.

    Args:
        weight: float32 or bfloat16 [out, in].

    Returns:
        bitmap int64 [out, ceil(in / 64)], row_offsets int32 [out + 1] and values [nnz], as bitmap_matmul takes them.

    Raises:
        TypeError: weight is not a float32 or bfloat16 tensor.
        ValueError: weight is not 2-D.
        RuntimeError: weight holds 2**31 or more non-zeros.
    """
    check_tensor("bitmap_pack", "weight", weight, FLOATS, "convert it")
    if weight.dim() != 2:
        raise ValueError(f"bitmap_pack: weight must be [out, in], got shape {tuple(weight.shape)}; reshape it")
    bitmap, row_offsets, values = pack_on_cpu(_bitmap_pack, weight.detach())
    return bitmap, row_offsets, values


def bitmap_from_rows(row_offsets: Tensor, col_indices: Tensor, *, columns: int) -> Tensor:
    """The bitmap of compressed sparse rows, int64 [out, ceil(columns / 64)]; their values are in its order already.

    Args:
        row_offsets: int32 [out + 1], from 0 to nnz, never falling.
        col_indices: int32 [nnz], strictly rising within a row, each in [0, columns).
        columns: width of the dense weight.

    Raises:
        TypeError: an argument has another dtype than named here.
        RuntimeError: the positions are not those of a weight of that width.
    """
    for name, tensor in (("row_offsets", row_offsets), ("col_indices", col_indices)):
        check_tensor("bitmap_from_rows", name, tensor, (torch.int32,), "convert it")
    (bitmap,) = pack_on_cpu(_bitmap_from_rows, row_offsets, col_indices, columns)
    return bitmap


def bitmap_to_rows(bitmap: Tensor, row_offsets: Tensor, *, columns: int, nnz: int) -> Tensor:
    """The col_indices, int32 [nnz], of a bitmap with those row_offsets: bitmap_from_rows undone.

    Raises:
        TypeError: an argument has another dtype than bitmap_matmul names.
        RuntimeError: a row's bits do not count its values, or one lies past the last column.
    """
    check_tensor("bitmap_to_rows", "bitmap", bitmap, (torch.int64,), "take it from bitmap_pack")
    check_tensor("bitmap_to_rows", "row_offsets", row_offsets, (torch.int32,), "take it from bitmap_pack")
    (col_indices,) = pack_on_cpu(_bitmap_to_rows, bitmap, row_offsets, columns, nnz)
    return col_indices


def columns_of(bitmap: Tensor, row_offsets: Tensor, columns: int, nnz: int) -> Tensor:
    """bitmap_to_rows where the weight lies: on a CUDA device a damaged row has columns -1."""
    return cast(Tensor, _bitmap_to_rows(bitmap, row_offsets, columns, nnz))


def check_tensor(op: str, name: str, tensor: object, dtypes: tuple[torch.dtype, ...], hint: str) -> None:
    """Raises TypeError when tensor is none, or has none of dtypes."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}; pass a torch.Tensor")
    if tensor.dtype not in dtypes:
        raise refusal(op, name, tensor, dtypes, hint)


def is_codebook(codebook: Tensor) -> bool:
    """Whether codebook is [entries] or [1, entries] with at most 256 entries."""
    return (codebook.dim() == 1 or (codebook.dim() == 2 and codebook.shape[0] == 1)) and codebook.numel() <= MAX_ENTRIES


def _check(
    x: Tensor,
    bitmap: Tensor,
    row_offsets: Tensor,
    values: Tensor,
    bias: Tensor | None,
    codebook: Tensor | None,
    scales: Tensor | None,
    mode: str,
) -> None:
    op = "bitmap_matmul"
    if mode not in MODES:
        raise ValueError(f"{op}: mode must be one of {list(MODES)}, got {mode!r}; choose one of them")
    if codebook is not None:
        values_dtypes: tuple[torch.dtype, ...] = (torch.uint8,)
        hint = "pass codes, or no codebook"
    elif scales is not None:
        values_dtypes, hint = (torch.int8,), "pass int8 values, or no scales"
    else:
        values_dtypes, hint = FLOATS, "pass the codebook or the scales that go with them"
    for name, tensor, dtypes, how in (
        ("x", x, floats_of(x), "convert it"),
        ("bitmap", bitmap, (torch.int64,), "take it from bitmap_pack"),
        ("row_offsets", row_offsets, (torch.int32,), "take it from bitmap_pack"),
        ("values", values, values_dtypes, hint),
        ("bias", bias, floats_beside(x), "convert it"),
        ("codebook", codebook, (torch.float32,), "convert it"),
        ("scales", scales, (torch.float32,), "convert it"),
    ):
        if tensor is None and name in ("bias", "codebook", "scales"):
            continue
        check_tensor(op, name, tensor, dtypes, how)
        if cast(Tensor, tensor).device != x.device:
            raise ValueError(
                f"{op}: {name} must be on the device of x, {x.device}, got {cast(Tensor, tensor).device}; "
                "move one of them"
            )
    if x.dim() == 0:
        raise ValueError(f"{op}: x must be [..., in], got a scalar; reshape it")
    words = -(-x.shape[-1] // WORD)
    if bitmap.dim() != 2 or bitmap.shape[1] != words:
        raise ValueError(
            f"{op}: bitmap must be [out, {words}] for {x.shape[-1]} features, got shape {tuple(bitmap.shape)}; "
            "pass the weight that x's features fit"
        )
    rows = bitmap.shape[0]
    for name, tensor, size in (
        ("row_offsets", row_offsets, rows + 1),
        ("values", values, None),
        ("bias", bias, rows),
        ("scales", scales, rows),
    ):
        if tensor is not None and (tensor.dim() != 1 or (size is not None and tensor.shape[0] != size)):
            raise ValueError(
                f"{op}: {name} must be [{'nnz' if size is None else size}], got shape {tuple(tensor.shape)}; "
                "pass those of one weight"
            )
    if codebook is not None and not is_codebook(codebook):
        raise ValueError(
            f"{op}: codebook must be [entries] with at most {MAX_ENTRIES} entries, got shape "
            f"{tuple(codebook.shape)}; pass one group of a codebook"
        )
    if codebook is not None and scales is not None:
        raise ValueError(f"{op}: scales must be None beside a codebook, got both; pass one of them")
    if mode == "int8" and scales is None:
        raise ValueError(f"{op}: mode 'int8' must come with int8 values and scales, got none; round the weight first")


@torch.library.register_fake("tersetorch::bitmap_matmul")
@torch.library.register_fake("tersetorch::bitmap_matmul_inference")
def _fake(
    x: Tensor,
    bitmap: Tensor,
    row_offsets: Tensor,
    values: Tensor,
    bias: Tensor | None = None,
    codebook: Tensor | None = None,
    scales: Tensor | None = None,
    mode: str = "exact",
    relu: bool = False,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], bitmap.shape[0]))


@torch.library.register_fake("tersetorch::bitmap_pack")
def _fake_pack(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    nnz = torch.library.get_ctx().new_dynamic_size()
    rows, columns = weight.shape
    return (
        weight.new_empty((rows, (columns + WORD - 1) // WORD), dtype=torch.int64),
        weight.new_empty((rows + 1,), dtype=torch.int32),
        weight.new_empty((nnz,)),
    )


@torch.library.register_fake("tersetorch::bitmap_from_rows")
def _fake_from_rows(row_offsets: Tensor, col_indices: Tensor, columns: int) -> Tensor:
    return row_offsets.new_empty((row_offsets.shape[0] - 1, (columns + WORD - 1) // WORD), dtype=torch.int64)


@torch.library.register_fake("tersetorch::bitmap_to_rows")
def _fake_to_rows(bitmap: Tensor, row_offsets: Tensor, columns: int, nnz: int) -> Tensor:
    return row_offsets.new_empty((nnz,))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    defaults: tuple[Any, ...] = (None, None, None, "exact", False)
    x, bitmap, row_offsets, values, bias, codebook, scales, mode, relu = inputs + defaults[len(inputs) - 4 :]
    ctx.mode = mode
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, bitmap, row_offsets, values, codebook, scales, output if relu else None)


def _backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of csr_matmul on the same weight."""
    x, bitmap, row_offsets, values, codebook, scales, y = ctx.saved_tensors
    if ctx.mode != "exact":
        raise RuntimeError(
            f"bitmap_matmul: mode must be 'exact' to compute gradients, got {ctx.mode!r}; rounding has none"
        )
    if y is not None:
        grad_y = torch.where(y <= 0, 0, grad_y)
    needs = (*ctx.needs_input_grad, *[False] * 5)
    grad_x = grad_values = grad_bias = grad_codebook = None
    if needs[0] or needs[3] or needs[5]:
        col_indices = columns_of(bitmap, row_offsets, x.shape[-1], values.shape[0])
        entries = None if codebook is None else codebook.reshape(-1)
        if needs[0]:
            weights = values
            if scales is not None:
                row_of = torch.repeat_interleave(row_offsets.diff().long(), output_size=values.shape[0])
                weights = values * scales[row_of]
            grad_x = _csr_grad_x(grad_y, row_offsets, col_indices, weights, x.shape[-1], entries)
        if needs[3] or needs[5]:
            by_value = _csr_grad_values(grad_y, x, row_offsets, col_indices)
            if entries is None:
                grad_values = by_value.to(values.dtype)
            else:
                summed = torch.zeros_like(entries).index_add(0, values.int(), by_value)
                grad_codebook = summed.reshape(codebook.shape)
    if needs[4]:
        leading = tuple(range(grad_y.dim()))
        grad_bias = grad_y.unsqueeze(0).sum(leading, dtype=torch.float32).to(ctx.bias_dtype)
    return grad_x, None, None, grad_values, grad_bias, grad_codebook, None, None, None


torch.library.register_autograd("tersetorch::bitmap_matmul", _backward, setup_context=_setup_context)


compute_in_float32("bitmap_matmul")
compute_in_float32("bitmap_matmul_inference")
