"""A weight as its non-zero values, cut into blocks for products with many samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tersetorch.formats.blocked_pattern import BlockedPattern, cut
from tersetorch.formats.csr_pattern import check_tensor
from tersetorch.formats.csr_weight import CsrWeight


@dataclass(frozen=True)
class BlockedWeight(BlockedPattern):
    """Blocks of 256 rows and column_block columns, by rows, then by columns; tersetorch.ops.blocked_matmul says more.

    Attributes:
        block_offsets: int32 [blocks + 1], from 0 to nnz, never falling.
        segments: int32 [rows * column blocks]: row in the block << 16 | its non-zeros there.
        indices: int16 [nnz], read as uint16: column in the block.
        values: float32 or bfloat16 [nnz].
        rows, columns: shape of the dense weight.
        column_block: columns of a block, 1 to 32768.

    Source:
        The row order of Gale et al., Sparse GPU Kernels for Deep Learning (2020), section 5.1.2, in each block.
    """

    block_offsets: Tensor
    segments: Tensor
    indices: Tensor
    values: Tensor
    rows: int
    columns: int
    column_block: int

    @classmethod
    def from_dense(cls, weight: Tensor, samples: int = 64, column_block: int | None = None) -> BlockedWeight:
        """Stores the non-zeros of weight as CsrWeight.from_dense takes them, cut as from_csr does.

        Raises:
            TypeError, ValueError: as those two raise them.
        """
        return cls.from_csr(CsrWeight.from_dense(weight), samples, column_block)

    @classmethod
    def from_csr(cls, weight: CsrWeight, samples: int = 64, column_block: int | None = None) -> BlockedWeight:
        """Cuts a weight for products with about so many samples, or into blocks of column_block columns.

        Raises:
            TypeError: an argument has another type.
            ValueError: samples or column_block is out of range.
            RuntimeError: weight is not valid.
        """
        fields: Any
        fields, sources = cut(weight, samples, column_block)
        return cls(values=weight.values.detach().index_select(0, sources), **fields)

    def to_dense(self) -> Tensor:
        """The exact weight the kernel uses: [rows, columns], of the dtype of values."""
        return self.scatter(self.values)

    def validate(self) -> None:
        """Checks what the kernel and to_dense rely on.

        Raises:
            TypeError: a tensor has another dtype than the class names.
            ValueError: the fields do not fit each other.
        """
        self.check_pattern()
        check_tensor("BlockedWeight", "values", self.values)
        if self.values.dtype not in (torch.float32, torch.bfloat16):
            raise TypeError(
                f"BlockedWeight: values must be float32 or bfloat16, got {self.values.dtype}; call .float()"
            )
        if self.values.shape != self.indices.shape:
            raise ValueError(
                f"BlockedWeight: values must be [{self.nnz}] as indices is, got shape {tuple(self.values.shape)}; "
                "pass one value for each stored position"
            )

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors."""
        return self.pattern_nbytes + self.values.nbytes
