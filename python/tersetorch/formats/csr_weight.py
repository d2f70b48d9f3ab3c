"""A weight as its non-zero values, row after row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tersetorch.formats.csr_pattern import (
    CsrPattern,
    check_dense,
    check_pattern,
    check_tensor,
    narrow,
    non_zeros,
    scatter,
)


@dataclass(frozen=True)
class CsrWeight(CsrPattern):
    """Compressed sparse rows: W[r, col_indices[k]] = values[k], row_offsets[r] <= k < row_offsets[r + 1], 0 elsewhere.

    Attributes:
        row_offsets: int32 [rows + 1], from 0 to nnz, never falling.
        col_indices: int32 [nnz], strictly rising within a row, each in [0, columns); or int16, 16 unsigned bits.
        values: float32 or bfloat16 [nnz].
        columns: width of the dense weight.

    Source:
        Tinney and Walker, Direct solutions of sparse network equations by optimally ordered triangular factorization
        (1967); the layout is the one of torch.sparse_csr_tensor.
    """

    row_offsets: Tensor
    col_indices: Tensor
    values: Tensor
    columns: int

    @classmethod
    def from_dense(cls, weight: Tensor) -> CsrWeight:
        """Stores the non-zeros of weight, float32 or bfloat16 [rows, columns]; 0.0 and -0.0 are left out, NaN is kept.

        Raises:
            TypeError: weight is not a float32 or bfloat16 tensor.
            ValueError: weight is not 2-D.
            RuntimeError: weight holds 2**31 or more non-zeros.
        """
        check_dense("CsrWeight", weight)
        row_offsets, col_indices, values = non_zeros(weight)
        return cls(row_offsets, col_indices, values, weight.shape[1])

    def narrowed(self) -> CsrWeight:
        """The same weight with 16-bit column indices: fewer bytes to read, for a product with one sample above all.

        Raises:
            ValueError: there are more than 65,536 columns.
        """
        col_indices = narrow("CsrWeight", self.col_indices, self.columns)
        return CsrWeight(self.row_offsets, col_indices, self.values, self.columns)

    def to_dense(self) -> Tensor:
        """The exact weight the kernel uses: [rows, columns], of the dtype of values."""
        return scatter(self.row_offsets, self.col_indices, self.values, self.columns)

    def validate(self) -> None:
        """Checks what the kernel and to_dense rely on.

        Raises:
            TypeError: a tensor has another dtype than the class names.
            ValueError: shapes, offsets or columns do not fit each other.
        """
        check_pattern("CsrWeight", self.row_offsets, self.col_indices, self.columns)
        check_tensor("CsrWeight", "values", self.values)
        if self.values.dtype not in (torch.float32, torch.bfloat16):
            raise TypeError(f"CsrWeight: values must be float32 or bfloat16, got {self.values.dtype}; call .float()")
        if self.values.shape != self.col_indices.shape:
            raise ValueError(
                f"CsrWeight: values must be [{self.nnz}] as col_indices is, got shape {tuple(self.values.shape)}; "
                "pass one value for each stored position"
            )

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors."""
        return self.row_offsets.nbytes + self.col_indices.nbytes + self.values.nbytes
