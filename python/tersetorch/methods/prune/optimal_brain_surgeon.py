"""Optimal Brain Surgeon on a whole small network: the full inverse Hessian, and every weight makes up for each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tersetorch.methods.prune.calibration import call, evaluating, parameter_of
from tersetorch.methods.selection import Target

# Most bytes that an inverse Hessian may take: 16,384 weights and biases in float64.
MAX_BYTES = 1 << 31
# Gradients that the recursion takes at a time.
ROWS = 256


@dataclass(frozen=True)
class DeletedWeight:
    """One weight that full Optimal Brain Surgeon deleted.

    Attributes:
        layer: the name of its layer.
        index: its place in the weight.
        increase: L_q, how much the deletion adds to the error by the quadratic model.
    """

    layer: str
    index: tuple[int, ...]
    increase: float


def inverse_hessian(rows: Iterable[Tensor], patterns: int, alpha: float, n: int) -> Tensor:
    """(alpha I + (1 / P) sum X X^T)^-1 by a recursion over the gradients X of the outputs.

        H^-1_(m+1) = H^-1_m - H^-1_m X X^T H^-1_m / (P + X^T H^-1_m X),   H^-1_0 = I / alpha,

    It is taken for several X at a time, which is the same by Woodbury's identity.

    Args:
        rows: float64 [any number, n] each, the gradients; one for each pattern and output.
        patterns: P.
        alpha: positive.
        n: weights.

    Returns:
        float64 [n, n].

    Source:
        Hassibi and Stork, Second order derivatives for network pruning: Optimal Brain Surgeon (1993), equations 11 to
        13.
    """
    found: Tensor | None = None
    for x in rows:
        if found is None:
            found = torch.eye(n, dtype=torch.float64, device=x.device) / alpha
        moved = found @ x.mT
        small = torch.eye(len(x), dtype=x.dtype, device=x.device) * patterns + x @ moved
        found -= moved @ torch.cholesky_solve(moved.mT, torch.linalg.cholesky_ex(small).L)
    assert found is not None
    return (found + found.mT) / 2


def full_obs(
    where: str,
    model: nn.Module,
    targets: Sequence[Target],
    data: Iterable[Any],
    alpha: float,
    sparsity: float | None,
    max_increase: float | None,
    tick: Callable[[float], None],
) -> tuple[list[Tensor], list[DeletedWeight]]:
    """Deletes weights one by one, each time the q of least L_q, and updates all others and the biases.

        L_q = w_q^2 / (2 [H^-1]_qq),   dw = -w_q / [H^-1]_qq H^-1 e_q,

    after which q leaves H^-1. It stops at the sparsity, or before the sum of the L_q exceeds max_increase.

    Returns:
        What is kept of each target, bool, and what was deleted, in order.
    """
    weights = [target.weight.double() for target in targets]
    biases = _biases(targets)
    alive = torch.cat([(weight != 0).flatten() for weight in weights])
    size = int(alive.sum()) + sum(bias.numel() for bias in biases)
    if 8 * size * size > MAX_BYTES:
        raise ValueError(
            f"{where}: solver 'full' must hold an inverse Hessian of at most {MAX_BYTES:,} bytes, got {size:,} weights "
            f"and biases, which take {8 * size * size:,}; pass solver='blocked', or name fewer layers in targets"
        )
    total = alive.numel()
    count = int(alive.sum())
    places = alive.nonzero().flatten()
    w = torch.cat([torch.cat([weight.flatten() for weight in weights])[alive], *[b.detach().double() for b in biases]])
    allowed = count if sparsity is None else max(0, round(sparsity * total) - (total - count))
    limit = torch.inf if max_increase is None else max_increase
    patterns = _count(where, model, data)
    held = [parameter_of(target) for target in targets]
    with evaluating(model), torch.enable_grad(), _training(held):
        inverse = inverse_hessian(_gradients(model, held, biases, data, alive), patterns, alpha, size)
    if not bool(inverse.isfinite().all()):
        raise ValueError(f"{where}: data must give finite gradients, got NaN or infinity; clean the data")
    gone = torch.zeros(count, dtype=torch.bool, device=w.device)
    deleted: list[int] = []
    increases: list[float] = []
    while len(deleted) < min(allowed, count):
        cost = torch.where(gone, torch.inf, w[:count].square() / (2 * inverse.diagonal()[:count]))
        q = int(cost.argmin())
        if sum(increases) + float(cost[q]) > limit:
            break
        line = inverse[q].clone()
        w -= w[q] / line[q] * line
        inverse.addr_(line, line, alpha=-1 / float(line[q]))
        gone[q] = True
        w[:count].masked_fill_(gone, 0)
        # What rounding leaves of q must not grow in later updates.
        inverse[q].zero_()
        inverse[:, q].zero_()
        deleted.append(q)
        increases.append(float(cost[q]))
        if len(deleted) % 16 == 0:
            tick(len(deleted) / max(1, min(allowed, count)))
    flat = torch.zeros(total, dtype=torch.float64, device=w.device)
    flat[places] = w[:count]
    sizes = [weight.numel() for weight in weights]
    found = [part.view_as(weight) for part, weight in zip(flat.split(sizes), weights, strict=True)]
    parts = w[count:].split([bias.numel() for bias in biases])
    with torch.no_grad():
        for parameter, values in zip([*held, *biases], [*found, *parts], strict=True):
            parameter.copy_(values.view_as(parameter))
    kept = alive.clone()
    kept[places[gone]] = False
    masks = [part.view_as(weight) for part, weight in zip(kept.split(sizes), weights, strict=True)]
    deletions = []
    for q, increase in zip(deleted, increases, strict=True):
        layer, place = 0, int(places[q])
        while place >= sizes[layer]:
            place -= sizes[layer]
            layer += 1
        index = torch.unravel_index(torch.tensor(place), weights[layer].shape)
        deletions.append(DeletedWeight(targets[layer].name, tuple(int(each) for each in index), increase))
    return masks, deletions


def _biases(targets: Sequence[Target]) -> list[nn.Parameter]:
    """The trained biases of the targets' modules, each once."""
    found = [module._parameters.get("bias") for target in targets for module, _ in target.owners]
    return list(dict.fromkeys(bias for bias in found if isinstance(bias, nn.Parameter) and bias.requires_grad))


def _count(where: str, model: nn.Module, data: Iterable[Any]) -> int:
    patterns = 0
    with torch.no_grad(), evaluating(model):
        for batch in data:
            output = _output(where, call(model, batch))
            if not bool(output.isfinite().all()):
                raise ValueError(f"{where}: data must give finite outputs, got NaN or infinity; clean the data")
            patterns += len(output)
    if not patterns:
        raise ValueError(f"{where}: data must hold at least one batch, got none; pass some inputs of the model")
    return patterns


def _output(where: str, output: Any) -> Tensor:
    if not isinstance(output, Tensor) or output.dim() == 0:
        kind = "a scalar" if isinstance(output, Tensor) else type(output).__name__
        raise TypeError(
            f"{where}: model must give a tensor [N, ...] with solver 'full', got {kind}; pass another solver"
        )
    return output


def _gradients(
    model: nn.Module,
    weights: Sequence[nn.Parameter],
    biases: Sequence[nn.Parameter],
    data: Iterable[Any],
    alive: Tensor,
) -> Iterator[Tensor]:
    """The gradients of each output for each pattern, float64 [some, weights that are alive and biases]."""
    rows: list[Tensor] = []
    for batch in data:
        for each in call(model, batch).flatten():
            gradients = torch.autograd.grad(each, [*weights, *biases], retain_graph=True, materialize_grads=True)
            own = torch.cat([gradient.flatten().double() for gradient in gradients[: len(weights)]])
            rows.append(torch.cat([own[alive], *(rest.flatten().double() for rest in gradients[len(weights) :])]))
            if len(rows) == ROWS:
                yield torch.stack(rows)
                rows.clear()
    if rows:
        yield torch.stack(rows)


@contextmanager
def _training(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
