"""A weight by columns, as one bit for each weight and its non-zeros: for a sample with many zeros."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tersetorch.formats.bitmap_codebook_weight import BitmapCodebookWeight
from tersetorch.formats.bitmap_weight import BitmapWeight
from tersetorch.formats.csr_pattern import check_dense
from tersetorch.formats.csr_weight import CsrWeight
from tersetorch.formats.sparse_codebook_weight import SparseCodebookWeight


@dataclass(frozen=True)
class BitmapColumnsWeight:
    """BitmapWeight or BitmapCodebookWeight of W^T: what follows each other are the columns of W.

    Attributes:
        bitmap: int64 [columns, ceil(rows / 64)]: bit j of bitmap[c, w] is set where W[64 w + j, c] is stored.
        column_offsets: int32 [columns + 1], from 0 to nnz: where the values of each column begin.
        values: float32 or bfloat16 [nnz], or uint8 codes, each in [1, entries).
        codebook: float32 [1, entries] with codebook[0, 0] = 0 for codes, otherwise None.
        rows: height of the dense weight.

    Source:
        Han et al., EIE: Efficient Inference Engine on Compressed Deep Neural Network (2016), section III, with a
        bitmap in place of gaps.
    """

    bitmap: Tensor
    column_offsets: Tensor
    values: Tensor
    codebook: Tensor | None
    rows: int

    @classmethod
    def from_dense(cls, weight: Tensor) -> BitmapColumnsWeight:
        """Stores the non-zeros of weight, float32 or bfloat16 [rows, columns], as BitmapWeight.from_dense does.

        Raises:
            TypeError: weight is not a float32 or bfloat16 tensor.
            ValueError: weight is not 2-D.
        """
        check_dense("BitmapColumnsWeight", weight)
        return cls._of(BitmapWeight.from_dense(weight.detach().T))

    @classmethod
    def from_csr(cls, weight: CsrWeight | SparseCodebookWeight) -> BitmapColumnsWeight:
        """The same weight by columns; its codebook is shared.

        Raises:
            RuntimeError: weight is not valid.
        """
        rows, columns = weight.shape
        order = weight.cols.argsort(stable=True)
        counts = order.new_zeros(columns + 1).index_add(0, weight.cols + 1, torch.ones_like(order))
        transposed = CsrWeight(counts.cumsum(0).int(), weight.rows[order].int(), weight.row_offsets, rows)
        if isinstance(weight, CsrWeight):
            return cls._of(BitmapWeight.from_csr(replace(transposed, values=weight.values.detach()[order])))
        codes = SparseCodebookWeight(
            transposed.row_offsets, transposed.col_indices, weight.codes[order], weight.codebook, rows
        )
        return cls._of(BitmapCodebookWeight.from_csr(codes))

    @classmethod
    def _of(cls, transposed: BitmapWeight | BitmapCodebookWeight) -> BitmapColumnsWeight:
        values, codebook = transposed.values, None
        if isinstance(transposed, BitmapCodebookWeight):
            values, codebook = transposed.codes, transposed.codebook
        return cls(transposed.bitmap, transposed.row_offsets, values, codebook, transposed.columns)

    @property
    def transposed(self) -> BitmapWeight | BitmapCodebookWeight:
        """W^T; it shares all tensors."""
        if self.codebook is None:
            return BitmapWeight(self.bitmap, self.column_offsets, self.values, self.rows)
        return BitmapCodebookWeight(self.bitmap, self.column_offsets, self.values, self.codebook, self.rows)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the dense weight."""
        return self.rows, self.column_offsets.numel() - 1

    @property
    def nnz(self) -> int:
        """Number of stored positions."""
        return int(self.column_offsets[-1])

    def to_dense(self) -> Tensor:
        """The exact weight the kernel uses: [rows, columns], float32 for codes, otherwise of the dtype of values."""
        return self.transposed.to_dense().T.contiguous()

    def validate(self) -> None:
        """Checks what the kernel and to_dense rely on; a message calls the columns of W the rows of W^T.

        Raises:
            TypeError: a tensor has another dtype than the class names.
            ValueError: the fields do not fit each other.
        """
        try:
            self.transposed.validate()
        except (TypeError, ValueError) as error:
            raise type(error)(f"BitmapColumnsWeight: transposed {error}") from error

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors."""
        return self.transposed.nbytes
