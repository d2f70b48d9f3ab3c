"""Errors that count more for some weights, or for some directions of a layer's input, than for others."""

from __future__ import annotations

import torch
from torch import Tensor

from tersetorch.nn.low_rank_factors import split

# What counts nothing counts this share of the mean: it still wants a value near its own.
LEAST = 1e-6
ROUNDS = 100
ENOUGH = 1e-7
# Numbers of the normal equations' left sides that are in memory at a time.
CHUNK = 1 << 22
# What is below has squares that float64 cannot hold a hair of.
SMALLEST = 1e-280


def counts(importance: Tensor) -> Tensor:
    """importance^2 in float64 on the CPU, at least LEAST of its mean; ones where all of it is 0."""
    squares = importance.detach().to("cpu", torch.float64).square()
    mean = squares.mean()
    return squares.clamp(min=float(LEAST * mean)) if mean > 0 else torch.ones_like(squares)


def weighted_split(matrix: Tensor, importance: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Left [rows, rank] and right [rank, columns] that lower sum (importance (matrix - left right))^2.

    Alternating least squares from the unweighted factors, each of which has a closed form given the other, so that the
    error never rises. Of matrix's dtype and device.
    """
    wanted = matrix.detach().to("cpu", torch.float64)
    weights = counts(importance)
    left, right = split(wanted, rank)
    before = float("inf")
    for _ in range(ROUNDS):
        left = _solve(wanted, weights, right)
        right = _solve(wanted.T, weights.T, left.T).T
        error = float((weights * (wanted - left @ right).square()).sum())
        if error >= before * (1 - ENOUGH):
            break
        before = error
    left, right = split(left @ right, rank)
    return left.to(matrix), right.to(matrix)


def _solve(wanted: Tensor, weights: Tensor, basis: Tensor) -> Tensor:
    """For each row the coefficients x of least sum weights (wanted - x basis)^2."""
    found = []
    size = max(1, CHUNK // max(1, basis.numel()))
    for rows, counted in zip(wanted.split(size), weights.split(size), strict=True):
        scaled = counted[:, None] * basis
        found.append(solve_symmetric(scaled @ basis.T, scaled @ rows[:, :, None])[..., 0])
    return torch.cat(found)


def solve_symmetric(left: Tensor, right: Tensor) -> Tensor:
    """X of left X = right, left [..., n, n] symmetric and not negative, a hair from singular where it has to be."""
    scale = left.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    scale = torch.where(scale > SMALLEST, scale, 1.0)  # of nothing everything is a solution: 0
    eye = torch.eye(left.shape[-1], dtype=left.dtype)
    found: Tensor = torch.linalg.solve(left + 1e-12 * scale * eye, right)
    return found
