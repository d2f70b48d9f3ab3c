"""How far a candidate's outputs may lie from the dense layer's, and how far they do."""

import dataclasses
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

# Deviations of a sum's rounding error: the bound fails for one output in e**30.
CONFIDENCE = 8.0


class Difference(NamedTuple):
    """The largest |candidate - dense| over the finite outputs, and why that is not allowed, or None."""

    largest: float
    refusal: str | None


def rounding_bound(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """How far two orders of summation of y = module(x) may lie apart, for each output.

    With n products of a weight and an input to each output, summed in float32,
    |y - y'| <= 8 * sqrt(n) * eps32 * (sum |w| |x| + |b|) + 2 * eps(y.dtype) * |y|; where autocast rounds the layer's
    weights and inputs to y's dtype, 2 * eps(y.dtype) * (sum |w| |x| + |b|) is added.

    Source:
        Higham and Mary, A new approach to probabilistic rounding error analysis (SIAM J. Sci. Comput. 2019), theorem
        2.4 with lambda = 8, for both sums; the last rounding to y's dtype is ours.
    """
    weight = module.weight
    assert isinstance(weight, Tensor)
    absolute = {name: parameter.abs() for name, parameter in module.named_parameters()}
    magnitude: Tensor = functional_call(module, absolute, (x.abs(),)).float()
    terms = weight[0].numel() + 1
    unit = torch.finfo(y.dtype).eps
    summation = CONFIDENCE * math.sqrt(terms) * torch.finfo(torch.float32).eps
    if y.dtype != weight.dtype:
        summation += 2 * unit
    return summation * magnitude + 2 * unit * y.float().abs()


def compare(module: nn.Module, candidate: nn.Module, x: Tensor, max_error: float | None) -> Difference:
    """Compares candidate(x) with module(x) without gradients.

    Args:
        module: the dense layer.
        candidate: what would replace it.
        x: an input it was given.
        max_error: largest |difference| allowed, as a share of the largest |output|; None: rounding_bound.
    """
    with torch.no_grad():
        expected, got = module(x), candidate(x)
        if got.shape != expected.shape or got.dtype != expected.dtype:
            return Difference(
                math.inf,
                f"returns {got.dtype} {tuple(got.shape)} where the dense layer returns {expected.dtype} "
                f"{tuple(expected.shape)}",
            )
        finite = expected.isfinite()
        same = torch.equal(finite, got.isfinite()) and torch.equal(
            expected[~finite].nan_to_num(), got[~finite].nan_to_num()
        )
        if not same:
            return Difference(math.inf, "the dense output holds NaN or infinity where the candidate's does not")
        difference = (got.float() - expected.float()).abs()[finite]
        if difference.numel() == 0:
            return Difference(0.0, None)
        if max_error is None:
            allowed = rounding_bound(module, x, expected)[finite]
        else:
            allowed = max_error * expected.float().abs()[finite].max()
        largest = float(difference.max())
        if bool((difference > allowed).any()):
            return Difference(largest, f"differs by {largest:.3g}, more than the allowed error")
        return Difference(largest, None)


def output_difference(expected: object, got: object) -> float | None:
    """The largest |difference| between the floating-point tensors of two outputs.

    NaN and infinities that agree count as equal. None where the outputs hold no such tensors or do not correspond.
    """
    ours, theirs = _tensors(got), _tensors(expected)
    if len(ours) != len(theirs) or not ours:
        return None
    pairs = list(zip(theirs, ours, strict=True))
    if any(a.shape != b.shape for a, b in pairs):
        return None
    largest = 0.0
    for a, b in pairs:
        difference = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, (a.double() - b.double()).abs())
        if difference.numel():
            largest = max(largest, float(difference.nan_to_num(nan=math.inf).max()))
    return largest


def _tensors(output: object) -> list[Tensor]:
    found: list[Tensor] = []
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, Tensor):
            found += [leaf] if leaf.is_floating_point() and not leaf.is_nested else []
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            found += [tensor for value in vars(leaf).values() for tensor in _tensors(value)]
    return found
