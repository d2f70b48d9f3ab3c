"""Product of many dense samples with a sparse weight that is cut into blocks."""

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tersetorch.ops._blocked_products import (
    BLOCK_ROWS,
    MAX_COLUMN_BLOCK,
    Taken,
    check_pack,
    check_product,
    fake_layout,
    register_product,
)
from tersetorch.ops._floats import FLOATS, floats_beside, floats_of
from tersetorch.ops._packing import pack_on_cpu

__all__ = [
    "BLOCK_ROWS",
    "MAX_COLUMN_BLOCK",
    "blocked_matmul",
    "blocked_matmul_inference",
    "blocked_pack",
    "blocked_positions",
]

MAX_ENTRIES = 256

_blocked_matmul = torch.ops.tersetorch.blocked_matmul.default
_blocked_matmul_inference = torch.ops.tersetorch.blocked_matmul_inference.default
_blocked_pack = torch.ops.tersetorch.blocked_pack.default
_csr_grad_x = torch.ops.tersetorch.csr_matmul_grad_x.default
_csr_grad_values = torch.ops.tersetorch.csr_matmul_grad_values.default


def blocked_matmul(
    x: Tensor,
    block_offsets: Tensor,
    segments: Tensor,
    indices: Tensor,
    values: Tensor,
    bias: Tensor | None = None,
    codebook: Tensor | None = None,
    *,
    out_features: int,
    column_block: int,
    relu: bool = False,
) -> Tensor:
    """Returns x @ W.T + bias, at least 0 with relu, for a W that blocked_pack has cut into blocks.

    A block has 256 rows and column_block columns; blocks follow each other by rows, then by columns, the last ones of
    both being smaller. Accumulated in float32, block after block and within a row in the order of the columns. Weights
    that are not stored count as absent, not as zero.

    Args:
        x: float32, bfloat16 or on a CUDA device float16 [..., in], any strides. Under autocast as csr_matmul takes it.
        block_offsets: int32 [blocks + 1], where the non-zeros of each block begin.
        segments: int32 [out * column blocks], for each row of a block: its number in the block << 16 | its non-zeros;
            rows with more non-zeros first.
        indices: int16 [nnz], to be read as uint16: columns counted from the block's first.
        values: float32 or bfloat16 [nnz]; with a codebook, uint8 codes [nnz], each below entries.
        bias: float32, bfloat16 or on a CUDA device float16 [out], or None.
        codebook: float32 [entries], at most 256, or None.
        out_features: rows of W.
        column_block: columns of a block, 1 to 32768.
        relu: whether negative results become 0; NaN stays NaN.

    Returns:
        [..., out] of x's dtype. Gradients reach x, values or codebook, and bias, to any order; they take another
        layout, which is built anew at each call: to train, use csr_matmul.

    Raises:
        TypeError: an argument is not a tensor or has another dtype than named here.
        ValueError: shapes or devices do not fit each other.
        RuntimeError: an offset, a segment, an index or a code lies outside its range (found while multiplying; nothing
            outside the tensors is read), or forward-mode differentiation is asked for. On a CUDA device, where finding
            damage would make every call wait, the rows that it reaches are NaN in y instead.

    Source:
        Elsen et al., Fast Sparse ConvNets (2019), section 3, for the panels of x; Gale et al., Sparse GPU Kernels for
        Deep Learning (2020), section 5.1.2, for the order of a block's rows.
    """
    kept = "take it from blocked_pack"
    stored: Taken = (values, FLOATS, "pass the codebook beside codes")
    if codebook is not None:
        stored = (values, (torch.uint8,), "pass codes, or no codebook")
    tensors = {
        "x": (x, floats_of(x), "convert it"),
        "block_offsets": (block_offsets, (torch.int32,), kept),
        "segments": (segments, (torch.int32,), kept),
        "indices": (indices, (torch.int16,), kept),
        "values": stored,
        "bias": (bias, floats_beside(x), "convert it"),
        "codebook": (codebook, (torch.float32,), "convert it"),
    }
    check_product("blocked_matmul", x, tensors, out_features, column_block)
    if codebook is not None and (codebook.dim() != 1 or codebook.shape[0] > MAX_ENTRIES):
        raise ValueError(
            f"blocked_matmul: codebook must be [entries] with at most {MAX_ENTRIES} entries, got shape "
            f"{tuple(codebook.shape)}; pass one group of a codebook"
        )
    if forward_ad._current_level >= 0:
        for name, tensor in (("x", x), ("values", values), ("bias", bias), ("codebook", codebook)):
            if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
                raise RuntimeError(
                    f"blocked_matmul: {name} must not carry a forward-mode tangent, got one; use reverse mode "
                    "(backward)"
                )
    return cast(
        Tensor,
        _blocked_matmul(x, block_offsets, segments, indices, values, bias, codebook, out_features, column_block, relu),
    )


def blocked_matmul_inference(
    x: Tensor,
    block_offsets: Tensor,
    segments: Tensor,
    indices: Tensor,
    values: Tensor,
    bias: Tensor | None = None,
    codebook: Tensor | None = None,
    *,
    out_features: int,
    column_block: int,
    relu: bool = False,
) -> Tensor:
    """Returns blocked_matmul of the same arguments, without gradients and without the checks in Python.

    Raises:
        RuntimeError: an argument does not fit (the native checks remain, those of every index included).
    """
    return cast(
        Tensor,
        _blocked_matmul_inference(
            x, block_offsets, segments, indices, values, bias, codebook, out_features, column_block, relu
        ),
    )


def blocked_pack(
    row_offsets: Tensor, col_indices: Tensor, *, columns: int, column_block: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cuts the positions of a weight in compressed sparse rows into the blocks that blocked_matmul takes.

    Args:
        row_offsets: int32 [out + 1], from 0 to nnz, never falling.
        col_indices: int32 [nnz], strictly rising within a row, each in [0, columns).
        columns: width of the dense weight.
        column_block: columns of a block, 1 to 32768.

    Returns:
        block_offsets, segments and indices, as blocked_matmul describes them, and sources, int32 [nnz]: which non-zero
        of the rows each one of the blocks is, so that values[sources] are the values in their new order.

    Raises:
        TypeError: an argument has another dtype than named here.
        ValueError: column_block is out of range.
        RuntimeError: the positions are not those of a weight of that width.
    """
    tensors = {
        "row_offsets": (row_offsets, (torch.int32,), "call row_offsets.int()"),
        "col_indices": (col_indices, (torch.int32,), "call col_indices.int()"),
    }
    check_pack("blocked_pack", tensors, column_block)
    block_offsets, segments, indices, sources = pack_on_cpu(
        _blocked_pack, row_offsets, col_indices, columns, column_block
    )
    return block_offsets, segments, indices, sources


def blocked_positions(
    block_offsets: Tensor, segments: Tensor, indices: Tensor, out_features: int, columns: int, column_block: int
) -> tuple[Tensor, Tensor]:
    """Row and column, int64 [nnz] each, of every non-zero of a weight that blocked_pack has cut."""
    column_blocks = -(-columns // column_block)
    device = segments.device
    counts = segments & 0xFFFF
    # The block that each segment belongs to, counted along a row of blocks: rows of one block are neighbours.
    row = torch.arange(out_features, device=device)
    block = row // BLOCK_ROWS
    rows_in_block = ((block + 1) * BLOCK_ROWS).clamp(max=out_features) - block * BLOCK_ROWS
    place = torch.arange(segments.numel(), device=device)
    row_block = place // max(1, BLOCK_ROWS * column_blocks)
    begin = row_block * BLOCK_ROWS
    column_of = (place - begin * column_blocks) // rows_in_block[begin] if segments.numel() else place
    size = indices.numel()
    of_segment = torch.repeat_interleave(counts.long(), output_size=size)
    rows = (begin + (segments >> 16))[of_segment]
    return rows, (column_of * column_block)[of_segment] + (indices.long() & 0xFFFF)


@torch.library.register_fake("tersetorch::blocked_pack")
def _fake_pack(
    row_offsets: Tensor, col_indices: Tensor, columns: int, column_block: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    layout = fake_layout(row_offsets, columns, column_block, col_indices.shape[0])
    return *layout, torch.empty_like(col_indices)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, block_offsets, segments, indices, values, bias, codebook, out_features, column_block, *relu = inputs
    ctx.sizes = out_features, column_block
    ctx.bias_dtype = None if bias is None else bias.dtype
    kept = output if relu and relu[0] else None
    ctx.save_for_backward(x, block_offsets, segments, indices, values, codebook, kept)


def _backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of csr_matmul, with the non-zeros in the order of rows."""
    x, block_offsets, segments, indices, values, codebook, y = ctx.saved_tensors
    out_features, column_block = ctx.sizes
    if y is not None:
        grad_y = torch.where(y <= 0, 0, grad_y)
    rows, columns = blocked_positions(block_offsets, segments, indices, out_features, x.shape[-1], column_block)
    order = rows.argsort(stable=True)
    counts = torch.zeros(out_features + 1, dtype=torch.int64, device=x.device)
    counts = counts.index_add(0, rows + 1, torch.ones_like(rows))
    row_offsets, col_indices = counts.cumsum(0).int(), columns[order].int()
    needs = (*ctx.needs_input_grad, *[False] * 7)
    grad_x = grad_values = grad_bias = grad_codebook = None
    if needs[0]:
        grad_x = _csr_grad_x(grad_y, row_offsets, col_indices, values[order], x.shape[-1], codebook)
    if needs[4] or needs[6]:
        by_rows = _csr_grad_values(grad_y, x, row_offsets, col_indices)
        in_blocks = torch.zeros_like(by_rows).index_copy(0, order, by_rows)
        if codebook is None:
            grad_values = in_blocks.to(values.dtype)
        else:
            grad_codebook = torch.zeros_like(codebook).index_add(0, values.int(), in_blocks)
    if needs[5]:
        leading = tuple(range(grad_y.dim()))
        grad_bias = grad_y.unsqueeze(0).sum(leading, dtype=torch.float32).to(ctx.bias_dtype)
    return grad_x, None, None, None, grad_values, grad_bias, grad_codebook, None, None, None


torch.library.register_autograd("tersetorch::blocked_matmul", _backward, setup_context=_setup_context)
register_product("blocked_matmul", tensors=7)
