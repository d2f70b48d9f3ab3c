"""A weight as a product of two thin matrices, by its greatest singular values."""

from __future__ import annotations

import torch
from torch import Tensor

from tersetorch.methods.arguments import check_int
from tersetorch.methods.quantize.binary import check_matrix


@torch.no_grad()
def truncated(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors left [rows, rank] and right [rank, columns] whose product is the nearest to weight of that rank.

    With weight = U S V^T as a matrix [rows, rest], left = U_k S_k^(1/2) and right = S_k^(1/2) V_k^T. No product of that
    rank has a smaller squared error, which is the sum of the other s^2.

    Args:
        weight: finite, floating-point, of two or more dimensions; factors have its dtype, computed in float64.
        rank: 1 to min(rows, columns).

    Raises:
        TypeError: weight is no floating-point tensor, or rank no int.
        ValueError: rank is outside its range, or weight has another number of dimensions or is not finite.

    Source:
        Eckart and Young (1936). Gong et al., Compressing deep convolutional networks using vector quantization (2014),
        section 3.1, and Denil et al., Predicting parameters in deep learning (2013), for layers.
    """
    where = "factorize.truncated"
    check_matrix(where, weight)
    matrix = weight.double().flatten(1)
    check_int(where, "rank", rank, 1, max(1, min(matrix.shape)))
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    half = values[:rank].sqrt()
    return (left[:, :rank] * half).to(weight.dtype), (half[:, None] * right[:rank]).to(weight.dtype)


def rank_within(rows: int, columns: int, numbers: int) -> int:
    """The greatest rank whose factors hold at most so many numbers, rank * (rows + columns); 0 where none does."""
    where = "factorize.rank_within"
    for name, value in (("rows", rows), ("columns", columns)):
        check_int(where, name, value, 1)
    check_int(where, "numbers", numbers, 0)
    return min(numbers // (rows + columns), rows, columns)
