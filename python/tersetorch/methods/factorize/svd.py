"""A weight as a product of two thin matrices, by its greatest singular values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, get_args

import torch
from torch import Tensor, nn

from tersetorch.methods.arguments import check_choice, check_int, check_number
from tersetorch.methods.factorize.ranks import (
    Curve,
    Energy,
    Rank,
    Unit,
    check_energy,
    check_rank,
    check_unit,
    form_of,
    joint_ranks,
    layer_costs,
    lost_shares,
    positions_of,
    rank_of_energy,
    whole_cost,
)
from tersetorch.methods.factorize.sites import (
    check,
    check_tensors,
    choose,
    module_of,
    outside_inference,
    swap,
)
from tersetorch.methods.factorize.weighted import weighted_split
from tersetorch.methods.prune.calibration import check_data, input_moments
from tersetorch.methods.quantize.binary import check_matrix
from tersetorch.methods.selection import Patterns, Target, assign
from tersetorch.methods.vector_codes import metric
from tersetorch.nn import LowRankConv2d, LowRankLinear
from tersetorch.nn.low_rank_factors import Form, split, unfold


def svd(
    model: nn.Module,
    rank: Rank | None = None,
    *,
    energy: Energy | None = None,
    budget: int | None = None,
    ratio: float | None = None,
    unit: Unit = "parameters",
    example_inputs: Any = None,
    form: Form = "filters",
    data: Iterable[Any] | None = None,
    importance: Mapping[str, Tensor] | None = None,
    targets: Patterns | None = None,
    ignore: Patterns | None = None,
) -> nn.Module:
    """Replaces layers by two thin ones whose product is nearest to their weight, in place, and returns model.

    With W = U S V^T, a layer's weight as a matrix, the first factor is S_r^(1/2) V_r^T and the second U_r S_r^(1/2):
    no product of rank r has a smaller squared error, which is the sum of the other s^2. A Linear becomes a
    nn.LowRankLinear of r (in + out) weights. A Conv2d becomes a nn.LowRankConv2d: W is [out, in kh kw] in form
    "filters", a convolution of r filters and then one of 1x1; [out kw, in kh] in form "separable", a kh x 1
    convolution and then one of 1 x kw. The factors are plain layers, which train, prune, share, convert and save like
    any other; build the optimizer afterwards.

    Ranks are told; or the least that keep a share of the squared singular values; or those that lose least within a
    budget for the whole model, where each layer's loss is the share of its squared singular values that is left out,
    and all layers' are added up. Under energy and budget a layer that factors would not make smaller stays dense.

    Args:
        model: any nn.Module. Biases and flags carry over; of convolutions stride, padding and dilation too.
        rank: 1 to min(rows, columns) of the matrix; or one for each pattern, which then stands for targets too.
        energy: share to keep, in (0, 1]; or one for each pattern.
        budget: what the whole model may take, in units; or
        ratio: what it takes now over what it may take, more than 1. Exactly one of these four is given.
        unit: what budget and ratio count: "parameters", their "bytes" and those of buffers, or "macs", the
            multiply-accumulates of Linear and Conv layers for example_inputs, as tt.costs.count counts them.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments, where unit is "macs".
        form: of convolutions, "filters" or "separable".
        data: inputs, as prune.obs takes them: the error that is lowered is then that of the layers' outputs,
            ||(W - W') C^(1/2)|| with C the second moments of what W is multiplied with, a pass over data for each
            layer; the singular values are those of W C^(1/2). Not for "separable" convolutions.
        importance: for each layer's name how much each weight's error counts, of the weight's shape, as
            factorize.gradient_sizes returns: sum (importance (W - W'))^2 is lowered by alternating least squares, from
            the factors above on. Ranks are chosen by W's own singular values.
        targets: as in prune.magnitude; every weight named must be that of an nn.Linear or of an nn.Conv2d without
            groups. Left out: every such layer.
        ignore: the same, for what to leave out.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a number is outside its range, the budget is less than rank 1 everywhere takes, a pattern matches
            nothing, or factors cannot stand in for a layer: it has groups, is tied, compressed, hooked or model itself,
            or its weight is not finite. The model is as it was.

    Source:
        Denton, Zaremba, Bruna, LeCun, Fergus, Exploiting linear structure within convolutional networks for efficient
        evaluation (2014), sections 3.1 and 3.2; Jaderberg, Vedaldi, Zisserman, Speeding up convolutional neural
        networks with low rank expansions (2014), for "separable"; Eckart and Young (1936). Where we differ: the
        singular values' roots are in both factors, and ranks are chosen jointly.
    """
    where = "factorize.svd"
    check_choice(where, "form", form, get_args(Form))
    told = {"rank": rank, "energy": energy, "budget": budget, "ratio": ratio}
    given = [name for name, value in told.items() if value is not None]
    if len(given) != 1:
        raise ValueError(
            f"{where}: exactly one of rank, energy, budget and ratio must be given, got {' and '.join(given) or 'none'}"
            "; pass one"
        )
    chosen, values = _chosen(where, model, given[0], rank if energy is None else energy, targets, ignore)
    if rank is not None:
        for target, each in zip(chosen, values, strict=True):
            check_rank(where, target, each, form)
    elif energy is not None:
        for target, each in zip(chosen, values, strict=True):
            check_energy(where, f"energy of {target.name!r}", each)
    limit = _limit(where, budget, ratio, unit)
    if data is not None and importance is not None:
        raise ValueError(f"{where}: data must be left out where importance is given, got both; pass one of them")
    weights = None if importance is None else check_tensors(where, "importance", importance, chosen)
    if data is not None:
        check_data(where, data, len(chosen))
        if form == "separable" and any(isinstance(module_of(target), nn.Conv2d) for target in chosen):
            raise ValueError(
                f"{where}: form must be 'filters' where data is given, got 'separable', whose columns are no inputs; "
                "leave one of them out"
            )
    positions = positions_of(where, model, example_inputs) if limit is not None and unit == "macs" else {}
    with outside_inference(), torch.no_grad():
        roots = [None if data is None else _root(where, model, target, data) for target in chosen]
        found: list[int | None]
        if rank is not None:
            found = [int(each) for each in values]
        else:
            matrices = [_seen(target, form, root) for target, root in zip(chosen, roots, strict=True)]
            curves = [
                Curve(lost_shares(_values(matrix), *matrix.shape), *layer_costs(target, form, unit, positions))
                for target, matrix in zip(chosen, matrices, strict=True)
            ]
            if limit is not None:
                found = _within(where, curves, limit, whole_cost(model, unit, positions), unit)
            else:
                found = [
                    each if each <= curve.most else None
                    for curve, each in (
                        (curve, rank_of_energy(curve.lost, share)) for curve, share in zip(curves, values, strict=True)
                    )
                ]
        layers = {
            module_of(target): _layer(target, each, form, root, None if weights is None else weights[target.name])
            for target, each, root in zip(chosen, found, roots, strict=True)
            if each is not None
        }
    return swap(model, layers)


@torch.no_grad()
def truncated(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors left [rows, rank] and right [rank, columns] whose product is the nearest to weight of that rank.

    With weight = U S V^T as a matrix [rows, rest], left = U_k S_k^(1/2) and right = S_k^(1/2) V_k^T. No product of that
    rank has a smaller squared error, which is the sum of the other s^2. The entry of each column of U that is largest
    in size is positive.

    Args:
        weight: finite, floating-point, of two or more dimensions; factors have its dtype, computed in float64.
        rank: 1 to min(rows, columns).

    Raises:
        TypeError: weight is no floating-point tensor, or rank no int.
        ValueError: rank is outside its range, or weight has another number of dimensions or is not finite.

    Source:
        Eckart and Young (1936). Gong et al., Compressing deep convolutional networks using vector quantization (2014),
        section 3.1, and Denil et al., Predicting parameters in deep learning (2013), for layers.
    """
    where = "factorize.truncated"
    check_matrix(where, weight)
    if not weight.numel():
        raise ValueError(f"{where}: weight must hold numbers, got shape {tuple(weight.shape)}; pass a layer's weight")
    matrix = weight.flatten(1)
    check_int(where, "rank", rank, 1, min(matrix.shape))
    return split(matrix, rank)


def rank_within(rows: int, columns: int, numbers: int) -> int:
    """The greatest rank whose factors hold at most so many numbers, rank * (rows + columns); 0 where none does."""
    where = "factorize.rank_within"
    for name, value in (("rows", rows), ("columns", columns)):
        check_int(where, name, value, 1)
    check_int(where, "numbers", numbers, 0)
    return min(numbers // (rows + columns), rows, columns)


def _chosen(
    where: str, model: nn.Module, argument: str, value: Any, targets: Patterns | None, ignore: Patterns | None
) -> tuple[list[Target], list[Any]]:
    """The weights, and what was told of each."""
    if not isinstance(value, Mapping):
        chosen = choose(where, model, targets, ignore)
        return chosen, [value] * len(chosen)
    if targets is not None:
        raise ValueError(
            f"{where}: {argument} must be one number where targets is given, got a mapping; leave one of them out"
        )
    pairs = assign(where, argument, model, value, ignore, frozen=True)
    check(where, model, [target for target, _ in pairs])
    return [target for target, _ in pairs], [each for _, each in pairs]


def _limit(where: str, budget: int | None, ratio: float | None, unit: Unit) -> tuple[int | None, float] | None:
    """The budget, or None and the ratio; None where neither is given."""
    check_unit(where, unit)
    if budget is not None:
        check_int(where, "budget", budget, 1)
        return int(budget), 1.0
    if ratio is None:
        return None
    check_number(where, "ratio", ratio, 1, float("inf"))
    return None, float(ratio)


def _within(
    where: str, curves: list[Curve], limit: tuple[int | None, float], whole: int, unit: Unit
) -> list[int | None]:
    budget = limit[0] if limit[0] is not None else int(whole / limit[1])
    rest = whole - sum(curve.dense for curve in curves)
    found = joint_ranks(curves, budget - rest)
    if found is None:
        least = rest + sum(min(curve.dense, curve.per_rank) for curve in curves)
        if limit[0] is None:
            most = math.floor(100 * whole / least) / 100
            raise ValueError(
                f"{where}: ratio must be at most {most:.2f}, that of the model with rank 1 everywhere, {least} of "
                f"{whole} {unit}, got {limit[1]:g}; lower it, or name more layers"
            )
        raise ValueError(
            f"{where}: budget must be at least {least} {unit}, what the model takes with rank 1 everywhere, got "
            f"{budget} of {whole}; raise it, or name more layers"
        )
    return found


def _seen(target: Target, form: Form, root: Tensor | None) -> Tensor:
    """The matrix whose singular values say what each rank loses."""
    matrix = unfold(target.weight, form_of(module_of(target), form))
    return matrix if root is None else matrix.to("cpu", torch.float64) @ root


def _values(matrix: Tensor) -> Tensor:
    values: Tensor = torch.linalg.svdvals(matrix.to("cpu", torch.float64))
    return values


def _root(where: str, model: nn.Module, target: Target, data: Iterable[Any]) -> Tensor:
    """Lower R with R R^T the second moments, damped, of what the weight is multiplied with; on the CPU, float64."""
    return metric(where, input_moments(where, model, target, data).hessian[0]).cpu()


def _layer(target: Target, rank: int, form: Form, root: Tensor | None, weights: Tensor | None) -> nn.Module:
    module = module_of(target)
    layer: LowRankLinear | LowRankConv2d
    layer = (
        LowRankConv2d.like(module, rank, form) if isinstance(module, nn.Conv2d) else LowRankLinear.like(module, rank)
    )
    form = form_of(module, form)
    if weights is not None:
        layer.set_factors(*weighted_split(unfold(target.weight, form), unfold(weights, form), rank))
        return layer
    left, right = split(_seen(target, form, root), rank)
    if root is not None:
        right = torch.linalg.solve_triangular(root, right, upper=False, left=False)
    layer.set_factors(left, right)
    return layer
