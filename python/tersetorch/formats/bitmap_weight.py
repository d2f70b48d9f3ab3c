"""A weight as one bit for each weight and its non-zero values, for products with few samples."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tersetorch import ops
from tersetorch.formats.bitmap_pattern import BitmapPattern, bits_of
from tersetorch.formats.csr_pattern import check_dense
from tersetorch.formats.csr_weight import CsrWeight


@dataclass(frozen=True)
class BitmapWeight(BitmapPattern):
    """Bit j of bitmap[r, w] is set where W[r, 64 w + j] is stored; values follow each other by rows, then by columns.

    Attributes:
        bitmap: int64 [rows, ceil(columns / 64)], 0 past the last column.
        row_offsets: int32 [rows + 1], from 0 to nnz: where the values of each row begin.
        values: float32 or bfloat16 [nnz].
        columns: width of the dense weight.

    Source:
        Rhu et al., Compressing DMA Engine (2018), section IV: zero-value compression.
    """

    bitmap: Tensor
    row_offsets: Tensor
    values: Tensor
    columns: int

    @classmethod
    def from_dense(cls, weight: Tensor) -> BitmapWeight:
        """Stores the non-zeros of weight, float32 or bfloat16 [rows, columns]; 0.0 and -0.0 are left out, NaN is kept.

        Raises:
            TypeError: weight is not a float32 or bfloat16 tensor.
            ValueError: weight is not 2-D.
            RuntimeError: weight holds 2**31 or more non-zeros.
        """
        check_dense("BitmapWeight", weight)
        bitmap, row_offsets, values = ops.bitmap_pack(weight)
        return cls(bitmap, row_offsets, values, weight.shape[1])

    @classmethod
    def from_csr(cls, weight: CsrWeight) -> BitmapWeight:
        """The same weight with a bitmap in place of column indices; row_offsets and values are shared.

        Raises:
            RuntimeError: weight is not valid.
        """
        return cls(bits_of(weight), weight.row_offsets, weight.values, weight.columns)

    def to_dense(self) -> Tensor:
        """The exact weight the kernel uses: [rows, columns], of the dtype of values."""
        return self.scatter(self.values)

    def validate(self) -> None:
        """Checks what the kernel and to_dense rely on.

        Raises:
            TypeError: a tensor has another dtype than the class names.
            ValueError: the fields do not fit each other.
        """
        self.check_pattern("values", self.values)
        if self.values.dtype not in (torch.float32, torch.bfloat16):
            raise TypeError(f"BitmapWeight: values must be float32 or bfloat16, got {self.values.dtype}; call .float()")

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors."""
        return self.pattern_nbytes + self.values.nbytes
