"""What the modes of the blocked product share: a weight whose values are words of several consecutive columns."""

from typing import Any

import torch
from torch import Tensor

from tersetorch.ops.blocked_matmul import BLOCK_ROWS, MAX_COLUMN_BLOCK

_FLOATS = (torch.float32, torch.bfloat16)


def check_product(
    op: str,
    x: Tensor,
    layout: dict[str, Tensor],
    values_dtype: torch.dtype,
    group: int,
    of_rows: dict[str, tuple[Tensor | None, tuple[torch.dtype, ...]]],
    out_features: int,
    column_block: int,
) -> None:
    """Checks what a product takes; layout: block_offsets, segments, indices and values, of_rows: one for each row.

    Raises:
        TypeError: an argument is not a tensor or has another dtype.
        ValueError: shapes or devices do not fit each other.
    """
    x_dtypes = (*_FLOATS, torch.float16) if torch.is_autocast_enabled("cpu") else _FLOATS
    dtypes = {
        "x": x_dtypes,
        "block_offsets": (torch.int32,),
        "segments": (torch.int32,),
        "indices": (torch.int16,),
        "values": (values_dtype,),
    } | {name: allowed for name, (_, allowed) in of_rows.items()}
    for name, tensor in {"x": x, **layout, **{name: tensor for name, (tensor, _) in of_rows.items()}}.items():
        if tensor is None and name == "bias":
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}; pass a torch.Tensor")
        if tensor.dtype not in dtypes[name]:
            allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes[name])
            raise TypeError(f"{op}: {name} must be {allowed}, got {tensor.dtype}; convert it or pack the weight again")
        if tensor.device != x.device:
            raise ValueError(
                f"{op}: {name} must be on the device of x, {x.device}, got {tensor.device}; move one of them"
            )
    if x.dim() == 0:
        raise ValueError(f"{op}: x must be [..., in], got a scalar; reshape it")
    check_column_block(op, column_block, group)
    if out_features < 0:
        raise ValueError(f"{op}: out_features must be at least 0, got {out_features}; pass the rows of W")
    column_blocks = -(-x.shape[-1] // column_block)
    indices = layout["indices"]
    if indices.dim() != 1:
        raise ValueError(f"{op}: indices must be [words], got shape {tuple(indices.shape)}; flatten it")
    shapes: dict[str, tuple[int, ...]] = {
        "block_offsets": (-(-out_features // BLOCK_ROWS) * column_blocks + 1,),
        "segments": (out_features * column_blocks,),
        "values": (indices.shape[0], group),
    }
    for name, tensor in {**layout, **{name: tensor for name, (tensor, _) in of_rows.items()}}.items():
        shape = shapes.get(name, (out_features,))
        if tensor is not None and name != "indices" and tuple(tensor.shape) != shape:
            raise ValueError(
                f"{op}: {name} must be {list(shape)}, got shape {tuple(tensor.shape)}; pass a weight "
                f"[{out_features}, {x.shape[-1]}] cut with column_block={column_block}"
            )


def check_pack(op: str, tensors: dict[str, tuple[Tensor, torch.dtype]], column_block: int, group: int) -> None:
    """Checks what packing takes.

    Raises:
        TypeError: an argument is not a tensor or has another dtype.
        ValueError: column_block is out of range, or values are not one for each column index.
    """
    for name, (tensor, dtype) in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}; pass a torch.Tensor")
        if tensor.dtype != dtype:
            raise TypeError(f"{op}: {name} must be {str(dtype).removeprefix('torch.')}, got {tensor.dtype}; convert it")
    values, columns = tensors["values"][0], tensors["col_indices"][0]
    if values.shape != columns.shape:
        raise ValueError(
            f"{op}: values must be {list(columns.shape)} like col_indices, got shape {tuple(values.shape)}; "
            "pass one for each column index"
        )
    check_column_block(op, column_block, group)


def check_column_block(op: str, column_block: int, group: int) -> None:
    """Raises ValueError unless the columns of a block are whole words."""
    if not 1 <= column_block <= MAX_COLUMN_BLOCK or column_block % group:
        raise ValueError(
            f"{op}: column_block must be a multiple of {group} up to {MAX_COLUMN_BLOCK}, got {column_block}; "
            f"pass for example {128 * group}"
        )


def fake_pack(
    row_offsets: Tensor, col_indices: Tensor, values: Tensor, columns: int, column_block: int, group: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tensors of the shapes that packing returns; how many words there are depends on the positions."""
    rows, column_blocks = row_offsets.shape[0] - 1, -(-columns // column_block)
    words = torch.library.get_ctx().new_dynamic_size()
    return (
        row_offsets.new_empty((-(-rows // BLOCK_ROWS) * column_blocks + 1,)),
        row_offsets.new_empty((rows * column_blocks,)),
        col_indices.new_empty((words,), dtype=torch.int16),
        values.new_empty((words, group)),
    )


def refuse_gradients(op: str) -> None:
    """Makes backward through the op an error, instead of a gradient that stops in silence."""

    def backward(ctx: Any, grad_y: Tensor) -> None:
        raise RuntimeError(
            f"{op}: must not be differentiated, got a backward; train with mode='exact' and convert afterwards"
        )

    torch.library.register_autograd(f"tersetorch::{op}", backward)
