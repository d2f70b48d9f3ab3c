"""Product of a sample with many zeros, as ReLU leaves them, with a sparse weight kept by columns."""

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tersetorch.ops._autocast import compute_in_float32
from tersetorch.ops._floats import FLOATS, floats_beside, floats_of
from tersetorch.ops.bitmap_matmul import MAX_ENTRIES, WORD, check_tensor, columns_of, is_codebook

_bitmap_columns_matmul = torch.ops.tersetorch.bitmap_columns_matmul.default
_bitmap_columns_matmul_inference = torch.ops.tersetorch.bitmap_columns_matmul_inference.default
_csr_matmul = torch.ops.tersetorch.csr_matmul.default
_csr_grad_values = torch.ops.tersetorch.csr_matmul_grad_values.default


def bitmap_columns_matmul(
    x: Tensor,
    bitmap: Tensor,
    column_offsets: Tensor,
    values: Tensor,
    bias: Tensor | None = None,
    codebook: Tensor | None = None,
    *,
    out_features: int,
    relu: bool = False,
) -> Tensor:
    """Returns x @ W.T + bias, at least 0 with relu, skipping the columns of W that meet a zero of x.

    bitmap and column_offsets are those of the transposed weight: bit j of bitmap[c, w] tells whether W[64 w + j, c] is
    stored, and the stored weights of column c are those at [column_offsets[c], column_offsets[c + 1]), in the order of
    the rows. Weight k is values[k] or codebook[values[k]]. Accumulated in float32, column after column. Weights that
    are not stored, and what meets a zero of x, count as absent. One sample after the other.

    Args:
        x: float32, bfloat16 or on a CUDA device float16 [..., in], any strides. Under autocast as csr_matmul takes it.
        bitmap: int64 [in, ceil(out_features / 64)], 0 past the last row of W.
        column_offsets: int32 [in + 1], from 0 to nnz.
        values: float32 or bfloat16 [nnz]; with a codebook, uint8 codes, each below entries.
        bias: float32, bfloat16 or on a CUDA device float16 [out_features], or None.
        codebook: float32 [entries] or [1, entries], at most 256, the first 0; or None. Up to 32 are fastest.
        out_features: rows of W.
        relu: whether negative results become 0; NaN stays NaN.

    Returns:
        [..., out_features] of x's dtype. Gradients reach x, values or codebook, and bias, to any order.

    Raises:
        TypeError: an argument is not a tensor or has another dtype than named here.
        ValueError: shapes or devices do not fit each other.
        RuntimeError: the bits of a column that is used do not count its values, or a code lies outside the codebook
            (found while multiplying; nothing outside the tensors is read), or forward-mode differentiation is asked
            for. On a CUDA device, where finding damage would make every call wait, what such a column or code reaches
            is NaN in y instead, and the first entry of codebook is not looked at.

    Source:
        Han et al., EIE: Efficient Inference Engine on Compressed Deep Neural Network (2016), section IV: columns
        broadcast the non-zero activations.
    """
    _check(x, bitmap, column_offsets, values, bias, codebook, out_features)
    if forward_ad._current_level >= 0:
        for name, tensor in (("x", x), ("values", values), ("bias", bias), ("codebook", codebook)):
            if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
                raise RuntimeError(
                    f"bitmap_columns_matmul: {name} must not carry a forward-mode tangent, got one; use reverse mode "
                    "(backward)"
                )
    return cast(Tensor, _bitmap_columns_matmul(x, bitmap, column_offsets, values, bias, codebook, out_features, relu))


def bitmap_columns_matmul_inference(
    x: Tensor,
    bitmap: Tensor,
    column_offsets: Tensor,
    values: Tensor,
    bias: Tensor | None = None,
    codebook: Tensor | None = None,
    *,
    out_features: int,
    relu: bool = False,
) -> Tensor:
    """Returns bitmap_columns_matmul of the same arguments, without gradients and without the checks in Python.

    Raises:
        RuntimeError: an argument does not fit (the native checks remain).
    """
    return cast(
        Tensor,
        _bitmap_columns_matmul_inference(x, bitmap, column_offsets, values, bias, codebook, out_features, relu),
    )


def _check(
    x: Tensor,
    bitmap: Tensor,
    column_offsets: Tensor,
    values: Tensor,
    bias: Tensor | None,
    codebook: Tensor | None,
    out_features: int,
) -> None:
    op = "bitmap_columns_matmul"
    for name, tensor, dtypes, hint in (
        ("x", x, floats_of(x), "convert it"),
        ("bitmap", bitmap, (torch.int64,), "take it from bitmap_pack"),
        ("column_offsets", column_offsets, (torch.int32,), "take it from bitmap_pack"),
        (
            "values",
            values,
            FLOATS if codebook is None else (torch.uint8,),
            "pass the codebook beside codes" if codebook is None else "pass codes, or no codebook",
        ),
        ("bias", bias, floats_beside(x), "convert it"),
        ("codebook", codebook, (torch.float32,), "convert it"),
    ):
        if tensor is None and name in ("bias", "codebook"):
            continue
        check_tensor(op, name, tensor, dtypes, hint)
        if cast(Tensor, tensor).device != x.device:
            raise ValueError(
                f"{op}: {name} must be on the device of x, {x.device}, got {cast(Tensor, tensor).device}; "
                "move one of them"
            )
    if x.dim() == 0:
        raise ValueError(f"{op}: x must be [..., in], got a scalar; reshape it")
    if out_features < 0:
        raise ValueError(f"{op}: out_features must be at least 0, got {out_features}; pass the rows of W")
    columns, words = x.shape[-1], -(-out_features // WORD)
    if tuple(bitmap.shape) != (columns, words):
        raise ValueError(
            f"{op}: bitmap must be [{columns}, {words}] for {columns} features and {out_features} outputs, got shape "
            f"{tuple(bitmap.shape)}; pass the weight that x's features fit"
        )
    for name, tensor, size in (
        ("column_offsets", column_offsets, columns + 1),
        ("values", values, None),
        ("bias", bias, out_features),
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


@torch.library.register_fake("tersetorch::bitmap_columns_matmul")
@torch.library.register_fake("tersetorch::bitmap_columns_matmul_inference")
def _fake(
    x: Tensor,
    bitmap: Tensor,
    column_offsets: Tensor,
    values: Tensor,
    bias: Tensor | None,
    codebook: Tensor | None,
    out_features: int,
    relu: bool = False,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bitmap, column_offsets, values, bias, codebook, out_features, *relu = inputs
    ctx.out_features = out_features
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, bitmap, column_offsets, values, codebook, output if relu and relu[0] else None)


def _backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    """As W^T is kept in rows, its gradients are those of csr_matmul with x and grad_y in each other's place."""
    x, bitmap, column_offsets, values, codebook, y = ctx.saved_tensors
    if y is not None:
        grad_y = torch.where(y <= 0, 0, grad_y)
    needs = (*ctx.needs_input_grad, *[False] * 8)
    grad_x = grad_values = grad_bias = grad_codebook = None
    if needs[0] or needs[3] or needs[5]:
        rows = columns_of(bitmap, column_offsets, ctx.out_features, values.shape[0])
        entries = None if codebook is None else codebook.reshape(-1)
        if needs[0]:
            grad_x = _csr_matmul(grad_y, column_offsets, rows, values, None, entries)
        if needs[3] or needs[5]:
            by_value = _csr_grad_values(x, grad_y, column_offsets, rows)
            if entries is None:
                grad_values = by_value.to(values.dtype)
            else:
                summed = torch.zeros_like(entries).index_add(0, values.int(), by_value)
                grad_codebook = summed.reshape(codebook.shape)
    if needs[4]:
        leading = tuple(range(grad_y.dim()))
        grad_bias = grad_y.unsqueeze(0).sum(leading, dtype=torch.float32).to(ctx.bias_dtype)
    return grad_x, None, None, grad_values, grad_bias, grad_codebook, None, None


torch.library.register_autograd("tersetorch::bitmap_columns_matmul", _backward, setup_context=_setup_context)


compute_in_float32("bitmap_columns_matmul")
compute_in_float32("bitmap_columns_matmul_inference")
