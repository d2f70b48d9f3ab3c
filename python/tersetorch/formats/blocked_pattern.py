"""Where the non-zeros of a weight in blocks lie, shared by the formats that hold one."""

from __future__ import annotations

import torch
from torch import Tensor

from tersetorch import ops
from tersetorch.formats.csr_pattern import CsrPattern, check_tensor
from tersetorch.ops.blocked_matmul import BLOCK_ROWS, MAX_COLUMN_BLOCK, blocked_positions

# Bytes of x that a block reads, by the density below which it is best: most of a first-level data cache of 48 KiB.
# Sparser weights want wider blocks, since each row of a block costs as much as 3 to 4 non-zeros.
TILE_BYTES = ((0.06, 48 * 1024), (0.25, 40 * 1024), (1.0, 32 * 1024))


def column_block_for(samples: int, density: float) -> int:
    """Columns of a block that multiply samples, at least 1, fastest with a weight of this density (measured).

    4096 x 4096 on 48 KiB of first-level data cache, ms for blocks of 128, 160, 192 and 384 columns: 64 samples at 3 %
    1.42, 1.31, 1.27, 1.31; at 9 % 2.67, 2.60, 2.56, 2.81; at 20 % 4.60, 4.60, 4.76; at 35 % 7.26, 7.37, 7.83.
    """
    width = next((width for width in (64, 32, 16) if samples >= width), 8)
    tile = next((size for limit, size in TILE_BYTES if density < limit), TILE_BYTES[-1][1])
    return tile // (4 * width)


class BlockedPattern:
    """What follows from the positions alone."""

    block_offsets: Tensor
    segments: Tensor
    indices: Tensor
    rows: int
    columns: int
    column_block: int

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the dense weight."""
        return self.rows, self.columns

    @property
    def nnz(self) -> int:
        """Number of stored positions."""
        return self.indices.numel()

    @property
    def positions(self) -> tuple[Tensor, Tensor]:
        """Row and column of every stored position, int64 [nnz] each."""
        return blocked_positions(
            self.block_offsets, self.segments, self.indices, self.rows, self.columns, self.column_block
        )

    @property
    def pattern_nbytes(self) -> int:
        """Bytes of the tensors that say where the values are."""
        return self.block_offsets.nbytes + self.segments.nbytes + self.indices.nbytes

    def scatter(self, values: Tensor) -> Tensor:
        """The dense weight with values [nnz] at the stored positions and 0 elsewhere."""
        dense = values.new_zeros(self.rows, self.columns)
        dense[self.positions] = values
        return dense

    def check_pattern(self, owner: str | None = None) -> None:
        """Checks that the pattern is one that blocked_pack could have made, but for the order of rows in a block.

        Raises:
            TypeError: a tensor or a size has another type.
            ValueError: shapes, offsets, segments or indices do not describe the non-zeros of each row once.
        """
        owner = owner or type(self).__name__
        for name, size in (("rows", self.rows), ("columns", self.columns), ("column_block", self.column_block)):
            if isinstance(size, bool) or not isinstance(size, int):
                raise TypeError(f"{owner}: {name} must be an int, got {size!r}; build it with from_csr")
            if size < 0:
                raise ValueError(f"{owner}: {name} must be at least 0, got {size}; build it with from_csr")
        if not 1 <= self.column_block <= MAX_COLUMN_BLOCK:
            raise ValueError(
                f"{owner}: column_block must be 1 to {MAX_COLUMN_BLOCK}, got {self.column_block}; "
                "build it with from_csr"
            )
        column_blocks = -(-self.columns // self.column_block)
        blocks = -(-self.rows // BLOCK_ROWS) * column_blocks
        for name, tensor, dtype, length in (
            ("block_offsets", self.block_offsets, torch.int32, blocks + 1),
            ("segments", self.segments, torch.int32, self.rows * column_blocks),
            ("indices", self.indices, torch.int16, None),
        ):
            check_tensor(owner, name, tensor)
            if tensor.dtype != dtype:
                raise TypeError(f"{owner}: {name} must be {dtype}, got {tensor.dtype}; build it with from_csr")
            if tensor.dim() != 1 or (length is not None and tensor.numel() != length):
                raise ValueError(
                    f"{owner}: {name} must be [{'nnz' if length is None else length}], got shape "
                    f"{tuple(tensor.shape)}; build it with from_csr"
                )
        self._check_numbers(owner, column_blocks)

    def _check_numbers(self, owner: str, column_blocks: int) -> None:
        counts = (self.segments & 0xFFFF).long()
        ends = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        row = torch.arange(self.rows, device=counts.device)
        begins = row // BLOCK_ROWS * BLOCK_ROWS
        heights = (begins + BLOCK_ROWS).clamp_max(self.rows) - begins
        # A block's rows are neighbours among the segments; where each block begins:
        starts = (begins * column_blocks)[::BLOCK_ROWS, None] + heights[::BLOCK_ROWS, None] * torch.arange(
            column_blocks, device=counts.device
        )
        starts = torch.cat([starts.flatten(), starts.new_tensor([self.segments.numel()])])
        if not torch.equal(ends[starts], self.block_offsets.long()) or int(ends[-1]) != self.nnz:
            raise ValueError(
                f"{owner}: block_offsets must sum the segments' counts up to {self.nnz}, got others; "
                "build it with from_csr"
            )
        inside = self.segments.long() >> 16
        block = torch.repeat_interleave(starts.diff())
        if self.segments.numel():
            height = starts.diff()[block]
            named = starts[block] + inside
            legal = (inside >= 0) & (inside < height)
            if not bool(legal.all()) or torch.unique(named).numel() != named.numel():
                raise ValueError(
                    f"{owner}: segments must name each row of their block once, got others; build it with from_csr"
                )
        if self.nnz == 0:
            return
        rows, columns = self.positions
        width = self.columns - columns // self.column_block * self.column_block
        of_block = self.indices.long() & 0xFFFF
        if bool((of_block >= width.clamp_max(self.column_block)).any()) or bool((columns >= self.columns).any()):
            raise ValueError(
                f"{owner}: indices must lie inside their block of {self.column_block} columns and inside "
                f"{self.columns}, got one outside; build it with from_csr"
            )
        if torch.unique(rows * self.columns + columns).numel() != self.nnz:
            raise ValueError(f"{owner}: indices must be different within a row, got one twice; build it with from_csr")


def cut(weight: CsrPattern, samples: int, column_block: int | None) -> tuple[dict[str, Tensor | int], Tensor]:
    """The fields of a BlockedPattern with weight's positions, and where each of its non-zeros comes from.

    Raises:
        TypeError: samples or column_block is not an int.
        ValueError: samples or column_block is out of range.
    """
    for name, value in (("samples", samples), ("column_block", column_block)):
        if name == "column_block" and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"from_csr: {name} must be an int, got {type(value).__name__}; pass for example 64")
        if value < 1:
            raise ValueError(f"from_csr: {name} must be at least 1, got {value}; pass for example 64")
    rows, columns = weight.shape
    if column_block is None:
        column_block = column_block_for(samples, weight.nnz / max(1, rows * columns))
    block_offsets, segments, indices, sources = ops.blocked_pack(
        weight.row_offsets, weight.wide_indices, columns=columns, column_block=column_block
    )
    fields: dict[str, Tensor | int] = {"block_offsets": block_offsets, "segments": segments, "indices": indices}
    return fields | {"rows": rows, "columns": columns, "column_block": column_block}, sources
