"""Where the non-zeros of a weight lie: one bit for each weight, shared by the formats that hold one."""

from __future__ import annotations

import torch
from torch import Tensor

from tersetorch import ops
from tersetorch.formats.csr_pattern import CsrPattern, check_tensor, rows_of

WORD = 64


class BitmapPattern:
    """What follows from the positions alone."""

    bitmap: Tensor
    row_offsets: Tensor
    columns: int

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the dense weight."""
        return self.row_offsets.numel() - 1, self.columns

    @property
    def nnz(self) -> int:
        """Number of stored positions."""
        return int(self.row_offsets[-1])

    @property
    def col_indices(self) -> Tensor:
        """The column of every stored position, int32 [nnz], as compressed sparse rows have them; built anew."""
        return ops.bitmap_to_rows(self.bitmap, self.row_offsets, columns=self.columns, nnz=self.nnz)

    @property
    def pattern_nbytes(self) -> int:
        """Bytes of the tensors that say where the values are."""
        return self.bitmap.nbytes + self.row_offsets.nbytes

    def scatter(self, values: Tensor) -> Tensor:
        """The dense weight with values [nnz] at the stored positions and 0 elsewhere."""
        dense = values.new_zeros(self.shape)
        dense[rows_of(self.row_offsets), self.col_indices.long()] = values
        return dense

    def check_pattern(self, values_name: str, values: Tensor) -> None:
        """Checks that the pattern is one that bitmap_pack could have made, with one of values for each bit.

        Raises:
            TypeError: a tensor or a size has another type.
            ValueError: shapes, bits or offsets do not fit each other.
        """
        owner = type(self).__name__
        if isinstance(self.columns, bool) or not isinstance(self.columns, int):
            raise TypeError(
                f"{owner}: columns must be an int, got {self.columns!r}; pass the width of the dense weight"
            )
        for name, tensor, dtype, dim in (
            ("bitmap", self.bitmap, torch.int64, 2),
            ("row_offsets", self.row_offsets, torch.int32, 1),
        ):
            check_tensor(owner, name, tensor)
            if tensor.dtype != dtype:
                raise TypeError(f"{owner}: {name} must be {dtype}, got {tensor.dtype}; build it with from_dense")
            if tensor.dim() != dim:
                raise ValueError(
                    f"{owner}: {name} must be {dim}-D, got shape {tuple(tensor.shape)}; build it with from_dense"
                )
        check_tensor(owner, values_name, values)
        words, rows = -(-self.columns // WORD), self.row_offsets.numel() - 1
        if self.columns < 0 or tuple(self.bitmap.shape) != (rows, words):
            raise ValueError(
                f"{owner}: bitmap must be [{rows}, {words}] for {self.columns} columns, got shape "
                f"{tuple(self.bitmap.shape)}; build it with from_dense"
            )
        if values.dim() != 1 or values.numel() != self.nnz:
            raise ValueError(
                f"{owner}: {values_name} must be [{self.nnz}] as row_offsets count, got shape {tuple(values.shape)}; "
                "pass one for each stored position"
            )
        try:
            ops.bitmap_to_rows(self.bitmap, self.row_offsets, columns=self.columns, nnz=self.nnz)
        except RuntimeError as error:
            reason = str(error).splitlines()[0].partition("bitmap_to_rows: ")[2]
            raise ValueError(f"{owner}: {reason}") from error


def bits_of(weight: CsrPattern) -> Tensor:
    """The bitmap of a weight in compressed sparse rows.

    Raises:
        RuntimeError: weight is not valid.
    """
    return ops.bitmap_from_rows(weight.row_offsets, weight.wide_indices, columns=weight.columns)
