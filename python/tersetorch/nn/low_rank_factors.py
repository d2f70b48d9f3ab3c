"""A weight as a matrix, and its nearest product of two thin ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Form = Literal["filters", "separable"]


def unfold(weight: Tensor, form: Form) -> Tensor:
    """The matrix that a weight is factored as: [out, rest], or of [F, C, kh, kw] the separable [F * kw, C * kh]."""
    if form == "separable":
        return weight.permute(0, 3, 1, 2).reshape(unfolded_shape(weight.shape, form))
    return weight.flatten(1)


def unfolded_shape(shape: Sequence[int], form: Form) -> tuple[int, int]:
    """Rows and columns of unfold's matrix."""
    if form == "separable":
        filters, channels, kh, kw = shape
        return filters * kw, channels * kh
    return shape[0], math.prod(shape[1:])


def singular(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U [rows, n], s [n] falling, V^T [n, columns] of matrix = U diag(s) V^T, n = min(rows, columns), in float64.

    Computed on the CPU. A column of U and its row of V^T are defined up to their sign: the entry of U that is the
    largest in size, the first of several, is positive, so that one matrix has one decomposition.
    """
    left, values, right = torch.linalg.svd(matrix.detach().to("cpu", torch.float64), full_matrices=False)
    largest = left.gather(0, left.abs().argmax(0, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0).to(left.dtype)
    return left * signs, values, right * signs.T


def split(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Left [rows, rank] and right [rank, columns] whose product is nearest to matrix; each has the roots of s.

    Of matrix's dtype and device.

    Raises:
        ValueError: matrix holds NaN or infinity.
    """
    if not bool(matrix.isfinite().all()):
        raise ValueError("low rank: weight must be finite, got NaN or infinity; repair the training")
    left, values, right = singular(matrix)
    half = values[:rank].sqrt()
    return (left[:, :rank] * half).to(matrix), (half[:, None] * right[:rank]).to(matrix)
