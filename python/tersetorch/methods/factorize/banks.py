"""From convolutions to filter banks and back: what the methods that cut a bank into blocks share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from tersetorch.methods.factorize.metrics import Metric, Outputs, Weighted
from tersetorch.methods.factorize.sites import check_tensors, choose, module_of, outside_inference, swap
from tersetorch.methods.factorize.weighted import counts
from tersetorch.methods.prune.calibration import check_data, input_moments
from tersetorch.methods.selection import Patterns, Target

Data: TypeAlias = Iterable[Any] | None
Importance: TypeAlias = Mapping[str, Tensor] | None


def replace_convolutions(
    where: str,
    model: nn.Module,
    chosen: list[Target],
    approximate: Callable[[int, Target, Tensor, Metric], nn.Module],
    data: Data,
    importance: Importance,
) -> nn.Module:
    """Puts what approximate makes of each chosen layer's bank [1, F, C, S], float64, into model.

    Raises:
        TypeError, ValueError: data or importance do not do, or as approximate does; the model is as it was.
    """
    if data is not None and importance is not None:
        raise ValueError(f"{where}: data must be left out where importance is given, got both; pass one of them")
    weights = None if importance is None else check_tensors(where, "importance", importance, chosen)
    if data is not None:
        check_data(where, data, len(chosen))
    layers = {}
    with outside_inference(), torch.no_grad():
        for index, target in enumerate(chosen):
            bank = _bank(target.weight)
            metric: Metric = Weighted()
            if data is not None:
                shape = bank.shape[2:]
                moments = input_moments(where, model, target, data).hessian.cpu()
                metric = Outputs(_damped(moments).view(1, *shape, *shape))
            elif weights is not None:
                metric = Weighted(counts(_bank(weights[target.name])))
            layers[module_of(target)] = approximate(index, target, bank, metric)
    return swap(model, layers)


def choose_convolutions(
    where: str, model: nn.Module, targets: Patterns | None, ignore: Patterns | None
) -> list[Target]:
    """The weights of nn.Conv2d that targets name, or all of them.

    Raises:
        TypeError, ValueError: as sites.choose.
    """
    return choose(where, model, targets, ignore, (nn.Conv2d,))


def blocks(bank: Tensor, inputs: Tensor, outputs: Tensor, in_clusters: int, out_clusters: int) -> Tensor:
    """[G * H, F / H, C / G, S] of bank [1, F, C, S], the channels and filters in the order of their clusters."""
    ordered = bank[0][outputs][:, inputs]
    cut = ordered.view(out_clusters, bank.shape[1] // out_clusters, in_clusters, bank.shape[2] // in_clusters, -1)
    return cut.permute(2, 0, 1, 3, 4).flatten(0, 1)


def metric_of_blocks(metric: Metric, inputs: Tensor, outputs: Tensor, in_clusters: int, out_clusters: int) -> Metric:
    """The metric of each block alone: what outputs of several clusters of channels have in common is left out."""
    if isinstance(metric, Outputs):
        moments = metric.moments[0][inputs][:, :, inputs]  # [C, S, C, S]
        width = len(inputs) // in_clusters
        own = [moments[g : g + width, :, g : g + width] for g in range(0, len(inputs), width)]
        return Outputs(torch.stack(own).repeat_interleave(out_clusters, 0))
    assert isinstance(metric, Weighted)
    if metric.weights is None:
        return metric
    return Weighted(blocks(metric.weights, inputs, outputs, in_clusters, out_clusters))


def _bank(weight: Tensor) -> Tensor:
    return weight.detach().to("cpu", torch.float64).flatten(2)[None]


def _damped(moments: Tensor) -> Tensor:
    """Moments with a bit of their mean diagonal added, for directions in which no input lies."""
    diagonal = moments.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1)[:, None, None]
    return moments + 1e-6 * torch.where(mean > 0, mean, 1.0) * torch.eye(moments.shape[-1], dtype=moments.dtype)
