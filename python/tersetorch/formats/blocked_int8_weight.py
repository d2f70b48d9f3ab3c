"""A weight rounded to 8 bits, its non-zeros in words of 4 columns, cut into blocks for products with many samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tersetorch import ops
from tersetorch.formats.bitmap_int8_weight import LARGEST, round_rows
from tersetorch.formats.blocked_words import BlockedWords, word_block_for
from tersetorch.formats.csr_pattern import check_tensor
from tersetorch.formats.csr_weight import CsrWeight


@dataclass(frozen=True)
class BlockedInt8Weight(BlockedWords):
    """Blocks of 256 rows and column_block columns of values times scales[row]; tersetorch.ops.blocked_int8_matmul.

    Attributes:
        block_offsets: int32 [blocks + 1], from 0 to the number of words, never falling.
        segments: int32 [rows * column blocks]: row in the block << 16 | its words there.
        indices: int16 [words], read as uint16: word in the block, of 4 columns each.
        values: int8 [words, 4], each in [-127, 127].
        scales: float32 [rows].
        row_sums: int32 [rows], the sum of a row's values.
        rows, columns: shape of the dense weight.
        column_block: columns of a block, a multiple of 4 up to 32768.

    Source:
        Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference
        (2018), section 2.1, symmetric and one scale for each row.
    """

    GROUP: ClassVar[int] = 4

    block_offsets: Tensor
    segments: Tensor
    indices: Tensor
    values: Tensor
    scales: Tensor
    row_sums: Tensor
    rows: int
    columns: int
    column_block: int

    @classmethod
    def from_dense(cls, weight: Tensor, samples: int = 64, column_block: int | None = None) -> BlockedInt8Weight:
        """Rounds the non-zeros of weight as CsrWeight.from_dense takes them, as from_csr does.

        Raises:
            TypeError, ValueError: as those two raise them.
        """
        return cls.from_csr(CsrWeight.from_dense(weight), samples, column_block)

    @classmethod
    def from_csr(cls, weight: CsrWeight, samples: int = 64, column_block: int | None = None) -> BlockedInt8Weight:
        """Rounds and cuts a weight for products with about so many samples: scales[r] = max |W[r]| / 127.

        Raises:
            TypeError: an argument has another type.
            ValueError: weight is not finite, or samples or column_block is out of range.
            RuntimeError: weight is not valid.
        """
        column_block = word_block_for(weight, samples, column_block, cls.GROUP)
        values, scales = round_rows("BlockedInt8Weight", weight.row_offsets, weight.values.detach())
        block_offsets, segments, indices, words, row_sums = ops.blocked_int8_pack(
            weight.row_offsets, weight.wide_indices, values, columns=weight.columns, column_block=column_block
        )
        return cls(block_offsets, segments, indices, words, scales, row_sums, *weight.shape, column_block)

    def to_dense(self) -> Tensor:
        """The weight the kernel uses: float32 [rows, columns]; the kernel multiplies by a row's scale last."""
        return self.scatter(self.values).float() * self.scales[:, None]

    def validate(self) -> None:
        """Checks what the kernel and to_dense rely on.

        Raises:
            TypeError: a tensor has another dtype than the class names.
            ValueError: the fields do not fit each other.
        """
        owner = "BlockedInt8Weight"
        self.check_words(torch.int8)
        for name, tensor, dtype in (("scales", self.scales, torch.float32), ("row_sums", self.row_sums, torch.int32)):
            check_tensor(owner, name, tensor)
            if tensor.dtype != dtype:
                raise TypeError(f"{owner}: {name} must be {dtype}, got {tensor.dtype}; build it with from_csr")
            if tensor.shape != (self.rows,):
                raise ValueError(
                    f"{owner}: {name} must be [{self.rows}], got shape {tuple(tensor.shape)}; pass one for each row"
                )
        if self.values.numel() and int(self.values.min()) < -LARGEST:
            raise ValueError(f"{owner}: values must lie in [-127, 127], got -128; build it with from_csr")
        if not torch.equal(self.scatter(self.values).sum(1, dtype=torch.int32), self.row_sums):
            raise ValueError(
                f"{owner}: row_sums must be the sums of the rows' values, got others; build it with from_csr"
            )

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors."""
        return self.layout_nbytes + self.scales.nbytes + self.row_sums.nbytes
