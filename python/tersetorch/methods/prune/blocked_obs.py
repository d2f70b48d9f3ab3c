"""Blocked Optimal Brain Surgeon (SparseGPT): one sweep over a layer's columns, all rows at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tersetorch.methods.prune.patterns import BlockPattern, GroupPattern, Pattern, keep


def blocked_obs(
    weights: Tensor,
    inverse: Tensor,
    sparsity: float,
    pattern: Pattern,
    block_size: int,
    tick: Callable[[float], None],
    kept: Tensor | None = None,
    rounding: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Goes through the columns from left to right; what a deletion loses is made up for by the columns on its right.

    With U the upper Cholesky factor of H^-1 = U^T U, column j becomes q_j, zero where it is deleted (and rounded
    elsewhere), and the columns k > j change by

        W[:, k] -= (w_j - q_j) / U_jj U_jk,

    those of the same block at once, the others after the block. What to delete is chosen for a block of columns when
    its turn comes, by the least w^2 / U_jj^2 of all its rows, in each block the same part of what is not zero yet;
    with N:M, for each group of M columns when its turn comes. Weights that are zero stay zero.

    Args:
        weights: [groups, rows, n].
        inverse: [groups, n, n], H^-1.
        sparsity: part of all weights; not looked at with N:M.
        pattern: what parse gave; groups of M are consecutive columns; R divides the rows where there are more groups.
        block_size: columns of a block, raised to a multiple of the pattern's.
        tick: is told the part that is done.
        kept: bool [groups, rows, n], where the choice is made already.
        rounding: gives the values that kept weights become.

    Returns:
        The new weights and bool what is kept, both [groups, rows, n].

    Source:
        Frantar and Alistarh, SparseGPT (2023), algorithm 1; Frantar et al., Optimal Brain Compression (2022), section
        4, for rounding in the same sweep. Where we differ: the parts of the blocks add up to the sparsity exactly, and
        weights that are zero already count.
    """
    groups, rows, n = weights.shape
    upper = torch.linalg.cholesky(inverse, upper=True)
    diagonal = upper.diagonal(dim1=1, dim2=2)[:, None]
    alive = weights != 0
    keep_all = torch.ones_like(alive) if kept is None else kept.clone()
    columns = pattern.group if isinstance(pattern, GroupPattern) else getattr(pattern, "columns", 1)
    size = block_size + -block_size % columns
    w = weights.clone()
    living = alive.sum((0, 1)).cumsum(0).tolist()  # in columns 0 to j
    extra = max(0, round(sparsity * alive.numel()) - (alive.numel() - living[-1]))
    done = 0
    for start in range(0, n, size):
        stop = min(n, start + size)
        block, chosen = w[..., start:stop], keep_all[..., start:stop]
        if kept is None and not isinstance(pattern, GroupPattern):
            score = (block / diagonal[..., start:stop]).square().flatten(0, 1)
            cells, before = groups * rows * stop, living[stop - 1]
            if isinstance(pattern, BlockPattern):
                due = round(sparsity * cells)
            else:
                due = cells - before + round(extra * before / max(1, living[-1]))
            part = (due - done) / score.numel()
            chosen &= keep(score, alive[..., start:stop].flatten(0, 1), part, pattern).view_as(chosen)
            done += int((~chosen).sum())
        errors = torch.zeros_like(block)
        for j in range(stop - start):
            if kept is None and isinstance(pattern, GroupPattern) and j % columns == 0:
                score = (block[..., j : j + columns] / diagonal[..., start + j : start + j + columns]).square()
                present = alive[..., start + j : start + j + columns].flatten(0, 1)
                picked = keep(score.flatten(0, 1), present, 0.0, pattern)
                chosen[..., j : j + columns] &= picked.view_as(score)
            line = upper[:, start + j, start + j : stop]  # [groups, columns left in the block]
            column = block[..., j]
            rounded = column if rounding is None else rounding(column)
            wanted = torch.where(chosen[..., j] & alive[..., start + j], rounded, 0)
            errors[..., j] = (column - wanted) / line[:, :1]
            block[..., j + 1 :] -= errors[..., j : j + 1] * line[:, None, 1:]
            block[..., j] = wanted
        w[..., stop:].baddbmm_(errors, upper[:, start:stop, stop:], alpha=-1)
        tick(stop / n)
    return w, keep_all & alive
