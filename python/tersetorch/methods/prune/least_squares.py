"""The quadratic that layer-wise second-order methods minimise: tr((W' - W) H (W' - W)^T) over rows of weights."""

from __future__ import annotations

import torch
from torch import Tensor

from tersetorch.methods.prune.obs_ranks import ALONE, Ranks

# What a dead input has on the diagonal, relative: deleting its weights costs as good as nothing.
DEAD = 1e-12


def damped(hessian: Tensor, damping: float) -> Tensor:
    """H with damping * mean(diagonal) on its diagonal.

    An input that was always zero has no second moment and nothing to say about its weights: its diagonal entry becomes
    a speck, so that they go first, change no others, and stay as they are where they stay.

    Args:
        hessian: [groups, n, n].
        damping: at least 0, relative to the mean over the inputs that are not dead.
    """
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    dead = diagonal == 0
    mean = diagonal.sum(1, keepdim=True) / (~dead).sum(1, keepdim=True).clamp(min=1)
    mean = torch.where(mean > 0, mean, 1)
    return hessian + torch.diag_embed(mean * torch.where(dead, DEAD, damping))


def inverse(where: str, name: str, hessian: Tensor) -> Tensor:
    """H^-1 of a damped H, by Cholesky's factorisation.

    Raises:
        ValueError: H is not positive definite.
    """
    factor, failed = torch.linalg.cholesky_ex(hessian)
    # A pivot that is nothing but rounding would pass too.
    least = hessian.diagonal(dim1=1, dim2=2) * (hessian.shape[1] * torch.finfo(hessian.dtype).eps)
    if bool(failed.any()) or bool((factor.diagonal(dim1=1, dim2=2).square() <= least).any()):
        raise ValueError(
            f"{where}: the input moments of {name!r} must be positive definite, got a singular matrix; raise damping, "
            "or pass more data"
        )
    return torch.cholesky_inverse(factor)


def restricted(weights: Tensor, keep: Tensor, hessian: Tensor, ranks: Ranks = ALONE) -> Tensor:
    """The W' nearest to W in the quadratic of which only what keep says is not zero.

    With A the kept and P the other weights of a row w: w'_A = w_A + (H_AA)^-1 H_AP w_P. It is what the optimal updates
    of Optimal Brain Surgeon add up to, in any order of the deletions.

    Args:
        weights: [groups, rows, n].
        keep: bool, of that shape.
        hessian: [groups, n, n], positive definite.
        ranks: share out the rows; all have the same arguments, and get the same bits as one would.
    """
    found = torch.zeros_like(weights)
    for place, (group, row) in enumerate(torch.ones_like(weights[..., 0], dtype=torch.bool).nonzero().tolist()):
        if not ranks.own(place):
            continue
        kept = keep[group, row]
        h, w = hessian[group][kept], weights[group, row]
        lost = h[:, ~kept] @ w[~kept]
        found[group, row, kept] = w[kept] + torch.cholesky_solve(
            lost[:, None], torch.linalg.cholesky(h[:, kept])
        ).squeeze(1)
    ranks.merge(found)
    return found


def relative_error(change: Tensor, weights: Tensor, hessian: Tensor) -> float:
    """||dW X||^2 / ||W X||^2 from H, which is X X^T but for a factor; 0 where W X is 0.

    Args:
        change: dW [groups, rows, n], or n + 1 where H has a place for the bias.
        weights: W [groups, rows, n].
        hessian: [groups, n, n] or [groups, n + 1, n + 1].
    """
    n = weights.shape[-1]
    error = ((change @ hessian) * change).sum()
    whole = ((weights @ hessian[:, :n, :n]) * weights).sum()
    return float(error / whole) if float(whole) > 0 else 0.0
