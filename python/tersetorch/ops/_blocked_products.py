"""What blocked_matmul and its modes share: the checks of their arguments and their registration."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tersetorch.ops._autocast import compute_in_float32
from tersetorch.ops._floats import refusal

BLOCK_ROWS = 256
MAX_COLUMN_BLOCK = 32768
OPTIONAL = ("bias", "codebook")

# A tensor, the dtypes that it may have, and what to do about another one.
Taken = tuple[Tensor | None, tuple[torch.dtype, ...], str]


def check_product(
    op: str, x: Tensor, tensors: Mapping[str, Taken], out_features: int, column_block: int, *, group: int = 1
) -> None:
    """Checks what a product takes.

    Args:
        op: its name.
        x: the samples.
        tensors: all that it takes, x first; beside x, the layout and a codebook there is one number for each row.
        out_features: rows of W.
        column_block: columns of a block.
        group: columns of a value.

    Raises:
        TypeError: an argument is not a tensor or has another dtype.
        ValueError: shapes or devices do not fit each other.
    """
    check_types(op, tensors)
    given = {name: tensor for name, (tensor, *_) in tensors.items() if tensor is not None}
    for name, tensor in given.items():
        if tensor.device != x.device:
            raise ValueError(
                f"{op}: {name} must be on the device of x, {x.device}, got {tensor.device}; move one of them"
            )
    if x.dim() == 0:
        raise ValueError(f"{op}: x must be [..., in], got a scalar; reshape it")
    check_column_block(op, column_block, group)
    if out_features < 0:
        raise ValueError(f"{op}: out_features must be at least 0, got {out_features}; pass the rows of W")
    indices = given["indices"]
    if indices.dim() != 1:
        raise ValueError(
            f"{op}: indices must be [{'nnz' if group == 1 else 'words'}], got shape {tuple(indices.shape)}; flatten it"
        )
    column_blocks = -(-x.shape[-1] // column_block)
    shapes: dict[str, tuple[int, ...]] = {
        "block_offsets": (-(-out_features // BLOCK_ROWS) * column_blocks + 1,),
        "segments": (out_features * column_blocks,),
        "values": (indices.shape[0],) if group == 1 else (indices.shape[0], group),
    }
    for name, tensor in given.items():
        shape = shapes.get(name, (out_features,))
        if name not in ("x", "indices", "codebook") and tuple(tensor.shape) != shape:
            raise ValueError(
                f"{op}: {name} must be {list(shape)}, got shape {tuple(tensor.shape)}; pass a weight "
                f"[{out_features}, {x.shape[-1]}] cut with column_block={column_block}"
            )


def check_pack(op: str, tensors: Mapping[str, Taken], column_block: int, *, group: int = 1) -> None:
    """Checks what packing takes.

    Raises:
        TypeError: an argument is not a tensor or has another dtype.
        ValueError: column_block is out of range, or values are not one for each column index.
    """
    check_types(op, tensors)
    columns, values = tensors["col_indices"][0], tensors.get("values", (None,))[0]
    if values is not None and columns is not None and values.shape != columns.shape:
        raise ValueError(
            f"{op}: values must be {list(columns.shape)} like col_indices, got shape {tuple(values.shape)}; "
            "pass one for each column index"
        )
    check_column_block(op, column_block, group)


def check_types(op: str, tensors: Mapping[str, Taken]) -> None:
    """Raises TypeError unless all are tensors, or optional, of their dtypes."""
    for name, (tensor, dtypes, fix) in tensors.items():
        if tensor is None and name in OPTIONAL:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}; pass a torch.Tensor")
        if tensor.dtype not in dtypes:
            raise refusal(op, name, tensor, dtypes, fix)


def check_column_block(op: str, column_block: int, group: int) -> None:
    """Raises ValueError unless the columns of a block are whole values."""
    if not 1 <= column_block <= MAX_COLUMN_BLOCK or column_block % group:
        rule = f"1 to {MAX_COLUMN_BLOCK}" if group == 1 else f"a multiple of {group} up to {MAX_COLUMN_BLOCK}"
        raise ValueError(f"{op}: column_block must be {rule}, got {column_block}; pass for example {128 * group}")


def register_product(op: str, tensors: int) -> None:
    """Gives a product of so many tensors, and its inference twin, a fake kernel and the rule under autocast."""

    def fake(x: Tensor, *rest: Any) -> Tensor:
        return x.new_empty((*x.shape[:-1], rest[tensors - 1]))

    for name in (op, f"{op}_inference"):
        torch.library.register_fake(f"tersetorch::{name}", fake)
        compute_in_float32(name)


def refuse_gradients(op: str) -> None:
    """Makes backward through the op an error, instead of a gradient that stops in silence."""

    def backward(ctx: Any, grad_y: Tensor) -> None:
        raise RuntimeError(
            f"{op}: must not be differentiated, got a backward; train with mode='exact' and convert afterwards"
        )

    torch.library.register_autograd(f"tersetorch::{op}", backward)


def fake_layout(row_offsets: Tensor, columns: int, column_block: int, count: Any) -> tuple[Tensor, Tensor, Tensor]:
    """block_offsets, segments and so many indices, of the shapes that packing returns."""
    rows, column_blocks = row_offsets.shape[0] - 1, -(-columns // column_block)
    return (
        row_offsets.new_empty((-(-rows // BLOCK_ROWS) * column_blocks + 1,)),
        row_offsets.new_empty((rows * column_blocks,)),
        row_offsets.new_empty((count,), dtype=torch.int16),
    )


def fake_words(
    row_offsets: Tensor, values: Tensor, columns: int, column_block: int, group: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same with the values of words of so many columns; how many there are depends on the positions."""
    words = torch.library.get_ctx().new_dynamic_size()
    return *fake_layout(row_offsets, columns, column_block, words), values.new_empty((words, group))
