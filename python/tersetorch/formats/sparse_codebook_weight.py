"""A weight whose non-zeros are 8-bit codes into a table of values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tersetorch.formats.csr_pattern import (
    CsrPattern,
    check_dense,
    check_pattern,
    check_tensor,
    narrow,
    non_zeros,
    scatter,
)

MAX_ENTRIES = 256
# Non-zeros looked at first: a weight that nobody shared is refused without sorting all of it.
SAMPLE = 65536


@dataclass(frozen=True)
class SparseCodebookWeight(CsrPattern):
    """W[r, col_indices[k]] = codebook[0, codes[k]] for row_offsets[r] <= k < row_offsets[r + 1], 0 elsewhere.

    Attributes:
        row_offsets: int32 [rows + 1], from 0 to nnz, never falling.
        col_indices: int32 [nnz], strictly rising within a row, each in [0, columns); or int16, 16 unsigned bits.
        codes: uint8 [nnz], each in [1, entries): code 0 is reserved for zero.
        codebook: float32 [1, entries], 1 <= entries <= 256, codebook[0, 0] = 0.
        columns: width of the dense weight.

    Source:
        Han et al., Deep Compression (2015), sections 2 and 3, with absolute columns instead of gaps, so that a kernel
        can start at any row.
    """

    row_offsets: Tensor
    col_indices: Tensor
    codes: Tensor
    codebook: Tensor
    columns: int

    @classmethod
    def from_dense(cls, weight: Tensor) -> SparseCodebookWeight:
        """Finds the codes of weight, float32 or bfloat16 [rows, columns], exactly; the codebook is sorted.

        Raises:
            TypeError: weight is not a float32 or bfloat16 tensor.
            ValueError: weight is not 2-D, or has more than 255 distinct non-zero values.
            RuntimeError: weight holds 2**31 or more non-zeros.
        """
        check_dense("SparseCodebookWeight", weight)
        row_offsets, col_indices, values = non_zeros(weight)
        codes, codebook = _share(values.float())
        return cls(row_offsets, col_indices, codes, codebook, weight.shape[1])

    def narrowed(self) -> SparseCodebookWeight:
        """The same weight with 16-bit column indices: fewer bytes to read, for a product with one sample above all.

        Raises:
            ValueError: there are more than 65,536 columns.
        """
        col_indices = narrow("SparseCodebookWeight", self.col_indices, self.columns)
        return SparseCodebookWeight(self.row_offsets, col_indices, self.codes, self.codebook, self.columns)

    def to_dense(self) -> Tensor:
        """The exact weight the kernel uses: float32 [rows, columns]."""
        return scatter(self.row_offsets, self.col_indices, self.values, self.columns)

    def validate(self) -> None:
        """Checks what the kernel and to_dense rely on.

        Raises:
            TypeError: a tensor has another dtype than the class names.
            ValueError: shapes, offsets, columns, codes or codebook do not fit each other.
        """
        owner = "SparseCodebookWeight"
        check_pattern(owner, self.row_offsets, self.col_indices, self.columns)
        check_codes(owner, self.codes, self.codebook, "col_indices", self.nnz)

    @property
    def values(self) -> Tensor:
        """The value of every stored position, float32 [nnz]; differentiable in codebook."""
        return self.codebook[0].index_select(0, self.codes.int())

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors."""
        return self.row_offsets.nbytes + self.col_indices.nbytes + self.codes.nbytes + self.codebook.nbytes


def check_codes(owner: str, codes: Tensor, codebook: Tensor, positions: str, stored: int) -> None:
    """Checks one code for each of the stored positions, and the codebook they number.

    Raises:
        TypeError: codes is not uint8 or codebook not float32.
        ValueError: shapes or codes do not fit each other, or entry 0 is not 0.
    """
    check_tensor(owner, "codes", codes)
    check_tensor(owner, "codebook", codebook)
    if codes.dtype != torch.uint8:
        raise TypeError(f"{owner}: codes must be uint8, got {codes.dtype}; build it with from_dense")
    if codebook.dtype != torch.float32:
        raise TypeError(f"{owner}: codebook must be float32, got {codebook.dtype}; call codebook.float()")
    if codes.shape != (stored,):
        raise ValueError(
            f"{owner}: codes must be [{stored}] as {positions} is, got shape {tuple(codes.shape)}; "
            "pass one code for each stored position"
        )
    if codebook.dim() != 2 or codebook.shape[0] != 1 or not 1 <= codebook.shape[1] <= MAX_ENTRIES:
        raise ValueError(
            f"{owner}: codebook must be [1, entries] with 1 <= entries <= {MAX_ENTRIES}, "
            f"got shape {tuple(codebook.shape)}; share the weight with at most 8 bits"
        )
    if codebook[0, 0] != 0:
        raise ValueError(f"{owner}: codebook[0, 0] must be 0, got {codebook[0, 0].item()}; code 0 is reserved for zero")
    if stored and not (int(codes.min()) >= 1 and int(codes.max()) < codebook.shape[1]):
        raise ValueError(
            f"{owner}: codes must lie in [1, {codebook.shape[1]}), got values from {int(codes.min())} "
            f"to {int(codes.max())}; build it with from_dense"
        )


def _share(stored: Tensor) -> tuple[Tensor, Tensor]:
    """Codes uint8 [nnz] and the codebook float32 [1, entries], sorted, of numbers that are not 0.

    Numbers are told apart by their bits. Looking them up in the few values that there may be is several times faster
    than sorting them all.
    """
    bits = stored.view(torch.int32)
    table = bits.new_empty(0)
    missing = bits
    while missing.numel():
        table = torch.cat([table, missing[:SAMPLE]]).unique()
        if table.numel() >= MAX_ENTRIES:
            bound = "at least " if missing.numel() > SAMPLE else ""
            raise ValueError(
                f"SparseCodebookWeight: weight must have at most {MAX_ENTRIES - 1} distinct non-zero values, "
                f"got {bound}{table.numel()}; share it first, for example with tt.quantize.kmeans(model, bits=8)"
            )
        place = torch.searchsorted(table, bits, out_int32=True).clamp_max_(table.numel() - 1)
        missing = bits[table[place] != bits]
    distinct, order = table.view(torch.float32).sort()
    codebook = torch.cat([distinct.new_zeros(1), distinct])[None]
    if not table.numel():
        return bits.to(torch.uint8), codebook
    code_of = torch.empty_like(order, dtype=torch.uint8)
    code_of[order] = torch.arange(1, table.numel() + 1, dtype=torch.uint8, device=order.device)
    return code_of[place], codebook
