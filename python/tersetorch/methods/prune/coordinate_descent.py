"""Weights that stay, one column after the other, at the values that are best given all others."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

BLOCK = 64


def descend(
    found: Tensor,
    keep: Tensor,
    weights: Tensor,
    hessian: Tensor,
    rounds: int,
    rounding: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The least of (w' - w)^T H (w' - w) along one weight at a time, for rounds from the first column to the last.

    With r = H (w' - w), w'_j becomes w'_j - r_j / H_jj, or the shared value nearest to that: exact, since along one
    weight the error is a parabola. No step raises the error. A sweep that goes once from left to right cannot change a
    column again when those on its right are known; this does. Columns of a block see each other's changes at once,
    other blocks once the block is done, so that most of the work is products of matrices: rows n^2 operations a round.

    Args:
        found: w' [groups, rows, n] to start from.
        keep: bool of its shape; what is False is 0 and stays so.
        weights: w of its shape.
        hessian: [groups, n, n], H, with a positive diagonal.
        rounds: how often to go through the columns; 0 gives found.
        rounding: gives the values that kept weights [groups, rows] become; None where any will do.

    Source:
        Behdin et al., QuantEase (2023), section 3, for rounded weights; here with the zeros of pruning and any values.
    """
    w = found.clone()
    slope = (w - weights) @ hessian
    diagonal = hessian.diagonal(dim1=1, dim2=2)[:, None]
    n = w.shape[-1]
    for _ in range(rounds):
        for start in range(0, n, BLOCK):
            stop = min(n, start + BLOCK)
            before, local = w[..., start:stop].clone(), slope[..., start:stop].clone()
            for j in range(start, stop):
                best = w[..., j] - local[..., j - start] / diagonal[..., j]
                new = torch.where(keep[..., j], best if rounding is None else rounding(best), 0)
                local += (new - w[..., j])[..., None] * hessian[:, j, None, start:stop]
                w[..., j] = new
            slope += (w[..., start:stop] - before) @ hessian[:, start:stop]
    return w
