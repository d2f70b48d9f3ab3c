"""Where the words of several consecutive columns of a weight in blocks lie, shared by the formats that hold them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tersetorch.formats.blocked_pattern import BlockedPattern, column_block_for
from tersetorch.formats.csr_pattern import CsrPattern, check_tensor


@dataclass(frozen=True)
class WordPattern(BlockedPattern):
    """A pattern whose columns are words."""

    block_offsets: Tensor
    segments: Tensor
    indices: Tensor
    rows: int
    columns: int
    column_block: int


class BlockedWords:
    """What follows from the words of a weight. A word is stored if one of its columns is, with zeros for the others."""

    GROUP: ClassVar[int]  # columns of a word

    block_offsets: Tensor
    segments: Tensor
    indices: Tensor
    values: Tensor
    rows: int
    columns: int
    column_block: int

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the dense weight."""
        return self.rows, self.columns

    @property
    def nnz(self) -> int:
        """Number of weights that are not 0."""
        return int(torch.count_nonzero(self.values))

    @property
    def words(self) -> WordPattern:
        """The positions of the words, columns counted in words."""
        return WordPattern(
            self.block_offsets,
            self.segments,
            self.indices,
            self.rows,
            -(-self.columns // self.GROUP),
            self.column_block // self.GROUP,
        )

    @property
    def layout_nbytes(self) -> int:
        """Bytes of the stored positions and values."""
        return self.words.pattern_nbytes + self.values.nbytes

    def scatter(self, values: Tensor) -> Tensor:
        """The dense weight with values [words, GROUP] at the stored positions and 0 elsewhere."""
        words = self.words
        dense = values.new_zeros(self.rows, words.columns, self.GROUP)
        dense[words.positions] = values
        return dense.flatten(1)[:, : self.columns].contiguous()

    def check_words(self, dtype: torch.dtype) -> None:
        """Checks that positions and values are ones that packing could have made.

        Raises:
            TypeError: a tensor or a size has another type.
            ValueError: the fields do not fit each other.
        """
        owner = type(self).__name__
        for name, size in (("columns", self.columns), ("column_block", self.column_block)):
            if isinstance(size, bool) or not isinstance(size, int):
                raise TypeError(f"{owner}: {name} must be an int, got {size!r}; build it with from_csr")
        if self.column_block % self.GROUP or self.column_block < self.GROUP:
            raise ValueError(
                f"{owner}: column_block must be a multiple of {self.GROUP}, got {self.column_block}; "
                "build it with from_csr"
            )
        self.words.check_pattern(owner)
        check_tensor(owner, "values", self.values)
        if self.values.dtype != dtype:
            raise TypeError(f"{owner}: values must be {dtype}, got {self.values.dtype}; build it with from_csr")
        if self.values.shape != (self.indices.numel(), self.GROUP):
            raise ValueError(
                f"{owner}: values must be [{self.indices.numel()}, {self.GROUP}], got shape "
                f"{tuple(self.values.shape)}; build it with from_csr"
            )
        beyond = self.words.columns * self.GROUP - self.columns
        if beyond and self.indices.numel():
            last = self.words.positions[1] == self.words.columns - 1
            if bool((self.values[last][:, self.GROUP - beyond :] != 0).any()):
                raise ValueError(
                    f"{owner}: values must be 0 beyond column {self.columns}, got others; build it with from_csr"
                )


def word_block_for(weight: CsrPattern, samples: int, column_block: int | None, group: int) -> int:
    """Columns of a block, as they were asked for or as column_block_for takes words.

    Raises:
        TypeError: samples or column_block is not an int.
        ValueError: samples is out of range.
    """
    for name, value in (("samples", samples), ("column_block", column_block)):
        if name == "column_block" and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"from_csr: {name} must be an int, got {type(value).__name__}; pass for example 64")
    if samples < 1:
        raise ValueError(f"from_csr: samples must be at least 1, got {samples}; pass for example 64")
    if column_block is not None:
        return column_block
    rows, columns = weight.shape
    density = weight.nnz / max(1, rows * columns)
    return group * column_block_for(samples, 1 - (1 - density) ** group)
