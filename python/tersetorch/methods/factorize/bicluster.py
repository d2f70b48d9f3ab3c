"""Convolutions cut into blocks of similar channels and similar filters, each block of low rank."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from tersetorch.methods.arguments import check_choice, check_int
from tersetorch.methods.factorize.balanced import balanced_kmeans
from tersetorch.methods.factorize.banks import (
    Data,
    Importance,
    blocks,
    choose_convolutions,
    metric_of_blocks,
    replace_convolutions,
)
from tersetorch.methods.factorize.metrics import Metric, Outputs
from tersetorch.methods.factorize.outer_product import ITERATIONS, layer_of_terms
from tersetorch.methods.factorize.rank_one import terms
from tersetorch.methods.factorize.sites import module_of
from tersetorch.methods.selection import Patterns, Target
from tersetorch.nn import ClusteredConv2d
from tersetorch.nn.low_rank_factors import singular

Method = Literal["outer_product", "svd"]
RESTARTS = 100
ROUNDS = 1000
# Rounds after the two decompositions of a block, in which each side is chosen anew for the other.
REFINED = 10


def bicluster(
    model: nn.Module,
    rank: int | tuple[int, int],
    in_clusters: int,
    out_clusters: int,
    *,
    method: Method = "outer_product",
    iterations: int = ITERATIONS,
    restarts: int = RESTARTS,
    seed: int = 0,
    data: Data = None,
    importance: Importance = None,
    targets: Patterns | None = None,
    ignore: Patterns | None = None,
) -> nn.Module:
    """Replaces convolutions by blocks of few products, in place, and returns model.

    The C input channels, as vectors of F kh kw weights, are put into G clusters of C / G by balanced k-means, and apart
    from that the F filters, as vectors of C kh kw, into H clusters of F / H. Each of the G H blocks of the weight,
    [F / H, C / G, kh, kw], is then approximated alone, and the layer becomes an nn.ClusteredConv2d:

        "outer_product"  K outer products, as factorize.outer_product finds them; G H K (C / G + kh kw + F / H) weights
        "svd"            the block as [C / G, rest], its J greatest singular values kept; what that leaves as
                         [J kh kw, F / H], its K greatest; G H (J C / G + J K kh kw + K F / H) weights. Afterwards each
                         side is chosen anew for the other, which lowers the error further.

    Args:
        model: any nn.Module; build the optimizer afterwards.
        rank: K, or (J, K) for "svd". K is at most the product of the two least of C / G, kh kw and F / H; J at most
            C / G and K kh kw, and K at most F / H and J kh kw.
        in_clusters: G, a divisor of each layer's channels.
        out_clusters: H, a divisor of each layer's filters.
        method: "outer_product" or "svd".
        iterations: as in factorize.outer_product.
        restarts: of the k-means, at least 1; the best is kept.
        seed: of its starts, at least 0; the same seed gives the same layer.
        data: as in factorize.outer_product; each block is approximated by the moments of its own channels, and in the
            end what a cluster of filters takes from all blocks is chosen by the moments of all. Of "svd" that alone.
        importance: as in factorize.outer_product; of "svd" the last factor alone is chosen by it.
        targets: as in factorize.svd; convolutions only. Left out: every nn.Conv2d without groups.
        ignore: the same, for what to leave out.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a number is outside its range or no divisor, a pattern matches nothing, or factors cannot stand in
            for a layer, as in factorize.svd. The model is as it was.

    Source:
        Denton, Zaremba, Bruna, LeCun, Fergus, Exploiting linear structure within convolutional networks for efficient
        evaluation (2014), section 3.3; clusters of equal size as in the authors' code. Where we differ: see
        factorize.outer_product and balanced_kmeans; the last factor of a block is chosen anew, jointly.
    """
    where = "factorize.bicluster"
    check_choice(where, "method", method, get_args(Method))
    check_int(where, "iterations", iterations, 1)
    check_int(where, "restarts", restarts, 1)
    check_int(where, "seed", seed, 0)
    chosen = choose_convolutions(where, model, targets, ignore)
    for target in chosen:
        _check_sizes(where, target, rank, in_clusters, out_clusters, method)

    def approximate(index: int, target: Target, bank: Tensor, metric: Metric) -> nn.Module:
        module = module_of(target)
        assert isinstance(module, nn.Conv2d)
        options = {"restarts": restarts, "iterations": ROUNDS, "seed": seed + index}
        in_labels = torch.from_numpy(
            balanced_kmeans(bank[0].transpose(0, 1).flatten(1).numpy(), in_clusters, **options)
        )
        out_labels = torch.from_numpy(balanced_kmeans(bank[0].flatten(1).numpy(), out_clusters, **options))
        inputs, outputs = in_labels.argsort(stable=True), out_labels.argsort(stable=True)
        own = metric_of_blocks(metric, inputs, outputs, in_clusters, out_clusters)
        cut = blocks(bank, inputs, outputs, in_clusters, out_clusters)
        grid = in_clusters, out_clusters
        in_order = in_labels if in_clusters > 1 else None
        out_order = out_labels if out_clusters > 1 else None
        if isinstance(rank, int):
            f, c, s = terms(cut, rank, own, iterations)
            basis = c.mT[..., None] * s.mT[:, :, None]
            f = _jointly(metric, bank, basis, f, inputs, outputs, grid)
            f, c, s = (each.unflatten(0, grid) for each in (f, c, s))
            return layer_of_terms(target, f, c, s, in_order, out_order)
        first, middle = _two_sided(cut, rank)
        basis = torch.einsum("bjc,bkjs->bkcs", first, middle)
        last = _jointly(metric, bank, basis, own.mix(cut, basis), inputs, outputs, grid)
        shaped = middle.unflatten(-1, module.kernel_size)
        factors = [each.unflatten(0, grid) for each in (first, shaped, last)]
        return ClusteredConv2d.from_factors(module, *factors, form="svd", in_labels=in_order, out_labels=out_order)

    return replace_convolutions(where, model, chosen, approximate, data, importance)


def _check_sizes(
    where: str, target: Target, rank: int | tuple[int, int], in_clusters: int, out_clusters: int, method: Method
) -> None:
    filters, channels = target.weight.shape[:2]
    taps = target.weight.shape[2:].numel()
    for name, clusters, side, count in (
        ("in_clusters", in_clusters, "channels", channels),
        ("out_clusters", out_clusters, "filters", filters),
    ):
        check_int(where, name, clusters, 1)
        if count % clusters:
            raise ValueError(
                f"{where}: {name} must divide the {count} {side} of {target.name!r}, got {clusters}; pass a divisor, "
                f"or ignore=[{target.name!r}]"
            )
    per_in, per_out = channels // in_clusters, filters // out_clusters
    if method == "outer_product":
        sizes = sorted((per_in, per_out, taps))
        check_int(where, f"rank of {target.name!r}", rank, 1, sizes[0] * sizes[1])
        return
    if not isinstance(rank, tuple | list) or len(rank) != 2:
        raise TypeError(f"{where}: rank must be two ints for svd, got {rank!r}; pass (of channels, of filters)")
    check_int(where, f"rank[1] of {target.name!r}", rank[1], 1, per_out)
    check_int(where, f"rank[0] of {target.name!r}", rank[0], 1, min(per_in, taps * rank[1]))
    check_int(where, f"rank[1] of {target.name!r}", rank[1], 1, min(per_out, taps * rank[0]))


def _two_sided(cut: Tensor, rank: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """First [B, J, C] and middle [B, K, J, S] of blocks [B, F, C, S], for which the best last is a plain projection."""
    first, middle = [], []
    for block in cut:
        channels = block.transpose(0, 1)  # [C, F, S]
        left = singular(channels.flatten(1))[0][:, : rank[0]]
        for _ in range(REFINED):
            seen = torch.einsum("fcs,cj->fjs", block, left)
            right = singular(seen.flatten(1))[0][:, : rank[1]]
            left = singular(torch.einsum("fcs,fk->cks", block, right).flatten(1))[0][:, : rank[0]]
        seen = torch.einsum("fcs,cj->fjs", block, left)
        _, values, right = singular(seen.flatten(1))
        # Half of each length in the middle, half in what mix finds for the filters.
        scaled = values[: rank[1], None].clamp(min=1e-30).sqrt() * right[: rank[1]]
        first.append(left.T)
        middle.append(scaled.view(rank[1], rank[0], -1))
    return torch.stack(first), torch.stack(middle)


def _jointly(
    metric: Metric,
    bank: Tensor,
    basis: Tensor,
    last: Tensor,
    inputs: Tensor,
    outputs: Tensor,
    grid: tuple[int, int],
) -> Tensor:
    """The last factors [G * H, F / H, K] chosen anew by the outputs of all clusters of channels at once.

    In any other metric blocks have nothing in common, and last is that already.
    """
    if not isinstance(metric, Outputs) or grid[0] == 1:
        return last
    g, h = grid
    count, width = basis.shape[1:3]
    of_all = basis.new_zeros(h, g, count, g, width, basis.shape[3])
    for cluster, own in enumerate(basis.unflatten(0, grid)):
        of_all[:, cluster, :, cluster] = own
    ordered = bank[0][outputs][:, inputs].unflatten(0, (h, -1))
    whole = Outputs(metric.moments[:, inputs][:, :, :, inputs])
    found: Tensor = whole.mix(ordered, of_all.flatten(3, 4).flatten(1, 2))  # [H, F / H, G K]
    return found.view(h, -1, g, count).permute(2, 0, 1, 3).flatten(0, 1)
