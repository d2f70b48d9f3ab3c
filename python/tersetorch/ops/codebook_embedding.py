"""Rows, by their indices, of a dense weight that is kept as codes into tables of a few values."""

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tersetorch.ops._floats import either, floats_beside, refusal
from tersetorch.ops.codebook_matmul import MAX_ENTRIES, codebook_row_bytes, codebook_tables

_INDICES = (torch.int64, torch.int32)

_codebook_embedding = torch.ops.tersetorch.codebook_embedding.default
_codebook_embedding_inference = torch.ops.tersetorch.codebook_embedding_inference.default
_codebook_embedding_reduce = torch.ops.tersetorch.codebook_embedding_reduce.default


def codebook_embedding(
    indices: Tensor,
    codes: Tensor,
    codebook: Tensor,
    *,
    columns: int,
    column_block: int = 0,
    padding_idx: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Returns W[indices], with W[r, c] = codebook[t, code[r, c]].

    The table t is 0 where the codebook has one, r where it has one for each row, and c // column_block where
    column_block is not 0. As bfloat16, entries are rounded to nearest, ties to even.

    Args:
        indices: int64 or int32 of any shape, each in [0, rows).
        codes: uint8 [rows, bytes], as codebook_pack lays them out for the entries of codebook and column_block.
        codebook: float32 [tables, entries], at most 256 entries.
        columns: width of the weight.
        column_block: columns that share a table, or 0.
        padding_idx: a row whose look-ups give the codebook no gradient, counted from the end where it is negative; its
            entries get that of other rows that have them.
        dtype: float32, bfloat16 or on a CUDA device float16, of the result.

    Returns:
        [*indices.shape, columns] of dtype. Gradients reach codebook: an entry gets the sum of its members', as often as
        they were looked up; and theirs in turn.

    Raises:
        TypeError: an argument is not a tensor or has another dtype than named here.
        ValueError: shapes or devices do not fit each other, or columns, column_block or padding_idx is out of range.
        RuntimeError: an index lies outside the rows or a code outside its table (nothing outside the tensors is read;
            on a CUDA device its row is NaN instead), or forward-mode differentiation is asked for.

    Source:
        torch.nn.Embedding; Han et al., Deep Compression (2016), section 3, for shared weights.
    """
    _check(indices, codes, codebook, columns, column_block, dtype)
    if padding_idx is not None and not -codes.shape[0] <= padding_idx < codes.shape[0]:
        raise ValueError(
            f"codebook_embedding: padding_idx must be a row of {codes.shape[0]}, got {padding_idx}; pass None for none"
        )
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(codebook).tangent is not None:
        raise RuntimeError(
            "codebook_embedding: codebook must not carry a forward-mode tangent, got one; use reverse mode"
        )
    padding = -1 if padding_idx is None else padding_idx % codes.shape[0]
    return cast(Tensor, _codebook_embedding(indices, codes, codebook, columns, column_block, padding, dtype))


def codebook_embedding_inference(
    indices: Tensor,
    codes: Tensor,
    codebook: Tensor,
    *,
    columns: int,
    column_block: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Returns codebook_embedding of the same arguments, without gradients and without the checks in Python.

    Raises:
        RuntimeError: an argument does not fit (the native checks remain, those of indices and codes included).
    """
    return cast(Tensor, _codebook_embedding_inference(indices, codes, codebook, columns, column_block, -1, dtype))


def _check(
    indices: Tensor, codes: Tensor, codebook: Tensor, columns: int, column_block: int, dtype: torch.dtype
) -> None:
    op = "codebook_embedding"
    for name, tensor, dtypes, hint in (
        ("indices", indices, _INDICES, "convert them"),
        ("codes", codes, (torch.uint8,), "take them from codebook_pack"),
        ("codebook", codebook, (torch.float32,), "convert it"),
    ):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}; pass a torch.Tensor")
        if tensor.dtype not in dtypes:
            raise refusal(op, name, tensor, dtypes, hint)
        if tensor.device != codes.device:
            raise ValueError(
                f"{op}: {name} must be on the device of codes, {codes.device}, got {tensor.device}; move one of them"
            )
    if dtype not in floats_beside(indices):
        raise TypeError(f"{op}: dtype must be {either(floats_beside(indices))}, got {dtype}; convert the result")
    if codebook.dim() != 2 or not 1 <= codebook.shape[1] <= MAX_ENTRIES:
        raise ValueError(
            f"{op}: codebook must be [tables, entries] with 1 to {MAX_ENTRIES} entries, got shape "
            f"{tuple(codebook.shape)}; share the weight with at most 8 bits"
        )
    if columns < 0 or column_block < 0:
        raise ValueError(
            f"{op}: columns and column_block must be at least 0, got {columns} and {column_block}; pass the weight's"
        )
    row_bytes = codebook_row_bytes(codebook.shape[1], columns, column_block)
    if codes.dim() != 2 or codes.shape[1] != row_bytes:
        raise ValueError(
            f"{op}: codes must be [rows, {row_bytes}] for {columns} columns and {codebook.shape[1]} entries, got shape "
            f"{tuple(codes.shape)}; pass what codebook_pack made of such a weight"
        )
    tables = codebook_tables(codes.shape[0], columns, column_block)
    if codebook.shape[0] not in tables:
        raise ValueError(
            f"{op}: codebook must have {' or '.join(map(str, dict.fromkeys(tables)))} tables, got {codebook.shape[0]}; "
            "pass the codebook that the codes were made with"
        )


@torch.library.register_fake("tersetorch::codebook_embedding")
@torch.library.register_fake("tersetorch::codebook_embedding_inference")
def _fake(
    indices: Tensor,
    codes: Tensor,
    codebook: Tensor,
    columns: int,
    column_block: int = 0,
    padding_idx: int = -1,
    dtype: torch.dtype | None = None,
) -> Tensor:
    return codebook.new_empty((*indices.shape, columns), dtype=dtype)


@torch.library.register_fake("tersetorch::codebook_embedding_reduce")
def _fake_reduce(
    grad: Tensor,
    indices: Tensor,
    codes: Tensor,
    tables: int,
    entries: int,
    column_block: int = 0,
    padding_idx: int = -1,
) -> Tensor:
    return grad.new_empty((tables, entries))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    defaults = (0, -1, None)
    indices, codes, codebook, _, ctx.column_block, ctx.padding, _ = inputs + defaults[len(inputs) - 4 :]
    ctx.tables = tuple(codebook.shape)
    ctx.save_for_backward(indices, codes)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    indices, codes = ctx.saved_tensors
    sums = _codebook_embedding_reduce(grad.float(), indices, codes, *ctx.tables, ctx.column_block, ctx.padding)
    return None, None, sums, None, None, None, None


def _setup_reduce(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    defaults = (0, -1)
    grad, indices, codes, _, _, ctx.column_block, ctx.padding = inputs + defaults[len(inputs) - 5 :]
    ctx.columns = grad.shape[-1]
    ctx.save_for_backward(indices, codes)


def _backward_reduce(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    indices, codes = ctx.saved_tensors
    rows = _codebook_embedding(indices, codes, grad.contiguous(), ctx.columns, ctx.column_block, ctx.padding)
    return rows.masked_fill((indices == ctx.padding).unsqueeze(-1), 0.0), None, None, None, None, None, None


torch.library.register_autograd("tersetorch::codebook_embedding", _backward, setup_context=_setup_context)
torch.library.register_autograd("tersetorch::codebook_embedding_reduce", _backward_reduce, setup_context=_setup_reduce)
