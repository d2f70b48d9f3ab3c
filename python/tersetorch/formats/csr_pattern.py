"""Which positions of a weight are stored: compressed sparse rows, shared by every format that keeps only non-zeros."""

import torch
from torch import Tensor

from tersetorch import ops

NARROW_MASK = 2**16 - 1


class CsrPattern:
    """What follows from the positions alone, for the formats that hold them."""

    row_offsets: Tensor
    col_indices: Tensor
    columns: int

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the dense weight."""
        return self.row_offsets.numel() - 1, self.columns

    @property
    def nnz(self) -> int:
        """Number of stored positions."""
        return self.col_indices.numel()

    @property
    def rows(self) -> Tensor:
        """The row of every stored position, int64 [nnz]."""
        return rows_of(self.row_offsets)

    @property
    def cols(self) -> Tensor:
        """The column of every stored position, int64 [nnz]."""
        return columns_of(self.col_indices)

    @property
    def wide_indices(self) -> Tensor:
        """The column of every stored position, int32 [nnz]."""
        return self.col_indices if self.col_indices.dtype == torch.int32 else self.cols.int()


def non_zeros(dense: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Row offsets int32 [rows + 1], column indices int32 [nnz] and values [nnz] of dense, found on the CPU.

    Raises:
        RuntimeError: more non-zeros or columns than int32 can number.
    """
    row_offsets, col_indices, values = ops.csr_pack(dense.detach().cpu())
    return row_offsets.to(dense.device), col_indices.to(dense.device), values.to(dense.device)


def rows_of(row_offsets: Tensor) -> Tensor:
    """The row of every stored position, int64 [nnz]."""
    return torch.repeat_interleave(row_offsets.diff())


def columns_of(col_indices: Tensor) -> Tensor:
    """The columns that col_indices number, int64: int16 holds 16 unsigned bits."""
    return col_indices.long() & NARROW_MASK if col_indices.dtype == torch.int16 else col_indices.long()


def narrow(owner: str, col_indices: Tensor, columns: int) -> Tensor:
    """The same columns as 16 unsigned bits in int16.

    Raises:
        ValueError: there are more than 65,536 columns.
    """
    if columns > NARROW_MASK + 1:
        raise ValueError(
            f"{owner}: columns must be at most {NARROW_MASK + 1} for 16-bit indices, got {columns}; keep 32 bits"
        )
    return (col_indices & NARROW_MASK).short()


def scatter(row_offsets: Tensor, col_indices: Tensor, values: Tensor, columns: int) -> Tensor:
    """The dense weight [rows, columns] with values [nnz] at the stored positions and 0 elsewhere."""
    dense = values.new_zeros(row_offsets.numel() - 1, columns)
    dense[rows_of(row_offsets), columns_of(col_indices)] = values
    return dense


def check_pattern(owner: str, row_offsets: Tensor, col_indices: Tensor, columns: int) -> None:
    """Checks that the pattern is one that non_zeros could have found.

    Raises:
        TypeError: an index tensor is not int32 (col_indices may be int16, 16 unsigned bits).
        ValueError: shapes, offsets or columns do not describe rows of strictly increasing columns.
    """
    if isinstance(columns, bool) or not isinstance(columns, int):
        raise TypeError(f"{owner}: columns must be an int, got {columns!r}; pass the width of the dense weight")
    for name, indices in (("row_offsets", row_offsets), ("col_indices", col_indices)):
        check_tensor(owner, name, indices)
        if indices.dtype != torch.int32 and not (name == "col_indices" and indices.dtype == torch.int16):
            raise TypeError(f"{owner}: {name} must be int32, got {indices.dtype}; call {name}.int()")
        if indices.dim() != 1:
            raise ValueError(f"{owner}: {name} must be 1-D, got shape {tuple(indices.shape)}; flatten it")
    if columns < 0:
        raise ValueError(f"{owner}: columns must be at least 0, got {columns}; pass the width of the dense weight")
    stored = col_indices.numel()
    if (
        row_offsets.numel() == 0
        or row_offsets[0] != 0
        or row_offsets[-1] != stored
        or bool((row_offsets.diff() < 0).any())
    ):
        raise ValueError(
            f"{owner}: row_offsets must rise from 0 to the {stored} stored positions, got {_shorten(row_offsets)}; "
            "build it with from_dense"
        )
    if stored == 0:
        return
    col_indices = columns_of(col_indices)
    low, high = int(col_indices.min()), int(col_indices.max())
    if low < 0 or high >= columns:
        raise ValueError(
            f"{owner}: col_indices must lie in [0, {columns}), got values from {low} to {high}; "
            "pass the columns of the weight they belong to"
        )
    rows = rows_of(row_offsets)
    if bool(((rows[1:] == rows[:-1]) & (col_indices.diff() <= 0)).any()):
        raise ValueError(
            f"{owner}: col_indices must rise strictly within a row, got a repeated or unsorted column; "
            "build it with from_dense"
        )


def check_tensor(owner: str, name: str, value: object) -> None:
    """Raises TypeError when value is no tensor, ValueError when it is one without numbers."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{owner}: {name} must be a tensor, got {type(value).__name__}; build it with from_dense")
    _check_numbers(owner, name, value)


def check_dense(owner: str, weight: Tensor) -> None:
    """Checks that weight can be stored by a format of the kernels.

    Raises:
        TypeError: weight is not a float32 or bfloat16 tensor.
        ValueError: weight is not 2-D, or on device meta.
    """
    if not isinstance(weight, Tensor):
        raise TypeError(f"{owner}: weight must be a tensor, got {type(weight).__name__}; pass module.weight")
    if weight.dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"{owner}: weight must be float32 or bfloat16, got {weight.dtype}; call weight.float()")
    if weight.dim() != 2:
        raise ValueError(
            f"{owner}: weight must be [rows, columns], got shape {tuple(weight.shape)}; reshape it to two dimensions"
        )
    _check_numbers(owner, "weight", weight)


def _check_numbers(owner: str, name: str, tensor: Tensor) -> None:
    if tensor.is_meta:
        raise ValueError(
            f"{owner}: {name} must have numbers, got a tensor on device meta, which has none; load it on another device"
        )


def _shorten(indices: Tensor) -> str:
    shown = indices.flatten()[:4].tolist()
    return f"{shown}" if indices.numel() <= 4 else f"{shown[:3]} ... {int(indices[-1])}"
