"""Convolutions of few colours: each filter sees one mixture of the channels."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from tersetorch.methods.arguments import check_int
from tersetorch.methods.factorize.balanced import Floats, Labels, best_labels, in_order
from tersetorch.methods.factorize.banks import Data, Importance, choose_convolutions, replace_convolutions
from tersetorch.methods.factorize.bicluster import RESTARTS, ROUNDS
from tersetorch.methods.factorize.metrics import Metric
from tersetorch.methods.factorize.ranks import Rank
from tersetorch.methods.factorize.sites import check, module_of
from tersetorch.methods.selection import Patterns, Target, assign
from tersetorch.nn import ClusteredConv2d

# Rounds in which a cluster's colour and its filters are chosen for each other.
ALTERNATED = 100
ENOUGH = 1e-10


def monochromatic(
    model: nn.Module,
    colours: Rank,
    *,
    restarts: int = RESTARTS,
    seed: int = 0,
    data: Data = None,
    importance: Importance = None,
    targets: Patterns | None = None,
    ignore: Patterns | None = None,
) -> nn.Module:
    """Replaces convolutions by ones in which each filter sees one of few mixtures of the channels, in place.

        W[f, c, y, x] ~= a_{g(f)}[c] b_f[y, x]

    A Conv2d becomes an nn.ClusteredConv2d: a 1x1 convolution to H colours, and a kh x kw convolution in which F / H
    filters see each; H C + F kh kw weights, in place of F C kh kw. It is made for the first layer of a network, whose
    channels are few. The filters are put into H clusters of equal size by Lloyd's rounds over lines: each filter's
    error is |W_f|^2 - |a^T W_f|^2 for a colour a of length 1, and a cluster's colour is the leading singular vector of
    its filters side by side; the best of `restarts` starts, which are the colours of filters drawn at random.

    Args:
        model: any nn.Module; build the optimizer afterwards.
        colours: H, a divisor of the filters; or one for each pattern, which then stands for targets too.
        restarts: at least 1.
        seed: of the starts, at least 0; the same seed gives the same layer.
        data: as in factorize.outer_product; colours and filters are chosen by it, for the clusters found without.
        importance: as in factorize.outer_product; likewise.
        targets: as in factorize.svd; convolutions only. Left out: every nn.Conv2d without groups.
        ignore: the same, for what to leave out.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a number is outside its range or no divisor, a pattern matches nothing, or factors cannot stand in
            for a layer, as in factorize.svd. The model is as it was.

    Source:
        Denton, Zaremba, Bruna, LeCun, Fergus, Exploiting linear structure within convolutional networks for efficient
        evaluation (2014), section 3.3. Where we differ: the paper clusters each filter's own colour vector by k-means,
        whose sign is arbitrary and whose length says nothing of what the filter weighs; here it is the error of the
        weight itself, in which neither shows.
    """
    where = "factorize.monochromatic"
    check_int(where, "restarts", restarts, 1)
    check_int(where, "seed", seed, 0)
    if isinstance(colours, Mapping):
        if targets is not None:
            raise ValueError(
                f"{where}: colours must be one number where targets is given, got a mapping; leave one of them out"
            )
        pairs = assign(where, "colours", model, colours, ignore, frozen=True)
        chosen, counts = [target for target, _ in pairs], [each for _, each in pairs]
        check(where, model, chosen, (nn.Conv2d,))
    else:
        chosen = choose_convolutions(where, model, targets, ignore)
        counts = [colours] * len(chosen)
    for target, count in zip(chosen, counts, strict=True):
        filters = len(target.weight)
        check_int(where, f"colours of {target.name!r}", count, 1, filters)
        if filters % count:
            raise ValueError(
                f"{where}: colours must divide the {filters} filters of {target.name!r}, got {count}; pass a divisor"
            )

    def approximate(index: int, target: Target, bank: Tensor, metric: Metric) -> nn.Module:
        module = module_of(target)
        assert isinstance(module, nn.Conv2d)
        count = counts[index]
        labels = torch.from_numpy(_clusters(bank[0].numpy(), count, restarts, seed + index))
        filters = torch.empty(bank.shape[1], bank.shape[3], dtype=bank.dtype)
        colour = torch.empty(count, bank.shape[2], dtype=bank.dtype)
        for cluster in range(count):
            members = labels == cluster
            colour[cluster], filters[members] = _coloured(bank[:, members], metric.of_filters(members))
        order = labels.argsort(stable=True)
        # [1, H, K, 1, kh, kw] with K = F / H
        middle = filters[order].view(1, count, -1, 1, *module.kernel_size)
        return ClusteredConv2d.from_factors(
            module,
            colour[None, :, None],
            middle,
            form="monochromatic",
            out_labels=labels if count > 1 else None,
        )

    return replace_convolutions(where, model, chosen, approximate, data, importance)


def _clusters(bank: Floats, count: int, restarts: int, seed: int) -> Labels:
    """Clusters of equal size of filters [F, C, S], by the lines that their channels lie near to."""
    filters = len(bank)
    if count in (1, filters):
        return np.arange(filters, dtype=np.int64) * (count > 1)
    squares = np.square(bank).sum((1, 2))
    own = np.linalg.svd(bank, full_matrices=False)[0][:, :, 0]

    def costs(colours: Floats) -> Floats:
        seen: Floats = squares[:, None] - np.square(np.tensordot(bank, colours, (1, 1))).sum(1)
        return seen

    def spread(labels: Labels) -> tuple[float, Floats]:
        # The filters of each cluster side by side, [k, C, F / k * S], and their leading left singular vectors.
        side = bank[labels.argsort(kind="stable")].reshape(count, -1, *bank.shape[1:]).swapaxes(1, 2)
        side = side.reshape(count, bank.shape[1], -1)
        left, lengths, _ = np.linalg.svd(side, full_matrices=False)
        return float(squares.sum() - np.square(lengths[:, 0]).sum()), costs(left[:, :, 0])

    def start(generator: np.random.Generator) -> Floats:
        return costs(own[generator.choice(filters, count, replace=False)])

    return in_order(best_labels(start, spread, restarts=restarts, iterations=ROUNDS, seed=seed))


def _coloured(bank: Tensor, metric: Metric) -> tuple[Tensor, Tensor]:
    """The colour [C], of length 1, and the filters [F, S] nearest to bank [1, F, C, S]."""
    side_by_side = bank[0].transpose(0, 1).flatten(1)
    colour = _line(torch.linalg.svd(side_by_side, full_matrices=False).U[:, 0])
    filters = _filters(bank, colour, metric)
    before = torch.inf
    for _ in range(ALTERNATED):
        error = float(metric.squared(bank - filters[None, :, None] * colour[:, None]))
        if error >= before * (1 - ENOUGH):
            break
        before = error
        colour = _line(metric.best_colour(bank, filters))
        filters = _filters(bank, colour, metric)
    return colour, filters


def _filters(bank: Tensor, colour: Tensor, metric: Metric) -> Tensor:
    """The filters [F, S] nearest to bank for a colour: each alone is a bank of one."""
    one = bank.new_ones(1, 1)
    found = [
        metric.of_filters(torch.tensor([f])).best_taps(bank[:, f : f + 1], one, colour[None])[0]
        for f in range(bank.shape[1])
    ]
    return torch.stack(found)


def _line(vector: Tensor) -> Tensor:
    """Of length 1, the entry that is largest in size positive."""
    largest = vector[vector.abs().argmax()]
    line: Tensor = vector * (-1.0 if largest < 0 else 1.0) / vector.norm().clamp(min=1e-300)
    return line
