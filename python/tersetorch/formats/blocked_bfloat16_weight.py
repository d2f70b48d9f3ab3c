"""A weight in bfloat16, its non-zeros in words of 2 columns, cut into blocks for products with many samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tersetorch import ops
from tersetorch.formats.blocked_words import BlockedWords, word_block_for
from tersetorch.formats.csr_weight import CsrWeight


@dataclass(frozen=True)
class BlockedBFloat16Weight(BlockedWords):
    """Blocks of 256 rows and column_block columns, by rows, then by columns; tersetorch.ops.blocked_bfloat16_matmul.

    Attributes:
        block_offsets: int32 [blocks + 1], from 0 to the number of words, never falling.
        segments: int32 [rows * column blocks]: row in the block << 16 | its words there.
        indices: int16 [words], read as uint16: word in the block, of 2 columns each.
        values: bfloat16 [words, 2].
        rows, columns: shape of the dense weight.
        column_block: columns of a block, a multiple of 2 up to 32768.
    """

    GROUP: ClassVar[int] = 2

    block_offsets: Tensor
    segments: Tensor
    indices: Tensor
    values: Tensor
    rows: int
    columns: int
    column_block: int

    @classmethod
    def from_dense(cls, weight: Tensor, samples: int = 64, column_block: int | None = None) -> BlockedBFloat16Weight:
        """Rounds the non-zeros of weight as CsrWeight.from_dense takes them, as from_csr does.

        Raises:
            TypeError, ValueError: as those two raise them.
        """
        return cls.from_csr(CsrWeight.from_dense(weight), samples, column_block)

    @classmethod
    def from_csr(cls, weight: CsrWeight, samples: int = 64, column_block: int | None = None) -> BlockedBFloat16Weight:
        """Rounds a weight to bfloat16, nearest, and cuts it for products with about so many samples.

        Raises:
            TypeError: an argument has another type.
            ValueError: samples or column_block is out of range.
            RuntimeError: weight is not valid.
        """
        column_block = word_block_for(weight, samples, column_block, cls.GROUP)
        block_offsets, segments, indices, words = ops.blocked_bfloat16_pack(
            weight.row_offsets,
            weight.wide_indices,
            weight.values.detach().bfloat16(),
            columns=weight.columns,
            column_block=column_block,
        )
        return cls(block_offsets, segments, indices, words, *weight.shape, column_block)

    def to_dense(self) -> Tensor:
        """The exact weight the kernel uses: bfloat16 [rows, columns]."""
        return self.scatter(self.values)

    def validate(self) -> None:
        """Checks what the kernel and to_dense rely on.

        Raises:
            TypeError: a tensor has another dtype than the class names.
            ValueError: the fields do not fit each other.
        """
        self.check_words(torch.bfloat16)

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors."""
        return self.layout_nbytes
