"""A weight as one bit for each weight and its non-zeros' 8-bit codes, for products with few samples."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tersetorch.formats.bitmap_pattern import BitmapPattern, bits_of
from tersetorch.formats.sparse_codebook_weight import SparseCodebookWeight, check_codes


@dataclass(frozen=True)
class BitmapCodebookWeight(BitmapPattern):
    """BitmapWeight with codebook[0, codes[k]] for values[k]. Up to 32 entries are fastest.

    Attributes:
        bitmap, row_offsets, columns: as in BitmapWeight.
        codes: uint8 [nnz], each in [1, entries): code 0 is reserved for zero.
        codebook: float32 [1, entries], 1 <= entries <= 256, codebook[0, 0] = 0.

    Source:
        Han et al., Deep Compression (2015), section 3, with a bitmap in place of gaps.
    """

    bitmap: Tensor
    row_offsets: Tensor
    codes: Tensor
    codebook: Tensor
    columns: int

    @classmethod
    def from_dense(cls, weight: Tensor) -> BitmapCodebookWeight:
        """Finds the codes of weight as SparseCodebookWeight.from_dense does.

        Raises:
            TypeError, ValueError: as that one raises them.
        """
        return cls.from_csr(SparseCodebookWeight.from_dense(weight))

    @classmethod
    def from_csr(cls, weight: SparseCodebookWeight) -> BitmapCodebookWeight:
        """The same weight with a bitmap in place of column indices; the other tensors are shared.

        Raises:
            RuntimeError: weight is not valid.
        """
        return cls(bits_of(weight), weight.row_offsets, weight.codes, weight.codebook, weight.columns)

    def to_dense(self) -> Tensor:
        """The exact weight the kernel uses: float32 [rows, columns]."""
        return self.scatter(self.values)

    def validate(self) -> None:
        """Checks what the kernel and to_dense rely on.

        Raises:
            TypeError: a tensor has another dtype than the class names.
            ValueError: the fields do not fit each other.
        """
        self.check_pattern("codes", self.codes)
        check_codes("BitmapCodebookWeight", self.codes, self.codebook, "row_offsets", self.nnz)

    @property
    def values(self) -> Tensor:
        """The value of every stored position, float32 [nnz]; differentiable in codebook."""
        return self.codebook[0].index_select(0, self.codes.int())

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors."""
        return self.pattern_nbytes + self.codes.nbytes + self.codebook.nbytes
