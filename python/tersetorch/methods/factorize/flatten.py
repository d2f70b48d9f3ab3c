"""A convolution's filters as sums of products of three 1-D filters: canonical polyadic decomposition."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tersetorch.methods.arguments import check_int
from tersetorch.methods.factorize.ranks import Energy, Rank, check_energy
from tersetorch.methods.factorize.sites import check, choose, module_of, outside_inference, swap
from tersetorch.methods.quantize.binary import check_matrix
from tersetorch.methods.selection import Patterns, Target, assign
from tersetorch.nn import FlattenedConv2d
from tersetorch.ops import FlatFilters

# Sums of products that nearly cancel are kept from growing: of the squared size of a column.
RIDGE = 1e-7
# Sweeps of alternating least squares from each beginning, and from the best of their ends, at most; and the share of a
# filter's squared size that ends them where less is gained.
TRIAL_SWEEPS = 20
SWEEPS = 400
GAIN = 1e-9
# Numbers of a part of the filters that is worked on at once.
PART = 1 << 24
MOST_SEED = 2**63 - 1


class Decomposition(NamedTuple):
    """Filters, and what they leave out.

    Attributes:
        filters: lateral, vertical and horizontal of map r * F + f, of the weight's dtype; no biases.
        errors: float64 [F], ||W[f] - W'[f]|| / ||W[f]||, 0 for a filter of zeros.
    """

    filters: FlatFilters
    errors: Tensor


def flatten(
    model: nn.Module,
    rank: Rank | None = None,
    *,
    energy: Energy | None = None,
    restarts: int = 4,
    seed: int = 0,
    errors: MutableMapping[str, float] | None = None,
    targets: Patterns | None = None,
    ignore: Patterns | None = None,
) -> nn.Module:
    """Replaces convolutions by flattened ones nearest to their filters, in place, and returns model.

    Each filter W[f] [C, kh, kw] becomes a sum of `rank` products lateral x vertical x horizontal, by
    factorize.nearest_filters: C + kh + kw weights each in the place of C * kh * kw. The layers are
    nn.FlattenedConv2d of one stage, whose biases inside begin at 0; training goes on as before, with an optimizer built
    afterwards.

    Ranks are told; or the least of each layer that keeps a share of its squared weights. Under energy a layer that
    would not become smaller stays dense.

    Args:
        model: any nn.Module. Biases, flags, stride and padding carry over.
        rank: filters that add up to one, from 1 to the product of the two smallest of C, kh and kw; or one for each
            pattern, which then stands for targets too.
        energy: share to keep, in (0, 1]; or one for each pattern. Exactly one of rank and energy is given.
        restarts: how often the decomposition begins from random filters besides the two starts that the weight tells.
        seed: of these, 0 to 2^63 - 1; the same seed gives the same filters.
        errors: is given ||W - W'|| / ||W|| of every replaced layer by its name.
        targets: as in prune.magnitude; every weight named must be that of an nn.Conv2d. Left out: every nn.Conv2d that
            a flattened one can stand for and that has a kernel larger than 1x1.
        ignore: the same, for what to leave out.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a number is outside its range, a pattern matches nothing, or no flattened convolution can stand for
            a layer: it has groups, dilation, padding of other numbers or "same" for an even kernel, is tied,
            compressed, hooked or model itself, or its weight is not finite. The model is as it was.

    Source:
        Jin, Dundar, Culurciello, Flattened convolutional neural networks (2014), whose filters are trained from the
        start; Denton et al., Exploiting linear structure within convolutional networks (2014), section 3.2, for sums of
        products of a trained layer's.
    """
    where = "factorize.flatten"
    given = [name for name, value in (("rank", rank), ("energy", energy)) if value is not None]
    if len(given) != 1:
        raise ValueError(
            f"{where}: exactly one of rank and energy must be given, got {' and '.join(given) or 'none'}; pass one"
        )
    check_int(where, "restarts", restarts, 0)
    check_int(where, "seed", seed, 0, MOST_SEED)
    if errors is not None and not isinstance(errors, MutableMapping):
        raise TypeError(f"{where}: errors must be a dict to fill, got {type(errors).__name__}; pass {{}}")
    chosen = _chosen(where, model, given[0], rank if energy is None else energy, targets, ignore)
    for target, value in chosen:
        if energy is None:
            check_int(where, f"rank of {target.name!r}", value, 1, most_rank(target.weight))
        else:
            check_energy(where, f"energy of {target.name!r}", value)
        if not bool(target.weight.isfinite().all()):
            raise ValueError(
                f"{where}: the weight of {target.name!r} must be finite, got NaN or infinity; repair the training"
            )
    layers: dict[nn.Linear | nn.Conv2d, nn.Module] = {}
    found: dict[str, float] = {}
    with outside_inference(), torch.no_grad():
        for target, value in chosen:
            weight = target.weight
            best: Decomposition | None
            if energy is None:
                best = nearest_filters(weight, value, restarts=restarts, seed=seed)
            else:
                best = _keeping(weight, value, restarts, seed)
            if best is None:
                continue
            module = module_of(target)
            assert isinstance(module, nn.Conv2d)
            ranks = best.filters.lateral.shape[0] // weight.shape[0]
            layer = FlattenedConv2d.from_filters(module, best.filters, ranks)
            for name, parameter in layer.named_parameters():
                source = module.bias if name == "bias_0" else module.weight
                parameter.requires_grad_(source is not None and source.requires_grad)
            layers[module] = layer
            found[target.name] = _whole_error(weight, best.errors)
    if errors is not None:
        errors.update(found)
    return swap(model, layers)


@torch.no_grad()
def nearest_filters(weight: Tensor, rank: int, *, restarts: int = 4, seed: int = 0) -> Decomposition:
    """The sum of `rank` products of 1-D filters that is nearest to each filter: W[f] ~ sum_r l_r x v_r x h_r.

    Alternating least squares in float64, of all filters at once and each to its own end: with two of the three kinds of
    filters fixed, the third solves a linear system of rank x rank. It begins from the leading singular vectors of each
    filter's unfoldings; from the nearest single products, one after the other of what those before leave; and from
    random filters; the best end is taken. Channels are first turned into the at most kh * kw directions that a filter
    has, by a QR decomposition, so that a sweep costs kh * kw * kh * kw * rank whatever C is, and nothing larger than
    the weight is formed. A ridge keeps products that cancel each other from growing without bounds, as they do where no
    nearest sum exists. The three filters of a product get the same norm.

    Args:
        weight: finite, floating-point [F, C, kh, kw].
        rank: 1 to the product of the two smallest of C, kh and kw, which is enough for any filter.
        restarts: random beginnings, at least 0.
        seed: of these, 0 to 2^63 - 1.

    Raises:
        TypeError: weight is no floating-point tensor, or a number no int.
        ValueError: a number is outside its range, or weight is not finite or not 4-dimensional.

    Source:
        Carroll and Chang (1970), Harshman (1970); Kolda and Bader, Tensor decompositions and applications (2009),
        section 3.4, and 4.4 for the start from unfoldings.
    """
    where = "factorize.nearest_filters"
    check_matrix(where, weight)
    if weight.dim() != 4 or not weight.numel():
        raise ValueError(
            f"{where}: weight must be [F, C, kh, kw] with numbers, got shape {tuple(weight.shape)}; pass that of an "
            "nn.Conv2d"
        )
    check_int(where, "rank", rank, 1, most_rank(weight))
    check_int(where, "restarts", restarts, 0)
    check_int(where, "seed", seed, 0, MOST_SEED)
    out, channels, kh, kw = weight.shape
    part = max(1, PART // (channels * kh * kw))
    parts = [_decomposed(w.detach().to("cpu", torch.float64), rank, restarts, seed) for w in weight.split(part)]
    lateral, vertical, horizontal, errors = (torch.cat(each) for each in zip(*parts, strict=True))
    maps = [t.permute(2, 0, 1).reshape(rank * out, -1).to(weight) for t in (lateral, vertical, horizontal)]
    return Decomposition(FlatFilters(*maps), errors)


def most_rank(weight: Tensor) -> int:
    """Products that are enough for any filter of this weight."""
    smallest, second, _ = sorted(weight.shape[1:])
    return max(1, smallest * second)


def _decomposed(weight: Tensor, rank: int, restarts: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Lateral [F, C, R], vertical [F, kh, R], horizontal [F, kw, R], the largest products first, and errors [F]."""
    out, _, kh, kw = weight.shape
    directions, core = torch.linalg.qr(weight.flatten(2))
    core = core.unflatten(2, (kh, kw))
    size = core.flatten(1).norm(dim=1)
    core = core / torch.where(size > 0, size, 1.0)[:, None, None, None]
    generator = torch.Generator().manual_seed(seed)
    starts = [_from_unfoldings(core, rank, generator), _one_by_one(core, rank, generator)]
    for _ in range(restarts):
        starts.append([torch.randn(out, n, rank, generator=generator, dtype=torch.float64) for n in core.shape[1:]])
    best: list[Tensor] = []
    least = torch.full((out,), torch.inf, dtype=torch.float64)
    for start in starts:
        factors, loss = _alternate(core, start, TRIAL_SWEEPS)
        better = loss < least
        least = torch.where(better, loss, least)
        old = best or factors
        best = [torch.where(better[:, None, None], new, kept) for new, kept in zip(factors, old, strict=True)]
    best, least = _alternate(core, best, SWEEPS)
    norms = [factor.norm(dim=1, keepdim=True) for factor in best]
    sizes = norms[0] * norms[1] * norms[2]
    order = sizes.argsort(dim=2, descending=True, stable=True)
    common = (sizes * size[:, None, None]).pow(1 / 3)
    lateral, vertical, horizontal = (
        (factor * (common / torch.where(norm > 0, norm, 1.0))).gather(2, order.expand_as(factor))
        for factor, norm in zip(best, norms, strict=True)
    )
    # The largest tap of vertical and horizontal filters is positive, so that one weight has one decomposition.
    signs = [_signs(taps) for taps in (vertical, horizontal)]
    lateral = directions @ lateral * signs[0] * signs[1]
    return lateral, vertical * signs[0], horizontal * signs[1], least.clamp_min(0).sqrt()


def _alternate(core: Tensor, start: list[Tensor], sweeps: int) -> tuple[list[Tensor], Tensor]:
    """Factors after so many sweeps or fewer, and the squared error [F] of core, whose squared size is 1."""
    factors = [factor.clone() for factor in start]
    whole = core.square().sum((1, 2, 3))
    before = torch.full_like(whole, torch.inf)
    left = torch.arange(len(core))  # filters that still gain
    for _ in range(sweeps):
        flat = core[left].flatten(2)
        _, vertical, horizontal = (_unit(factor[left]) for factor in factors)
        products = (vertical[:, :, None] * horizontal[:, None]).flatten(1, 2)
        lateral = _unit(_solved(flat @ products, vertical, horizontal))
        # What the other two see of the weight, [F, kh, kw, R].
        seen = (flat.transpose(1, 2) @ lateral).unflatten(1, core.shape[2:])
        vertical = _unit(_solved(torch.einsum("fijr,fjr->fir", seen, horizontal), lateral, horizontal))
        matched = torch.einsum("fijr,fir->fjr", seen, vertical)
        horizontal = _solved(matched, lateral, vertical)
        for factor, new in zip(factors, (lateral, vertical, horizontal), strict=True):
            factor[left] = new
        fitted = (horizontal.transpose(1, 2) @ horizontal) * _gram(lateral, vertical)
        loss = whole[left] - 2 * (horizontal * matched).sum((1, 2)) + fitted.sum((1, 2))
        gaining = before[left] - loss > GAIN
        before[left] = loss
        left = left[gaining]
        if not len(left):
            break
    # The difference of large numbers says little of a small one.
    rebuilt = torch.einsum("fcr,fir,fjr->fcij", *factors)
    return factors, (core - rebuilt).square().sum((1, 2, 3))


def _gram(a: Tensor, b: Tensor) -> Tensor:
    return (a.transpose(1, 2) @ a) * (b.transpose(1, 2) @ b)


def _solved(matched: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The factor [F, n, R] whose products with a and b, columns of norm 1, are nearest to what was matched."""
    gram = _gram(a, b)
    rank = gram.shape[-1]
    if rank == 1:
        return matched
    solved: Tensor = torch.linalg.solve(gram + RIDGE * torch.eye(rank, dtype=gram.dtype), matched, left=False)
    return solved


def _unit(factor: Tensor) -> Tensor:
    """Columns of norm 1; one of zeros, of which nothing could come, becomes the first direction."""
    norm = factor.norm(dim=1, keepdim=True)
    first = torch.zeros_like(factor)
    first[:, 0] = 1
    return torch.where(norm > 0, factor / torch.where(norm > 0, norm, 1.0), first)


def _from_unfoldings(core: Tensor, rank: int, generator: torch.Generator) -> list[Tensor]:
    """The leading singular vectors of each unfolding, and random filters where these are not enough."""
    factors = []
    for axis in (1, 2, 3):
        vectors = torch.linalg.svd(core.movedim(axis, 1).flatten(2), full_matrices=False).U[:, :, :rank]
        more = torch.randn(
            core.shape[0], core.shape[axis], rank - vectors.shape[2], generator=generator, dtype=core.dtype
        )
        factors.append(torch.cat([vectors, _unit(more)], 2))
    return factors


def _one_by_one(core: Tensor, rank: int, generator: torch.Generator) -> list[Tensor]:
    """The nearest product, then that of what it leaves, and so on."""
    left, columns = core, []
    for _ in range(rank):
        found, _ = _alternate(left, _from_unfoldings(left, 1, generator), TRIAL_SWEEPS)
        left = left - torch.einsum("fcr,fir,fjr->fcij", *found)
        columns.append(found)
    return [torch.cat(each, 2) for each in zip(*columns, strict=True)]


def _signs(taps: Tensor) -> Tensor:
    largest = taps.gather(1, taps.abs().argmax(1, keepdim=True))
    return torch.where(largest < 0, -1.0, 1.0).to(taps)


def _keeping(weight: Tensor, energy: float, restarts: int, seed: int) -> Decomposition | None:
    """Of the least rank that keeps this share of the squared weights; None where that is not smaller."""
    _, channels, kh, kw = weight.shape
    for rank in range(1, most_rank(weight) + 1):
        if rank * (channels + kh + kw) >= channels * kh * kw:
            return None
        found = nearest_filters(weight, rank, restarts=restarts, seed=seed)
        if _whole_error(weight, found.errors) ** 2 <= 1 - energy:
            return found
    return None


def _whole_error(weight: Tensor, errors: Tensor) -> float:
    """||W - W'|| / ||W|| of all filters together."""
    sizes = weight.detach().to("cpu", torch.float64).flatten(1).square().sum(1)
    total = float(sizes.sum())
    return 0.0 if total == 0 else float((errors.square() * sizes).sum() / total) ** 0.5


def _chosen(
    where: str,
    model: nn.Module,
    argument: str,
    value: Any,
    targets: Patterns | None,
    ignore: Patterns | None,
) -> list[tuple[Target, Any]]:
    """The weights, and what was told of each."""
    if isinstance(value, Mapping):
        if targets is not None:
            raise ValueError(
                f"{where}: {argument} must be one number where targets is given, got a mapping; leave one of them out"
            )
        pairs = list(assign(where, argument, model, value, ignore, frozen=True))
        check(where, model, [target for target, _ in pairs], (nn.Conv2d,))
    else:
        pairs = [(target, value) for target in choose(where, model, targets, ignore, (nn.Conv2d,))]
    if targets is None and not isinstance(value, Mapping):
        able = [pair for pair in pairs if _reason(pair[0]) is None and max(pair[0].weight.shape[2:]) > 1]
        if not able:
            name, reason = pairs[0][0].name, _reason(pairs[0][0])
            raise ValueError(
                f"{where}: model must have a plain nn.Conv2d with a kernel larger than 1x1, got none; {name!r}: "
                f"{reason or 'a kernel of 1x1'}"
            )
        pairs = able
    for target, _ in pairs:
        reason = _reason(target)
        if reason is not None:
            raise ValueError(
                f"{where}: the layer of {target.name!r} must be a plain convolution, got {reason}; ignore="
                f"[{target.name!r}]"
            )
    return pairs


def _reason(target: Target) -> str | None:
    module = module_of(target)
    try:
        return FlattenedConv2d.why_not(module)
    except TypeError as error:  # of its dtype
        return str(error)
