"""Filter banks as sums of products of three vectors, found one after another."""

from __future__ import annotations

import torch
from torch import Tensor

from tersetorch.methods.factorize.metrics import Metric

# A vector of length 1 that moves by less no longer does.
ENOUGH = 1e-6


def terms(
    bank: Tensor, count: int, metric: Metric, iterations: int, enough: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Vectors f [B, F, K], c [B, C, K] and s [B, S, K] with sum_k f_k c_k s_k near bank [B, F, C, S].

    Greedy: each term is the nearest found to what the others leave, by alternating over its vectors, each of which has
    a closed form given the other two: from the means along each mode, and from the leading singular vectors, of which
    the better is kept. Then all f are chosen anew, jointly. c and s have length 1, and their entry that is largest in
    size is positive.

    Args:
        bank: B blocks, float64.
        count: K; fewer where `enough` is reached before.
        metric: what near is.
        iterations: rounds over the vectors of a term, at least 1.
        enough: squared error, [B], at which no further term is sought; None for no such thing.

    Source:
        Denton et al., Exploiting linear structure within convolutional networks (2014), section 3.2 and the authors'
        code; where we differ: the second start, and the last step.
    """
    rest = bank
    channels: list[Tensor] = []
    taps: list[Tensor] = []
    filters = bank.new_zeros(*bank.shape[:2], 0)
    for _ in range(count):
        c, s = _nearest(rest, metric, iterations)
        channels.append(c)
        taps.append(s)
        basis = torch.stack(channels, 1)[..., None] * torch.stack(taps, 1)[:, :, None]
        filters = metric.mix(bank, basis)
        rest = bank - torch.einsum("bfk,bkcs->bfcs", filters, basis)
        if enough is not None and bool((metric.squared(rest) <= enough).all()):
            break
    return filters, torch.stack(channels, 2), torch.stack(taps, 2)


def _nearest(bank: Tensor, metric: Metric, iterations: int) -> tuple[Tensor, Tensor]:
    """The c and s of the rank-one bank nearest to bank that is found."""
    best: tuple[Tensor, Tensor] | None = None
    least = bank.new_zeros(0)
    for c, s in (_means(bank), _leading(bank)):
        for _ in range(iterations):
            f = metric.best_filters(bank, c, s)
            before = c, s
            c = _unit(metric.best_channels(bank, f, s))
            s = _unit(metric.best_taps(bank, f, c))
            if max(float((new - old).abs().max()) for new, old in zip((c, s), before, strict=True)) < ENOUGH:
                break
        error = metric.squared(bank - _product(metric.best_filters(bank, c, s), c, s))
        if best is None:
            best, least = (c, s), error
        else:
            better = (error < least)[:, None]
            best = torch.where(better, c, best[0]), torch.where(better, s, best[1])
    assert best is not None
    return best


def _means(bank: Tensor) -> tuple[Tensor, Tensor]:
    return _unit(bank.mean((1, 3))), _unit(bank.mean((1, 2)))


def _leading(bank: Tensor) -> tuple[Tensor, Tensor]:
    """The leading left singular vectors of the unfoldings by channels and by taps."""
    found = []
    for mode in (2, 3):
        unfolded = bank.movedim(mode, 1).flatten(2)
        found.append(_unit(torch.linalg.eigh(unfolded @ unfolded.mT).eigenvectors[..., -1]))
    return found[0], found[1]


def _product(f: Tensor, c: Tensor, s: Tensor) -> Tensor:
    return f[:, :, None, None] * c[:, None, :, None] * s[:, None, None]


def _unit(vectors: Tensor) -> Tensor:
    """Of length 1, the entry that is largest in size positive; all entries equal where a vector is 0."""
    largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    vectors = torch.where(largest == 0, 1.0, vectors) * torch.where(largest < 0, -1.0, 1.0)
    unit: Tensor = vectors / vectors.norm(dim=1, keepdim=True)
    return unit
