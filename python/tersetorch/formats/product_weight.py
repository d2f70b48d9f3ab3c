"""A weight made of shared sub-vectors: products or residuals."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tersetorch import ops
from tersetorch.formats.csr_pattern import check_dense, check_tensor
from tersetorch.formats.shared_parts import MAX_ENTRIES, find_parts, widths

# Widths of parts that are looked at in all segments.
TRIED = 2


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
    def from_dense(cls, weight: Tensor, sub_vector: int | None = None) -> ProductWeight:
        """Finds the sub-vectors of a weight that was product-quantised, float32 or bfloat16 [rows, columns], exactly.

        Args:
            weight: what is to be stored.
            sub_vector: columns of a segment; None for those that find finds, or 4.

        Raises:
            TypeError: weight is not a float32 or bfloat16 tensor.
            ValueError: weight is not 2-D, sub_vector is not positive, or a segment has more than 256 distinct parts.
        """
        found = cls.find(weight) if sub_vector is None else None
        if found is not None:
            return found
        check_dense("ProductWeight", weight)
        width = 4 if sub_vector is None else sub_vector
        if width < 1:
            raise ValueError(f"ProductWeight: sub_vector must be at least 1, got {width}; pass a width")
        if not weight.numel():
            segments = ops.product_segments(weight.shape[1], width)
            codes = torch.zeros(weight.shape[0], segments, dtype=torch.uint8, device=weight.device)
            return cls.from_codes(codes, codes.new_zeros(1, 1, width, 1, dtype=torch.float32), weight.shape[1])
        found = cls._of_width(weight, width)
        if found is None:
            raise ValueError(
                f"ProductWeight: weight must have at most {MAX_ENTRIES} distinct parts in each {width} columns, got "
                "more; quantise it first, for example with tt.quantize.product(model), or pass sub_vector="
            )
        return found

    @classmethod
    def find(cls, weight: Tensor, nbytes: float = math.inf) -> ProductWeight | None:
        """The smallest form of one stage that holds weight, float32 or bfloat16 [rows, columns], exactly, or None.

        Rows share parts of 2 or more columns, at most 256 in each segment, which together take fewer bytes than the
        weight, and than nbytes; numbers are told apart by their bits. formats.shared_parts says how widths are found.

        Raises:
            TypeError: weight is not a float32 or bfloat16 tensor.
            ValueError: weight is not 2-D.
        """
        check_dense("ProductWeight", weight)
        best = None
        for found in widths(_bits(weight))[:TRIED]:
            tables = ops.product_segments(weight.shape[1], found.width)
            if 4 * found.numbers + ops.product_bytes(weight.shape[0], tables, found.entries) < nbytes:
                candidate = cls._of_width(weight, found.width)
                if candidate is not None and candidate.nbytes < nbytes:
                    best, nbytes = candidate, candidate.nbytes
        return best

    @classmethod
    def _of_width(cls, weight: Tensor, width: int) -> ProductWeight | None:
        found = find_parts(_bits(weight), width)
        if found is None:
            return None
        return cls.from_codes(found.codes, found.codebooks.view(torch.float32)[None], weight.shape[1])

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


def _bits(weight: Tensor) -> Tensor:
    """The numbers of a weight as float32, as bit patterns."""
    return weight.detach().float().contiguous().view(torch.int32)


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
