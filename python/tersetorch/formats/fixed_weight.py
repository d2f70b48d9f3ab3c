"""A weight in fixed point: whole numbers of steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tersetorch import ops
from tersetorch.formats.csr_pattern import check_dense, check_tensor
from tersetorch.formats.fixed_format import FixedFormat

MAX_BITS = 16
_DTYPES = (torch.int8, torch.int16)


@dataclass(frozen=True)
class FixedWeight:
    """W[r, c] = steps[r, c] * 2^-FL.

    Attributes:
        steps: int8 or int16 [rows, columns], each a number of the format.
        format: <IL,FL> of at most 16 bits.

    Source:
        Gupta et al., Deep Learning with Limited Numerical Precision (2015), section 3.
    """

    steps: Tensor
    format: FixedFormat

    @classmethod
    def from_dense(cls, weight: Tensor, format: FixedFormat, dtype: torch.dtype | None = None) -> FixedWeight:
        """Rounds weight, float32 or bfloat16 [rows, columns], to the nearest of format, saturating; ties up.

        Args:
            weight: finite.
            format: of at most 16 bits.
            dtype: of the steps, int8 or int16; the narrowest that holds them when left out.

        Raises:
            TypeError: weight is not a float32 or bfloat16 tensor, format no FixedFormat or dtype neither.
            ValueError: weight is not 2-D or not finite, or the format has more than 16 bits or than dtype.
        """
        check_dense("FixedWeight", weight)
        _check_format(format)
        if dtype not in (None, *_DTYPES):
            raise TypeError(f"FixedWeight: dtype must be int8 or int16, got {dtype}; leave it out")
        if not bool(weight.isfinite().all()):
            raise ValueError("FixedWeight: weight must be finite, got NaN or infinity; repair the training")
        sizes = format.integer_bits, format.fraction_bits
        return cls(ops.fixed_round_whole(weight.detach(), *sizes, dtype=dtype), format)

    def to_dense(self) -> Tensor:
        """The exact weight the kernel uses: float32 [rows, columns]."""
        return self.steps.float() * self.format.step

    def validate(self) -> None:
        """Checks that the steps are numbers of the format.

        Raises:
            TypeError: steps is no int8 or int16 tensor.
            ValueError: it is not 2-D, or a number lies outside the format.
        """
        owner = "FixedWeight"
        check_tensor(owner, "steps", self.steps)
        _check_format(self.format)
        if self.steps.dtype not in _DTYPES:
            raise TypeError(f"{owner}: steps must be int8 or int16, got {self.steps.dtype}; build it with from_dense")
        if self.steps.dim() != 2:
            raise ValueError(
                f"{owner}: steps must be [rows, columns], got shape {tuple(self.steps.shape)}; build it with from_dense"
            )
        end = 1 << self.format.bits - 1
        if self.steps.numel() and (int(self.steps.min()) < -end or int(self.steps.max()) >= end):
            raise ValueError(
                f"{owner}: steps must lie in [{-end}, {end}) for {self.format}, got others; build it with from_dense"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the dense weight."""
        return self.steps.shape[0], self.steps.shape[1]

    @property
    def nnz(self) -> int:
        """Every position is stored."""
        return self.steps.numel()

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensor."""
        return self.steps.nbytes


def _check_format(format: FixedFormat) -> None:
    if not isinstance(format, FixedFormat):
        raise TypeError(f"FixedWeight: format must be a FixedFormat, got {format!r}; pass such as FixedFormat(2, 14)")
    if format.bits > MAX_BITS:
        raise ValueError(f"FixedWeight: format must have at most {MAX_BITS} bits, got {format}; pass a narrower one")
