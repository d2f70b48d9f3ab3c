"""A weight made of shared sub-vectors: products or residuals."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tersetorch import ops
from tersetorch.formats.csr_pattern import check_dense, check_tensor

MAX_ENTRIES = 256


@dataclass(frozen=True)
class ProductWeight:
    """W[r, s * width + j] = sum over stages t of codebooks[t, s, j, code of row r in table t * segments + s].

    Product quantisation has one stage, residual quantisation one segment that is as wide as W. Where codebooks have one
    segment and the codes several, all of them share it.

    Attributes:
        codes: uint8 [tiles, bytes], packed as ops.product_pack does: 4 bits a code up to 16 entries, else 8.
        codebooks: float32 [stages, segments or 1, width, entries], 1 <= entries <= 256; what lies past the last column
            is padding.
        rows, columns: of the dense weight.

    Source:
        Gong et al., Compressing deep convolutional networks using vector quantization (2014), sections 3.3 and 3.4.
    """

    codes: Tensor
    codebooks: Tensor
    rows: int
    columns: int

    @classmethod
    def from_codes(cls, codes: Tensor, codebooks: Tensor, columns: int) -> ProductWeight:
        """The weight of these codes uint8 [rows, stages * segments].

        Raises:
            TypeError, ValueError: the tensors have other dtypes or shapes, or a code names no entry.
        """
        owner = "ProductWeight"
        check_tensor(owner, "codes", codes)
        if codes.dtype != torch.uint8:
            raise TypeError(f"{owner}: codes must be uint8, got {codes.dtype}; convert them")
        _check_codebooks(codebooks, columns)
        tables = codebooks.shape[0] * ops.product_segments(columns, codebooks.shape[2])
        if codes.dim() != 2 or codes.shape[1] != tables:
            raise ValueError(
                f"{owner}: codes must be [rows, {tables}], one for each stage and segment, got shape "
                f"{tuple(codes.shape)}; pass those that belong to the codebooks"
            )
        weight = cls(ops.product_pack(codes, codebooks.shape[3]), codebooks, codes.shape[0], columns)
        weight.validate()
        return weight

    @classmethod
    def from_dense(cls, weight: Tensor, sub_vector: int = 4) -> ProductWeight:
        """Finds the sub-vectors of a weight that was product-quantised, float32 or bfloat16 [rows, columns], exactly.

        Args:
            weight: what is to be stored.
            sub_vector: columns of a segment.

        Raises:
            TypeError: weight is not a float32 or bfloat16 tensor.
            ValueError: weight is not 2-D, sub_vector is not positive, or a segment has more than 256 distinct parts.
        """
        check_dense("ProductWeight", weight)
        if sub_vector < 1:
            raise ValueError(f"ProductWeight: sub_vector must be at least 1, got {sub_vector}; pass a width")
        dense = weight.detach().float()
        rows, columns = dense.shape
        segments = ops.product_segments(columns, sub_vector)
        whole = torch.nn.functional.pad(dense, (0, segments * sub_vector - columns))
        found = []
        for part in whole.view(rows, segments, sub_vector).unbind(1):
            distinct, named = part.unique(dim=0, return_inverse=True)
            if len(distinct) > MAX_ENTRIES:
                raise ValueError(
                    f"ProductWeight: weight must have at most {MAX_ENTRIES} distinct parts in each {sub_vector} "
                    f"columns, got {len(distinct)}; quantise it first, for example with tt.quantize.product(model)"
                )
            found.append((distinct.T, named.to(torch.uint8)))
        entries = max((table.shape[1] for table, _ in found), default=1) or 1
        codebooks = dense.new_zeros(1, max(1, segments), sub_vector, entries)
        codes = torch.zeros(rows, segments, dtype=torch.uint8, device=dense.device)
        for segment, (table, named) in enumerate(found):
            codebooks[0, segment, :, : table.shape[1]] = table
            codes[:, segment] = named
        return cls.from_codes(codes, codebooks, columns)

    def to_dense(self) -> Tensor:
        """The exact weight the kernel uses: float32 [rows, columns]; differentiable in codebooks."""
        return ops.product_decode(self.codes, self.codebooks, out_features=self.rows, in_features=self.columns)

    def validate(self) -> None:
        """Checks what the kernel and to_dense rely on.

        Raises:
            TypeError: a tensor has another dtype than the class names.
            ValueError: sizes do not fit each other, or a code names no entry.
        """
        owner = "ProductWeight"
        check_tensor(owner, "codes", self.codes)
        if self.codes.dtype != torch.uint8:
            raise TypeError(f"{owner}: codes must be uint8, got {self.codes.dtype}; build it with from_codes")
        if self.rows < 0 or self.columns < 0:
            raise ValueError(
                f"{owner}: rows and columns must be at least 0, got {self.rows} and {self.columns}; pass the weight's"
            )
        _check_codebooks(self.codebooks, self.columns)
        expected = ops.product_bytes(self.rows, self.tables, self.entries)
        if self.codes.numel() != expected:
            raise ValueError(
                f"{owner}: codes must have {expected} bytes for {self.rows} rows of {self.tables} codes, got "
                f"{self.codes.numel()}; build it with from_codes"
            )
        largest = int(self.row_codes.max()) if self.rows and self.tables else 0
        if largest >= self.entries:
            raise ValueError(
                f"{owner}: codes must lie in [0, {self.entries}), got {largest}; pass the codebooks they were made with"
            )

    @property
    def stages(self) -> int:
        """Terms of each sub-vector."""
        return self.codebooks.shape[0]

    @property
    def segments(self) -> int:
        """Parts of each row."""
        return ops.product_segments(self.columns, self.codebooks.shape[2])

    @property
    def tables(self) -> int:
        """Codes of a row: stages * segments."""
        return self.stages * self.segments

    @property
    def entries(self) -> int:
        """Sub-vectors that a code chooses from."""
        return self.codebooks.shape[3]

    @property
    def row_codes(self) -> Tensor:
        """The codes, unpacked: uint8 [rows, stages * segments]."""
        return ops.product_unpack(self.codes, self.entries, rows=self.rows, tables=self.tables)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the dense weight."""
        return self.rows, self.columns

    @property
    def nnz(self) -> int:
        """Every position is stored."""
        return self.rows * self.columns

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors."""
        return self.codes.nbytes + self.codebooks.nbytes


def _check_codebooks(codebooks: Tensor, columns: int) -> None:
    owner = "ProductWeight"
    check_tensor(owner, "codebooks", codebooks)
    if codebooks.dtype != torch.float32:
        raise TypeError(f"{owner}: codebooks must be float32, got {codebooks.dtype}; call codebooks.float()")
    if codebooks.dim() != 4 or not all(codebooks.shape) or codebooks.shape[3] > MAX_ENTRIES:
        raise ValueError(
            f"{owner}: codebooks must be [stages, segments, width, entries] with 1 to {MAX_ENTRIES} entries, got shape "
            f"{tuple(codebooks.shape)}; quantise with at most 8 bits a code"
        )
    segments = ops.product_segments(columns, codebooks.shape[2])
    if codebooks.shape[1] not in (1, segments):
        raise ValueError(
            f"{owner}: codebooks must have 1 segment or the {segments} that {columns} columns have, got "
            f"{codebooks.shape[1]}; pass the columns of the weight"
        )
