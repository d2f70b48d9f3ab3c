"""A weight of signs, one bit each, with or without a scale for each row."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tersetorch import ops
from tersetorch.formats.csr_pattern import check_dense, check_tensor

WORD_BITS = 64


@dataclass(frozen=True)
class SignWeight:
    """W[r, c * taps + t] = scale[r] * sign of row r, tap t, channel c.

    A convolution's filter has as many taps as its kernel has positions, the weight behind a flattened image as many as
    the image has; a plain matrix has one. Of each tap the channels lie together, as those of a packed image do.

    Attributes:
        bits: int64 [rows, taps, ceil(channels / 64)], the signs as ops.sign_pack has them, unused bits 0.
        channels: signs of a tap.
        scale: float32 [rows], or None for 1.

    Source:
        Rastegari et al., XNOR-Net (2016), section 3.1.
    """

    bits: Tensor
    channels: int
    scale: Tensor | None = None

    @classmethod
    def from_dense(cls, weight: Tensor, taps: int = 1) -> SignWeight:
        """Packs weight, float32 or bfloat16 [rows, channels * taps], exactly; a zero counts as +0.

        Raises:
            TypeError: weight is not a float32 or bfloat16 tensor.
            ValueError: weight is not 2-D, its columns are no multiple of taps, or a row has other values than +a and -a
                for one finite a.
        """
        check_dense("SignWeight", weight)
        reason = cls.why_not(weight)
        if reason is not None:
            raise ValueError(
                f"SignWeight: weight must have the values +a and -a in each row, got {reason}; binarize it first, for "
                "example with tt.binarize.binary_connect(model)"
            )
        rows, columns = weight.shape
        _check_taps(taps, columns)
        dense = weight.detach()
        sizes = dense[:, 0].abs().float() if columns else dense.new_ones(rows, dtype=torch.float32)
        scale = None if bool((sizes == 1).all()) else sizes.contiguous()
        by_tap = dense.reshape(rows, columns // taps, taps).transpose(1, 2)
        return cls(ops.sign_pack(by_tap.contiguous()), columns // taps, scale)

    @staticmethod
    def why_not(weight: Tensor) -> str | None:
        """Why from_dense refuses the values of a weight [rows, ...], or None."""
        rows = weight.detach().flatten(1)
        if not rows.numel():
            return None
        # One row tells most other weights without looking at all of them.
        first = rows[0].abs()
        if bool((first != first[0]).any()):
            return "more than that in row 0"
        sizes = rows.abs()
        if not bool(sizes[:, 0].isfinite().all()):
            return "NaN or infinity"
        least, largest = sizes.aminmax(dim=1)
        other = least != largest
        return f"more than that in row {int(other.int().argmax())}" if bool(other.any()) else None

    @classmethod
    def from_signs(cls, negative: Tensor, taps: int = 1, scale: Tensor | None = None) -> SignWeight:
        """Packs signs, bool [rows, channels * taps], True for -1, beside a scale, which is used, not copied.

        Raises:
            TypeError, ValueError: an argument has another dtype or does not fit the others.
        """
        check_tensor("SignWeight", "negative", negative)
        if negative.dtype != torch.bool or negative.dim() != 2:
            raise TypeError(
                f"SignWeight: negative must be bool [rows, columns], got {negative.dtype} {list(negative.shape)}; "
                "compare the weight with 0"
            )
        rows, columns = negative.shape
        _check_taps(taps, columns)
        by_tap = negative.view(rows, columns // taps, taps).transpose(1, 2)
        weight = cls(ops.sign_pack(0.5 - by_tap.float()), columns // taps, scale)
        weight.validate()
        return weight

    def turned(self, rows: Tensor) -> SignWeight:
        """The weight with the other signs in some of its rows, bool [rows]."""
        used = torch.full((self.bits.shape[2],), -1, device=self.bits.device)
        if self.channels % WORD_BITS:
            used[-1] = (1 << self.channels % WORD_BITS) - 1
        return replace(self, bits=torch.where(rows[:, None, None], self.bits ^ used, self.bits))

    def to_dense(self) -> Tensor:
        """The exact weight the kernel uses: float32 [rows, channels * taps]."""
        scale = self.bits.new_ones(1, dtype=torch.float32) if self.scale is None else self.scale[:, None]
        return torch.where(self.negative(), -scale, scale)

    def negative(self) -> Tensor:
        """Which weights are -1, bool [rows, channels * taps]."""
        places = 2 ** torch.arange(8, device=self.bits.device, dtype=torch.uint8)
        octets = self.bits.contiguous().view(torch.uint8)
        by_tap = (octets.unsqueeze(-1) & places).ne(0).flatten(-2)[..., : self.channels]
        return by_tap.transpose(1, 2).reshape(self.shape)

    def validate(self) -> None:
        """Checks what the kernels and to_dense rely on.

        Raises:
            TypeError: a tensor has another dtype than the class names, or channels is no int.
            ValueError: sizes do not fit each other, or an unused bit is 1.
        """
        owner = "SignWeight"
        check_tensor(owner, "bits", self.bits)
        if self.bits.dtype != torch.int64:
            raise TypeError(f"{owner}: bits must be int64, got {self.bits.dtype}; build it with from_dense")
        if isinstance(self.channels, bool) or not isinstance(self.channels, int):
            raise TypeError(f"{owner}: channels must be an int, got {self.channels!r}; pass the signs of a tap")
        words = ops.sign_words(max(0, self.channels))
        if self.channels < 0 or self.bits.dim() != 3 or self.bits.shape[2] != words:
            raise ValueError(
                f"{owner}: bits must be [rows, taps, {words}] for {self.channels} channels, got shape "
                f"{tuple(self.bits.shape)}; build it with from_dense"
            )
        used = self.channels % WORD_BITS
        # A mask of the highest bits alone is negative: >> fills up with them.
        if used and self.bits.numel() and bool((self.bits[..., -1] & (-1 << used)).any()):
            raise ValueError(f"{owner}: bits past the last channel must be 0, got others; build it with from_dense")
        if self.scale is not None:
            check_tensor(owner, "scale", self.scale)
            if self.scale.dtype != torch.float32:
                raise TypeError(f"{owner}: scale must be float32, got {self.scale.dtype}; call scale.float()")
            if tuple(self.scale.shape) != (self.bits.shape[0],):
                raise ValueError(
                    f"{owner}: scale must be [{self.bits.shape[0]}], got shape {tuple(self.scale.shape)}; pass one "
                    "number for each row"
                )

    @property
    def taps(self) -> int:
        """Groups of channels in a row."""
        return self.bits.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the dense weight."""
        return self.bits.shape[0], self.taps * self.channels

    @property
    def nnz(self) -> int:
        """Every position is stored."""
        return self.shape[0] * self.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors."""
        return self.bits.nbytes + (0 if self.scale is None else self.scale.nbytes)


def _check_taps(taps: int, columns: int) -> None:
    if taps < 1 or columns % taps:
        raise ValueError(f"SignWeight: taps must divide {columns} columns, got {taps}; pass a kernel's positions")
