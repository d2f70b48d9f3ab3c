"""Layer-wise Optimal Brain Surgeon: all deletions are chosen at once, and each is made up for."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tersetorch.methods.prune.obs_ranks import ALONE, Ranks
from tersetorch.methods.prune.patterns import Pattern, keep


def layerwise_obs(
    weights: Tensor,
    inverse: Tensor,
    bias: Tensor | None,
    sparsity: float,
    pattern: Pattern,
    tick: Callable[[float], None],
    ranks: Ranks = ALONE,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Ranks the weights once by L_q and deletes the least, in that order, each with the update of its row.

        L_q = w_q^2 / (2 [H^-1]_qq),   w -= w_q / [H^-1]_qq H^-1 e_q,

    bias included, after which the row's deleted weights are set to zero again. H^-1 stays as it is. Biases
    are updated and never deleted. Weights that are zero go first and stay zero.

    Args:
        weights: [groups, rows, n].
        inverse: [groups, n, n], or [groups, n + 1, n + 1] with a bias, whose place is the last.
        bias: [groups, rows] or None.
        sparsity: part of all weights; not looked at with N:M.
        pattern: what parse gave; groups of M are consecutive columns.
        tick: is told the part that is done.
        ranks: share out the rows; all have the same arguments, and get the same bits as one would.

    Returns:
        The new weights, bool what is kept, both [groups, rows, n], and the new bias.

    Source:
        Dong, Chen, Pan, Learning to prune deep neural networks via layer-wise Optimal Brain Surgeon (2017).
    """
    groups, rows, n = weights.shape
    diagonal = inverse.diagonal(dim1=1, dim2=2)[:, None, :n]
    score = weights.square() / (2 * diagonal)
    alive = weights != 0
    kept = keep(score.flatten(0, 1), alive.flatten(0, 1), sparsity, pattern).view_as(weights) & alive
    going = alive & ~kept
    order = torch.where(going, score, torch.inf).argsort(dim=-1, stable=True)
    counts = going.sum(-1)
    w = weights if bias is None else torch.cat([weights, bias[..., None]], -1)
    whole, gone = w, ~alive
    own = torch.arange(rows, device=w.device).tensor_split(ranks.count)[ranks.rank]
    w, order, counts, gone = (each[:, own] for each in (w, order, counts, gone))
    steps = int(counts.max()) if len(own) else 0
    for step in range(steps):
        at = order[..., step : step + 1]
        active = (step < counts)[..., None]
        lines = inverse.gather(1, at.expand(groups, len(own), inverse.shape[2]))
        w -= torch.where(active, w.gather(2, at) / lines.gather(2, at), 0) * lines
        gone.scatter_(2, at, gone.gather(2, at) | active)
        w[..., :n].masked_fill_(gone, 0)
        if step % 16 == 0:
            tick((step + 1) / steps)
    w = torch.zeros_like(whole).index_copy_(1, own, w)
    ranks.merge(w)
    return w[..., :n], kept, None if bias is None else w[..., n]
