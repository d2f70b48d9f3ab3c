"""Product of many dense samples with a sparse weight, both in bfloat16."""

from typing import cast

import torch
from torch import Tensor

from tersetorch.ops._blocked_products import (
    check_pack,
    check_product,
    fake_words,
    refuse_gradients,
    register_product,
)
from tersetorch.ops._floats import floats_beside, floats_of
from tersetorch.ops._packing import pack_on_cpu

GROUP = 2
_FIX = "convert it or pack the weight again"

_matmul = torch.ops.tersetorch.blocked_bfloat16_matmul.default
_matmul_inference = torch.ops.tersetorch.blocked_bfloat16_matmul_inference.default
_pack = torch.ops.tersetorch.blocked_bfloat16_pack.default


def blocked_bfloat16_matmul(
    x: Tensor,
    block_offsets: Tensor,
    segments: Tensor,
    indices: Tensor,
    values: Tensor,
    bias: Tensor | None = None,
    *,
    out_features: int,
    column_block: int,
    relu: bool = False,
) -> Tensor:
    """Returns x @ W.T + bias, at least 0 with relu, with x rounded to bfloat16, nearest and ties to even.

    Products of two bfloat16 are exact in float32, in which they are accumulated; bfloat16 instructions take numbers
    below 2**-126 as 0. Against the product with x itself, y is off by at most sum over c of |W[r, c] * x[n, c]| * 2**-8
    and by the roundings of a float32 sum. Columns that share a word with a stored weight are multiplied by 0, so that
    infinity or NaN there gives NaN, as in a dense product.

    Args:
        x: float32, bfloat16 or on a CUDA device float16 [..., in], any strides. Under autocast as csr_matmul takes it.
        block_offsets: int32 [blocks + 1], as in blocked_matmul, of words of 2 consecutive columns instead of columns.
        segments: int32 [out * column blocks], likewise.
        indices: int16 [words], likewise.
        values: bfloat16 [words, 2], the two weights of each word.
        bias: float32, bfloat16 or on a CUDA device float16 [out], or None.
        out_features: rows of W.
        column_block: columns of a block, a multiple of 2 up to 32768.
        relu: whether negative results become 0; NaN stays NaN.

    Returns:
        [..., out] of x's dtype. It cannot be differentiated.

    Raises:
        TypeError: an argument is not a tensor or has another dtype than named here.
        ValueError: shapes or devices do not fit each other.
        RuntimeError: an offset, a segment or an index lies outside its range (nothing outside the tensors is read). On
            a CUDA device the rows that it reaches are NaN in y instead, as in blocked_matmul.
    """
    tensors = {
        "x": (x, floats_of(x), _FIX),
        "block_offsets": (block_offsets, (torch.int32,), _FIX),
        "segments": (segments, (torch.int32,), _FIX),
        "indices": (indices, (torch.int16,), _FIX),
        "values": (values, (torch.bfloat16,), _FIX),
        "bias": (bias, floats_beside(x), _FIX),
    }
    check_product("blocked_bfloat16_matmul", x, tensors, out_features, column_block, group=GROUP)
    return cast(Tensor, _matmul(x, block_offsets, segments, indices, values, bias, out_features, column_block, relu))


def blocked_bfloat16_matmul_inference(
    x: Tensor,
    block_offsets: Tensor,
    segments: Tensor,
    indices: Tensor,
    values: Tensor,
    bias: Tensor | None = None,
    *,
    out_features: int,
    column_block: int,
    relu: bool = False,
) -> Tensor:
    """Returns blocked_bfloat16_matmul of the same arguments, without the checks in Python.

    Raises:
        RuntimeError: an argument does not fit (the native checks remain, those of every index included).
    """
    return cast(
        Tensor,
        _matmul_inference(x, block_offsets, segments, indices, values, bias, out_features, column_block, relu),
    )


def blocked_bfloat16_pack(
    row_offsets: Tensor, col_indices: Tensor, values: Tensor, *, columns: int, column_block: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cuts a weight in compressed sparse rows into the blocks that blocked_bfloat16_matmul takes.

    Args:
        row_offsets: int32 [out + 1], from 0 to nnz, never falling.
        col_indices: int32 [nnz], strictly rising within a row, each in [0, columns).
        values: bfloat16 [nnz].
        columns: width of the dense weight.
        column_block: columns of a block, a multiple of 2 up to 32768.

    Returns:
        block_offsets, segments, indices and values, as blocked_bfloat16_matmul describes them.

    Raises:
        TypeError: an argument has another dtype than named here.
        ValueError: column_block is out of range, or values are not one for each column index.
        RuntimeError: the positions are not those of a weight of that width.
    """
    tensors = {
        "row_offsets": (row_offsets, (torch.int32,), "convert it"),
        "col_indices": (col_indices, (torch.int32,), "convert it"),
        "values": (values, (torch.bfloat16,), "convert it"),
    }
    check_pack("blocked_bfloat16_pack", tensors, column_block, group=GROUP)
    packed = pack_on_cpu(_pack, row_offsets, col_indices, values, columns, column_block)
    return cast(tuple[Tensor, Tensor, Tensor, Tensor], packed)


@torch.library.register_fake("tersetorch::blocked_bfloat16_pack")
def _fake_pack(
    row_offsets: Tensor, col_indices: Tensor, values: Tensor, columns: int, column_block: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return fake_words(row_offsets, values, columns, column_block, GROUP)


register_product("blocked_bfloat16_matmul", tensors=6)
refuse_gradients("blocked_bfloat16_matmul")
