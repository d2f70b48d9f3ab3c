"""A weight whose non-zeros are 8-bit codes into a table of values, cut into blocks for products with many samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tersetorch.formats.blocked_pattern import BlockedPattern, cut
from tersetorch.formats.sparse_codebook_weight import SparseCodebookWeight, check_codes


@dataclass(frozen=True)
class BlockedCodebookWeight(BlockedPattern):
    """BlockedWeight with codebook[0, codes[k]] for values[k].

    Attributes:
        block_offsets, segments, indices, rows, columns, column_block: as in BlockedWeight.
        codes: uint8 [nnz], each in [1, entries): code 0 is reserved for zero.
        codebook: float32 [1, entries], 1 <= entries <= 256, codebook[0, 0] = 0.

    Source:
        Han et al., Deep Compression (2015), section 3, in the blocks of BlockedWeight.
    """

    block_offsets: Tensor
    segments: Tensor
    indices: Tensor
    codes: Tensor
    codebook: Tensor
    rows: int
    columns: int
    column_block: int

    @classmethod
    def from_dense(cls, weight: Tensor, samples: int = 64, column_block: int | None = None) -> BlockedCodebookWeight:
        """Finds the codes of weight as SparseCodebookWeight.from_dense does, and cuts it as from_csr does.

        Raises:
            TypeError, ValueError: as those two raise them.
        """
        return cls.from_csr(SparseCodebookWeight.from_dense(weight), samples, column_block)

    @classmethod
    def from_csr(
        cls, weight: SparseCodebookWeight, samples: int = 64, column_block: int | None = None
    ) -> BlockedCodebookWeight:
        """Cuts a weight for products with about so many samples; it shares the codebook's memory.

        Raises:
            TypeError, ValueError, RuntimeError: as BlockedWeight.from_csr.
        """
        fields: Any
        fields, sources = cut(weight, samples, column_block)
        return cls(codes=weight.codes.index_select(0, sources), codebook=weight.codebook, **fields)

    def to_dense(self) -> Tensor:
        """The exact weight the kernel uses: float32 [rows, columns]."""
        return self.scatter(self.codebook[0].detach().index_select(0, self.codes.int()))

    def validate(self) -> None:
        """Checks what the kernel and to_dense rely on.

        Raises:
            TypeError: a tensor has another dtype than the class names.
            ValueError: the fields do not fit each other.
        """
        self.check_pattern()
        check_codes("BlockedCodebookWeight", self.codes, self.codebook, "indices", self.nnz)

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors."""
        return self.pattern_nbytes + self.codes.nbytes + self.codebook.nbytes
