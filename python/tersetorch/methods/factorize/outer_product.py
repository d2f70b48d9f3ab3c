"""Convolutions as sums of few filters over mixtures of channels: canonical polyadic decomposition."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from tersetorch.methods.arguments import check_int
from tersetorch.methods.factorize.banks import Data, Importance, choose_convolutions, replace_convolutions
from tersetorch.methods.factorize.metrics import Metric
from tersetorch.methods.factorize.rank_one import terms
from tersetorch.methods.factorize.ranks import Energy, Rank, check_energy
from tersetorch.methods.factorize.sites import check, module_of
from tersetorch.methods.selection import Patterns, Target, assign
from tersetorch.nn import ClusteredConv2d

ITERATIONS = 64


def outer_product(
    model: nn.Module,
    rank: Rank | None = None,
    *,
    energy: Energy | None = None,
    iterations: int = ITERATIONS,
    data: Data = None,
    importance: Importance = None,
    targets: Patterns | None = None,
    ignore: Patterns | None = None,
) -> nn.Module:
    """Replaces convolutions by sums of outer products, in place, and returns model.

        W[f, c, y, x] ~= sum_k c_k[f] a_k[c] b_k[y, x],    k = 1 to K

    so that a Conv2d becomes an nn.ClusteredConv2d of one cluster: a 1x1 convolution to K mixtures of the channels, one
    kh x kw filter for each, and a 1x1 convolution to the F filters; K (C + kh kw + F) weights. The terms are found one
    after another, each by alternating least squares on what the others leave; after each, all c are chosen anew.

    Args:
        model: any nn.Module; build the optimizer afterwards.
        rank: K, 1 to the product of the two least of C, kh kw and F; or one for each pattern, which then stands for
            targets too; or
        energy: share of the weight's squared length to keep, in (0, 1], for which the terms are as many as it takes;
            also one for each pattern. Exactly one of the two is given.
        iterations: rounds of alternation for each term, at least 1; fewer where the error no longer falls.
        data: inputs, as prune.obs takes them: the error that is lowered is then that of the layers' outputs, by the
            second moments of their patches; a pass over data for each layer.
        importance: for each layer's name how much each weight's error counts, of the weight's shape, as
            factorize.gradient_sizes returns: sum (importance (W - W'))^2 is lowered.
        targets: as in factorize.svd; convolutions only. Left out: every nn.Conv2d without groups.
        ignore: the same, for what to leave out.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a number is outside its range, a pattern matches nothing, or factors cannot stand in for a layer, as
            in factorize.svd. The model is as it was.

    Source:
        Denton, Zaremba, Bruna, LeCun, Fergus, Exploiting linear structure within convolutional networks for efficient
        evaluation (2014), section 3.2 and equation 5, for data and importance section 3.1. Where we differ: c are
        chosen anew, and terms are sought from two starts.
    """
    where = "factorize.outer_product"
    check_int(where, "iterations", iterations, 1)
    if (rank is None) == (energy is None):
        came = "none" if rank is None else "both"
        raise ValueError(f"{where}: exactly one of rank and energy must be given, got {came}; pass one")
    argument, told = ("energy", energy) if rank is None else ("rank", rank)
    values: list[float]
    if isinstance(told, Mapping):
        if targets is not None:
            raise ValueError(
                f"{where}: {argument} must be one number where targets is given, got a mapping; leave one of them out"
            )
        pairs = assign(where, argument, model, told, ignore, frozen=True)
        chosen, values = [target for target, _ in pairs], [each for _, each in pairs]
        check(where, model, chosen, (nn.Conv2d,))
    else:
        chosen = choose_convolutions(where, model, targets, ignore)
        values = [told] * len(chosen)  # type: ignore[list-item]
    for target, each in zip(chosen, values, strict=True):
        if rank is None:
            check_energy(where, f"energy of {target.name!r}", each)
        else:
            check_int(where, f"rank of {target.name!r}", each, 1, most_terms(target.weight))

    def approximate(index: int, target: Target, bank: Tensor, metric: Metric) -> nn.Module:
        count, enough = int(values[index]), None
        if rank is None:
            count, enough = most_terms(target.weight), (1 - values[index]) * metric.squared(bank)
        f, c, s = terms(bank, count, metric, iterations, enough)
        return layer_of_terms(target, f[:, None], c[:, None], s[:, None])

    return replace_convolutions(where, model, chosen, approximate, data, importance)


def most_terms(weight: Tensor) -> int:
    """Terms with which any bank of that shape can be written."""
    sizes = sorted((weight.shape[0], weight.shape[1], weight.shape[2:].numel()))
    return sizes[0] * sizes[1]


def layer_of_terms(
    target: Target,
    f: Tensor,
    c: Tensor,
    s: Tensor,
    in_labels: Tensor | None = None,
    out_labels: Tensor | None = None,
) -> ClusteredConv2d:
    """The layer of f [G, H, F / H, K], c [G, H, C / G, K] and s [G, H, S, K].

    Each term's three vectors get one length, so that they train alike.
    """
    module = module_of(target)
    assert isinstance(module, nn.Conv2d)
    sizes = [each.norm(dim=2, keepdim=True).clamp(min=1e-30) for each in (f, c, s)]
    length = (sizes[0] * sizes[1] * sizes[2]) ** (1 / 3)
    f, c, s = (each / size * length for each, size in zip((f, c, s), sizes, strict=True))
    middle = s.mT.unflatten(-1, module.kernel_size)[:, :, :, None]
    return ClusteredConv2d.from_factors(module, c.mT, middle, f, in_labels=in_labels, out_labels=out_labels)
