"""Which rank each layer gets: told, by a share of its singular values' squares, or all within one budget."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from tersetorch.methods.arguments import check_choice, check_int, check_number
from tersetorch.methods.factorize.sites import module_of
from tersetorch.methods.modes import evaluating
from tersetorch.methods.selection import PerPattern, Target
from tersetorch.nn.low_rank_factors import Form, unfolded_shape

Unit = Literal["parameters", "bytes", "macs"]
Rank: TypeAlias = int | PerPattern[int]
Energy: TypeAlias = float | PerPattern[float]


# Of a share: 1 - 0.8 is a bit less than 0.2.
ROUNDING = 1e-13


@dataclass(frozen=True)
class Curve:
    """What a layer loses and costs at each rank.

    Attributes:
        lost: share of the squared singular values that rank r leaves out, at place r, 0 to min(rows, columns).
        per_rank: what one more rank costs.
        dense: what the dense weight costs.
    """

    lost: Tensor
    per_rank: int
    dense: int

    @property
    def most(self) -> int:
        """The greatest rank that costs less than the dense weight; 0 where none does."""
        return min(len(self.lost) - 1, (self.dense - 1) // self.per_rank)


def lost_shares(values: Tensor, rows: int, columns: int) -> Tensor:
    """1 - (s_1^2 + ... + s_r^2) / sum s^2 for r = 0, 1, ..., n; what rounding leaves of a zero counts as one."""
    squares = values.double().square()
    rounding = max(rows, columns) * torch.finfo(torch.float64).eps * (values.max() if len(values) else 0)
    squares = torch.where(values <= rounding, 0.0, squares)
    tails = torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)])
    return tails / tails[0] if tails[0] > 0 else tails


def rank_of_energy(lost: Tensor, energy: float) -> int:
    """The least rank, at least 1, that keeps that share of the squared singular values."""
    enough = lost <= 1 - energy + ROUNDING
    return max(1, int(enough.nonzero()[0]))


def joint_ranks(curves: Sequence[Curve], budget: int) -> list[int | None] | None:
    """Ranks, None for dense, of least summed loss within budget, or None where even rank 1 everywhere exceeds it.

    Steps along the lower convex hull of each layer's points (cost, loss), the one that loses least a cost first: for a
    layer's own ranks these are single ranks, since squared singular values fall; the last may jump to the dense
    weight. What is left of the budget raises ranks one by one, in the same order.
    """
    points = [_points(curve) for curve in curves]
    hulls = [_hull(each) for each in points]
    at = [0] * len(curves)
    spent = sum(hull[0][0] for hull in hulls)
    if spent > budget:
        return None
    steps = [(_slope(hull, 0), index) for index, hull in enumerate(hulls) if len(hull) > 1]
    heapq.heapify(steps)
    while steps:
        _, index = heapq.heappop(steps)
        hull = hulls[index]
        more = hull[at[index] + 1][0] - hull[at[index]][0]
        if spent + more > budget:
            continue
        spent += more
        at[index] += 1
        if at[index] + 1 < len(hull):
            heapq.heappush(steps, (_slope(hull, at[index]), index))
    found = [hull[place][2] for hull, place in zip(hulls, at, strict=True)]
    while True:
        best, gain = None, 0.0
        for index, (curve, rank) in enumerate(zip(curves, found, strict=True)):
            if rank is None or rank >= curve.most or spent + curve.per_rank > budget:
                continue
            each = float(curve.lost[rank] - curve.lost[rank + 1]) / curve.per_rank
            if each > gain:
                best, gain = index, each
        if best is None:
            return found
        found[best] = (found[best] or 0) + 1
        spent += curves[best].per_rank


Point = tuple[int, float, int | None]


def _points(curve: Curve) -> list[Point]:
    ranks: list[Point] = [(rank * curve.per_rank, float(curve.lost[rank]), rank) for rank in range(1, curve.most + 1)]
    return [*ranks, (curve.dense, 0.0, None)]


def _hull(points: Sequence[Point]) -> list[Point]:
    """The lower convex hull of points of rising cost, from the cheapest to the first of least loss."""
    hull: list[Point] = []
    for point in points:
        if hull and point[1] >= hull[-1][1]:
            continue
        while len(hull) > 1 and (hull[-2][1] - hull[-1][1]) * (point[0] - hull[-1][0]) <= (hull[-1][1] - point[1]) * (
            hull[-1][0] - hull[-2][0]
        ):
            hull.pop()
        hull.append(point)
    return hull


def _slope(hull: Sequence[Point], place: int) -> float:
    return (hull[place + 1][1] - hull[place][1]) / (hull[place + 1][0] - hull[place][0])


# ---- costs


def whole_cost(model: nn.Module, unit: Unit, positions: Mapping[nn.Module, Sequence[int]]) -> int:
    """What model costs as it is: values of its parameters, bytes of parameters and buffers, or multiply-accumulates."""
    if unit == "parameters":
        return sum(parameter.numel() for parameter in model.parameters())
    if unit == "bytes":
        return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    total = 0
    for module in model.modules():
        if isinstance(module, nn.Linear | _ConvNd):
            total += positions.get(module, (0, 0))[0] * module.weight.numel()
    return total


def layer_costs(
    target: Target, form: Form, unit: Unit, positions: Mapping[nn.Module, Sequence[int]]
) -> tuple[int, int]:
    """What one rank of a layer costs, and its dense weight."""
    module, weight = module_of(target), target.weight
    if unit == "macs":
        rows, columns = unfolded_shape(weight.shape, form_of(module, form))
        outputs, between = positions.get(module, (0, 0))
        first = between if form_of(module, form) == "separable" else outputs
        return first * columns + outputs * rows, outputs * weight.numel()
    size = weight.itemsize if unit == "bytes" else 1
    return size * sum(unfolded_shape(weight.shape, form_of(module, form))), size * weight.numel()


def form_of(module: nn.Module, form: Form) -> Form:
    """A linear layer has one form only."""
    return form if isinstance(module, nn.Conv2d) else "filters"


@torch.no_grad()
def positions_of(where: str, model: nn.Module, example_inputs: object) -> dict[nn.Module, tuple[int, int]]:
    """How often each plain Linear or Conv layer multiplies by its weight, from one run in eval mode.

    The second number is how often the first, vertical factor of a separable form would.

    Raises:
        TypeError: example_inputs are none.
    """
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(example_inputs, Tensor):
        args = (example_inputs,)
    elif isinstance(example_inputs, tuple):
        args = example_inputs
    elif isinstance(example_inputs, Mapping):
        kwargs = dict(example_inputs)
    else:
        raise TypeError(
            f"{where}: example_inputs must be a tensor, a tuple of arguments or a dict of keyword arguments where the "
            f"budget counts macs, got {type(example_inputs).__name__}; pass what model is called with"
        )
    found: dict[nn.Module, tuple[int, int]] = {}

    def record(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> None:
        given = inputs[0] if inputs else named["input"]
        if isinstance(module, _ConvTransposeNd):
            here, between = given.numel() // module.in_channels, 0
        elif isinstance(module, _ConvNd):
            here = output.numel() // module.out_channels
            between = here // output.shape[-1] * given.shape[-1] if output.shape[-1] else 0
        else:
            here, between = output.numel() // output.shape[-1] if output.numel() else 0, 0
        before = found.get(module, (0, 0))
        found[module] = before[0] + here, before[1] + between

    hooks = [
        module.register_forward_hook(record, with_kwargs=True)
        for module in model.modules()
        if isinstance(module, nn.Linear | _ConvNd)
    ]
    try:
        with evaluating(model):
            model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def check_rank(where: str, target: Target, rank: object, form: Form) -> None:
    """Refuses a rank that the layer cannot have."""
    sizes = unfolded_shape(target.weight.shape, form_of(module_of(target), form))
    check_int(where, f"rank of {target.name!r}", rank, 1, min(sizes))


def check_energy(where: str, name: str, energy: object) -> None:
    """Refuses what is no share in (0, 1]."""
    check_number(where, name, energy, 0, 1, closed=True)
    if energy == 0:
        raise ValueError(f"{where}: {name} must be in (0, 1], got {energy}; pass a share to keep")


def check_unit(where: str, unit: object) -> None:
    """Refuses a unit that nothing is counted in."""
    check_choice(where, "unit", unit, get_args(Unit))
