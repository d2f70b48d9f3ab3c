"""Product of many dense samples with a sparse weight, both rounded to 8 bits."""

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

GROUP = 4
MAX_FEATURES = 128 * 1024
_FIX = "convert it or pack the weight again"

_matmul = torch.ops.tersetorch.blocked_int8_matmul.default
_matmul_inference = torch.ops.tersetorch.blocked_int8_matmul_inference.default
_pack = torch.ops.tersetorch.blocked_int8_pack.default


def blocked_int8_matmul(
    x: Tensor,
    block_offsets: Tensor,
    segments: Tensor,
    indices: Tensor,
    values: Tensor,
    row_scales: Tensor,
    row_sums: Tensor,
    bias: Tensor | None = None,
    *,
    out_features: int,
    column_block: int,
    relu: bool = False,
) -> Tensor:
    """Returns x @ W.T + bias, at least 0 with relu, where x too is rounded to 8 bits and all sums are of integers.

    y[n, r] = fma(sum over c of V[r, c] * q[n, c] * row_scales[r], s[n], bias[r]) with s[n] = max |x[n]| / 127 and
    q[n, c] = round(x[n, c] * (127 / max |x[n]|)), ties to even; of row_scales[r] and s[n] the smaller is multiplied
    first, so that nothing overflows before y does. The sum is exact, so that y has the same bits at every level of the
    CPU and on CUDA. Against the product with x itself and the same weight, y is off by at most
    sum over c of |V[r, c] * row_scales[r]| * s[n] / 2, and by the few roundings of the formula. A sample whose largest
    |x| is below 2**-100 counts as 0; one that holds infinity or NaN gives NaN everywhere.

    Args:
        x: float32, bfloat16 or on a CUDA device float16 [..., in], any strides, in at most 131072. Under autocast as
            csr_matmul takes it.
        block_offsets: int32 [blocks + 1], as in blocked_matmul, of words of 4 consecutive columns instead of columns.
        segments: int32 [out * column blocks], likewise.
        indices: int16 [words], likewise.
        values: int8 [words, 4], the four V of each word.
        row_scales: float32 [out].
        row_sums: int32 [out], the sum of each row of V.
        bias: float32, bfloat16 or on a CUDA device float16 [out], or None.
        out_features: rows of W.
        column_block: columns of a block, a multiple of 4 up to 32768.
        relu: whether negative results become 0; NaN stays NaN.

    Returns:
        [..., out] of x's dtype. It cannot be differentiated.

    Raises:
        TypeError: an argument is not a tensor or has another dtype than named here.
        ValueError: shapes or devices do not fit each other.
        RuntimeError: an offset, a segment or an index lies outside its range (nothing outside the tensors is read). On
            a CUDA device the rows that it reaches are NaN in y instead, as in blocked_matmul.

    Source:
        Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference
        (2018), section 2.2, symmetric; Han et al., Deep Compression (2016), for the weight.
    """
    tensors = {
        "x": (x, floats_of(x), _FIX),
        "block_offsets": (block_offsets, (torch.int32,), _FIX),
        "segments": (segments, (torch.int32,), _FIX),
        "indices": (indices, (torch.int16,), _FIX),
        "values": (values, (torch.int8,), _FIX),
        "row_scales": (row_scales, (torch.float32,), _FIX),
        "row_sums": (row_sums, (torch.int32,), _FIX),
        "bias": (bias, floats_beside(x), _FIX),
    }
    check_product("blocked_int8_matmul", x, tensors, out_features, column_block, group=GROUP)
    if x.shape[-1] > MAX_FEATURES:
        raise ValueError(
            f"blocked_int8_matmul: x must have at most {MAX_FEATURES} features, got {x.shape[-1]}; "
            "split the layer by columns"
        )
    return cast(
        Tensor,
        _matmul(
            x,
            block_offsets,
            segments,
            indices,
            values,
            row_scales,
            row_sums,
            bias,
            out_features,
            column_block,
            relu,
        ),
    )


def blocked_int8_matmul_inference(
    x: Tensor,
    block_offsets: Tensor,
    segments: Tensor,
    indices: Tensor,
    values: Tensor,
    row_scales: Tensor,
    row_sums: Tensor,
    bias: Tensor | None = None,
    *,
    out_features: int,
    column_block: int,
    relu: bool = False,
) -> Tensor:
    """Returns blocked_int8_matmul of the same arguments, without the checks in Python.

    Raises:
        RuntimeError: an argument does not fit (the native checks remain, those of every index included).
    """
    return cast(
        Tensor,
        _matmul_inference(
            x,
            block_offsets,
            segments,
            indices,
            values,
            row_scales,
            row_sums,
            bias,
            out_features,
            column_block,
            relu,
        ),
    )


def blocked_int8_pack(
    row_offsets: Tensor, col_indices: Tensor, values: Tensor, *, columns: int, column_block: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Cuts a weight in compressed sparse rows into the blocks that blocked_int8_matmul takes.

    Args:
        row_offsets: int32 [out + 1], from 0 to nnz, never falling.
        col_indices: int32 [nnz], strictly rising within a row, each in [0, columns).
        values: int8 [nnz].
        columns: width of the dense weight.
        column_block: columns of a block, a multiple of 4 up to 32768.

    Returns:
        block_offsets, segments, indices, values and row_sums, as blocked_int8_matmul describes them.

    Raises:
        TypeError: an argument has another dtype than named here.
        ValueError: column_block is out of range, or values are not one for each column index.
        RuntimeError: the positions are not those of a weight of that width.
    """
    tensors = {
        "row_offsets": (row_offsets, (torch.int32,), "convert it"),
        "col_indices": (col_indices, (torch.int32,), "convert it"),
        "values": (values, (torch.int8,), "convert it"),
    }
    check_pack("blocked_int8_pack", tensors, column_block, group=GROUP)
    packed = pack_on_cpu(_pack, row_offsets, col_indices, values, columns, column_block)
    return cast(tuple[Tensor, Tensor, Tensor, Tensor, Tensor], packed)


@torch.library.register_fake("tersetorch::blocked_int8_pack")
def _fake_pack(
    row_offsets: Tensor, col_indices: Tensor, values: Tensor, columns: int, column_block: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    layout = fake_words(row_offsets, values, columns, column_block, GROUP)
    return *layout, row_offsets.new_empty((row_offsets.shape[0] - 1,))


register_product("blocked_int8_matmul", tensors=8)
refuse_gradients("blocked_int8_matmul")
