"""A weight as one bit for each weight and its non-zeros rounded to 8 bits, for products with few samples."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tersetorch.formats.bitmap_pattern import BitmapPattern, bits_of
from tersetorch.formats.bitmap_weight import BitmapWeight
from tersetorch.formats.csr_pattern import check_dense, check_tensor, rows_of
from tersetorch.formats.csr_weight import CsrWeight

LARGEST = 127


@dataclass(frozen=True)
class BitmapInt8Weight(BitmapPattern):
    """BitmapWeight with scales[r] * values[k] for the weights of row r.

    Attributes:
        bitmap, row_offsets, columns: as in BitmapWeight.
        values: int8 [nnz], each in [-127, 127]. A weight that was rounded to 0 stays stored.
        scales: float32 [rows].

    Source:
        Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference
        (2018), section 2.1, symmetric and one scale for each row.
    """

    bitmap: Tensor
    row_offsets: Tensor
    values: Tensor
    scales: Tensor
    columns: int

    @classmethod
    def from_dense(cls, weight: Tensor) -> BitmapInt8Weight:
        """Rounds the non-zeros of weight, float32 or bfloat16 [rows, columns]: scales[r] = max |W[r]| / 127.

        Raises:
            TypeError: weight is not a float32 or bfloat16 tensor.
            ValueError: weight is not 2-D, or not finite.
        """
        check_dense("BitmapInt8Weight", weight)
        packed = BitmapWeight.from_dense(weight)
        return cls(
            packed.bitmap,
            packed.row_offsets,
            *round_rows("BitmapInt8Weight", packed.row_offsets, packed.values),
            packed.columns,
        )

    @classmethod
    def from_csr(cls, weight: CsrWeight) -> BitmapInt8Weight:
        """Rounds the stored values as from_dense does; row_offsets are shared.

        Raises:
            ValueError: weight is not finite.
            RuntimeError: weight is not valid.
        """
        bitmap = bits_of(weight)
        return cls(
            bitmap,
            weight.row_offsets,
            *round_rows("BitmapInt8Weight", weight.row_offsets, weight.values.detach()),
            weight.columns,
        )

    def to_dense(self) -> Tensor:
        """The weight the kernel uses: float32 [rows, columns]; the kernel multiplies by a row's scale last."""
        return self.scatter(self.values.float() * self.scales[rows_of(self.row_offsets)])

    def validate(self) -> None:
        """Checks what the kernel and to_dense rely on.

        Raises:
            TypeError: a tensor has another dtype than the class names.
            ValueError: the fields do not fit each other.
        """
        owner = "BitmapInt8Weight"
        self.check_pattern("values", self.values)
        check_tensor(owner, "scales", self.scales)
        for name, tensor, dtype in (("values", self.values, torch.int8), ("scales", self.scales, torch.float32)):
            if tensor.dtype != dtype:
                raise TypeError(f"{owner}: {name} must be {dtype}, got {tensor.dtype}; build it with from_dense")
        if self.scales.shape != (self.shape[0],):
            raise ValueError(
                f"{owner}: scales must be [{self.shape[0]}], got shape {tuple(self.scales.shape)}; "
                "pass one for each row"
            )
        if self.nnz and int(self.values.min()) < -LARGEST:
            raise ValueError(f"{owner}: values must lie in [-127, 127], got -128; build it with from_dense")

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors."""
        return self.pattern_nbytes + self.values.nbytes + self.scales.nbytes


def round_rows(owner: str, row_offsets: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Values as int8, and the scale of each row."""
    values, rows = values.float(), rows_of(row_offsets)
    largest = values.new_zeros(row_offsets.numel() - 1).scatter_reduce(0, rows, values.abs(), "amax")
    if not bool(largest.isfinite().all()):
        raise ValueError(f"{owner}: weight must be finite to be rounded, got infinity or NaN; keep its floats")
    scales = largest / LARGEST
    # A row so small that its scale is 0 is rounded to 0.
    steps = torch.where(scales == 0, torch.inf, scales)
    return (values / steps[rows]).round().clamp(-LARGEST, LARGEST).to(torch.int8), scales
