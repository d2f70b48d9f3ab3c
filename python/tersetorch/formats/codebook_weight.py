"""A dense weight whose elements are codes into tables of a few values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tersetorch import ops
from tersetorch.formats.csr_pattern import check_dense, check_tensor

MAX_ENTRIES = 256


@dataclass(frozen=True)
class CodebookWeight:
    """W[r, c] = codebook[t, code[r, c]]; t is 0, the row r, or the block c // column_block.

    Attributes:
        codes: uint8 [rows, bytes], laid out by ops.codebook_pack: 2 bits a code up to 4 entries, 4 up to 16, 8 beyond,
            every row and block in whole chunks of 64 bytes.
        codebook: float32 [tables, entries], 1 <= entries <= 256; one table, one for each row, or one for each block.
        columns: width of the dense weight.
        column_block: columns that share a table, or 0 where tables are those of the tensor or of rows.

    Source:
        Han et al., Deep Compression (2016), section 3.
    """

    codes: Tensor
    codebook: Tensor
    columns: int
    column_block: int = 0

    @classmethod
    def from_codes(cls, codes: Tensor, codebook: Tensor, *, column_block: int = 0) -> CodebookWeight:
        """Lays codes, uint8 [rows, columns], out beside their codebook, which is used, not copied.

        Raises:
            TypeError: codes is not uint8 or codebook not float32.
            ValueError: shapes do not fit each other, or a code is outside its table.
        """
        owner = "CodebookWeight"
        _check_codebook(owner, codebook)
        check_tensor(owner, "codes", codes)
        if codes.dtype != torch.uint8:
            raise TypeError(f"{owner}: codes must be uint8, got {codes.dtype}; convert them")
        if codes.dim() != 2:
            raise ValueError(f"{owner}: codes must be [rows, columns], got shape {tuple(codes.shape)}; reshape them")
        if codes.numel() and int(codes.max()) >= codebook.shape[1]:
            raise ValueError(
                f"{owner}: codes must lie in [0, {codebook.shape[1]}), got {int(codes.max())}; pass the codebook that "
                "they were made with"
            )
        _check_block(owner, column_block)
        packed = ops.codebook_pack(codes, entries=codebook.shape[1], column_block=column_block)
        weight = cls(packed, codebook, codes.shape[1], column_block)
        weight._check_shapes()
        return weight

    @classmethod
    def from_dense(cls, weight: Tensor) -> CodebookWeight:
        """Finds the codes of weight, float32 or bfloat16 [rows, columns], exactly; as find does.

        Raises:
            TypeError: weight is not a float32 or bfloat16 tensor.
            ValueError: weight is not 2-D, or cannot be held.
        """
        found = cls.find(weight)
        if found is None:
            raise ValueError(
                f"CodebookWeight: weight must have at most {MAX_ENTRIES} distinct values, in all or in each row or "
                "block of columns, got more; share it first, for example with tt.quantize.kmeans(model, bits=8)"
            )
        return found

    @classmethod
    def find(cls, weight: Tensor) -> CodebookWeight | None:
        """The smallest form that holds weight, float32 or bfloat16 [rows, columns], exactly, or None.

        One table of all distinct values; one for each row; or one for each block of so many columns, a power of two
        from 64 on: a block's codes take whole chunks, and narrower ones are never the smallest. Several tables only
        where they and the codes take fewer bytes than the weight in float32: a row of few columns has few values,
        shared or not. Tables rise, and repeat their last value; numbers are told apart by their bits.

        Raises:
            TypeError: weight is not a float32 or bfloat16 tensor.
            ValueError: weight is not 2-D.
        """
        check_dense("CodebookWeight", weight)
        values = weight.detach().float().contiguous()
        rows, columns = values.shape
        best = None
        table = codebook_values(values)
        if table is not None:
            table = table if table.numel() else values.new_zeros(1)
            keys, order = table.view(torch.int32).sort()
            place = torch.searchsorted(keys, values.view(torch.int32), out_int32=True)
            codes = order.to(torch.uint8)[place] if place.numel() else place.to(torch.uint8)
            best = cls.from_codes(codes, table[None])
        if not values.numel():
            return best
        limit = values.nbytes if best is None else best.nbytes
        blocks = [1 << power for power in range(6, max(6, columns.bit_length())) if 1 << power < columns]
        for column_block in (0, *blocks) if rows > 1 else blocks:
            found = _find_groups(values, column_block, limit)
            if found is not None:
                best = cls.from_codes(*found, column_block=column_block)
                limit = best.nbytes
        return best

    def to_dense(self) -> Tensor:
        """The exact weight the kernel uses: float32 [rows, columns]; differentiable in codebook."""
        return ops.codebook_dense(self.codes, self.codebook, columns=self.columns, column_block=self.column_block)

    def unpacked(self) -> Tensor:
        """The codes, uint8 [rows, columns]."""
        return ops.codebook_unpack(
            self.codes, entries=self.codebook.shape[1], columns=self.columns, column_block=self.column_block
        )

    def validate(self) -> None:
        """Checks what the kernel and to_dense rely on.

        Raises:
            TypeError: a tensor has another dtype than the class names.
            ValueError: shapes, codes or codebook do not fit each other.
        """
        self._check_shapes()
        codes = self.unpacked()
        if codes.numel() and int(codes.max()) >= self.codebook.shape[1]:
            raise ValueError(
                f"CodebookWeight: codes must lie in [0, {self.codebook.shape[1]}), got {int(codes.max())}; "
                "build it with from_codes"
            )

    def _check_shapes(self) -> None:
        owner = "CodebookWeight"
        _check_codebook(owner, self.codebook)
        check_tensor(owner, "codes", self.codes)
        if self.codes.dtype != torch.uint8:
            raise TypeError(f"{owner}: codes must be uint8, got {self.codes.dtype}; build it with from_codes")
        _check_block(owner, self.column_block)
        row_bytes = ops.codebook_row_bytes(self.codebook.shape[1], self.columns, self.column_block)
        if self.codes.dim() != 2 or self.codes.shape[1] != row_bytes:
            raise ValueError(
                f"{owner}: codes must be [rows, {row_bytes}] for {self.columns} columns and {self.codebook.shape[1]} "
                f"entries, got shape {tuple(self.codes.shape)}; build it with from_codes"
            )
        tables = ops.codebook_tables(self.codes.shape[0], self.columns, self.column_block)
        if self.codebook.shape[0] not in tables:
            raise ValueError(
                f"{owner}: codebook must have {' or '.join(map(str, dict.fromkeys(tables)))} tables, got "
                f"{self.codebook.shape[0]}; name the column_block that they belong to"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the dense weight."""
        return self.codes.shape[0], self.columns

    @property
    def nnz(self) -> int:
        """Number of stored weights: all of them."""
        return self.codes.shape[0] * self.columns

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors."""
        return self.codes.nbytes + self.codebook.nbytes


def codebook_values(weight: Tensor) -> Tensor | None:
    """The distinct values of weight, float32, sorted, told apart by their bits; None where there are more than 256."""
    bits = weight.reshape(-1).view(torch.int32)
    table = bits.new_empty(0)
    missing = bits
    while missing.numel():
        # A part first: a weight that nobody shared is refused without sorting all of it.
        table = torch.cat([table, missing[: 2**16]]).unique()
        if table.numel() > MAX_ENTRIES:
            return None
        place = torch.searchsorted(table, missing, out_int32=True).clamp_max_(table.numel() - 1)
        missing = missing[table[place] != missing]
    return table.view(torch.float32).sort().values


def _find_groups(values: Tensor, column_block: int, limit: int) -> tuple[Tensor, Tensor] | None:
    """Codes and codebook with a table for each row, or block of columns; None where they take limit bytes or more."""
    rows, columns = values.shape

    def grouped(matrix: Tensor) -> Tensor:
        if not column_block:
            return matrix
        # The last block is filled up with its own values.
        missing = -columns % column_block
        filled = torch.cat([matrix, matrix[:, -1:].expand(rows, missing)], 1)
        return filled.view(rows, -1, column_block).transpose(0, 1).reshape(-1, rows * column_block)

    def size(entries: int) -> int:
        tables = -(-columns // column_block) if column_block else rows
        return rows * ops.codebook_row_bytes(entries, columns, column_block) + 4 * tables * entries

    bits = values.view(torch.int32)
    # The first group says the least number of entries: what nobody shared is refused without sorting all of it.
    first = bits[:, :column_block].reshape(-1) if column_block else bits[0]
    least = first[: 2**16].unique().numel()
    if least > MAX_ENTRIES or size(least) >= limit:
        return None
    groups = grouped(bits)
    # Whole numbers in the order of the numbers whose bits they are.
    keys, order = (groups ^ ((groups >> 31) & 0x7FFFFFFF)).sort(1)
    rank = torch.zeros_like(order)
    torch.cumsum(keys[:, 1:] != keys[:, :-1], 1, out=rank[:, 1:])
    entries = int(rank.max()) + 1
    if entries > MAX_ENTRIES or size(entries) >= limit:
        return None
    codes = torch.empty_like(groups, dtype=torch.uint8).scatter_(1, order, rank.to(torch.uint8))
    rising = groups.gather(1, order)
    table = rising[:, -1:].repeat(1, entries).scatter_(1, rank, rising)
    if column_block:
        codes = codes.view(-1, rows, column_block).transpose(0, 1).reshape(rows, -1)[:, :columns]
    return codes.contiguous(), table.view(torch.float32)


def _check_codebook(owner: str, codebook: Tensor) -> None:
    check_tensor(owner, "codebook", codebook)
    if codebook.dtype != torch.float32:
        raise TypeError(f"{owner}: codebook must be float32, got {codebook.dtype}; call codebook.float()")
    if codebook.dim() != 2 or not 1 <= codebook.shape[1] <= MAX_ENTRIES or not codebook.shape[0]:
        raise ValueError(
            f"{owner}: codebook must be [tables, entries] with 1 <= entries <= {MAX_ENTRIES}, got shape "
            f"{tuple(codebook.shape)}; share the weight with at most 8 bits"
        )


def _check_block(owner: str, column_block: int) -> None:
    if type(column_block) is not int or column_block < 0:
        raise ValueError(
            f"{owner}: column_block must be a whole number from 0 on, got {column_block!r}; pass 0 for none"
        )
