"""Batch norm statistics, taken anew for a network whose weights have changed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from tersetorch.methods.arguments import check_model
from tersetorch.methods.prune.calibration import call, check_data, evaluating


@torch.no_grad()
def recalibrate_batch_norm(model: nn.Module, data: Iterable[Any]) -> nn.Module:
    """Sets the running statistics of every batch norm to the average over data, in place, and returns model.

    Pruning shifts what the layers put out, and statistics of the dense network then do more harm than the pruning.
    While data runs through, batch norms normalise by their batch's own statistics, as in training, and average them,
    each batch counting the same; everything else is in eval mode. A model without running statistics is returned as it
    is, and where anything fails, so is any other.

    Given a DistributedDataParallel, on every rank, the average is over the batches of all ranks, so that all get the
    same statistics; the bare module takes those of the calling rank's data alone.

    Args:
        model: any nn.Module.
        data: as in prune.obs, gone through once; give batches as large as in training, a hundred images or more each.

    Raises:
        TypeError: model is no module, or data no iterable of batches.
        ValueError: data is empty, or the statistics come out as NaN or infinity.

    Source:
        Hubara et al., Accelerated sparse neural training (2021), and Frantar et al., Optimal Brain Compression (2022),
        section 6, use it after pruning.
    """
    where = "prune.recalibrate_batch_norm"
    check_model(where, model)
    check_data(where, data, 1)
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.running_mean is not None]
    if not norms:
        return model
    before = [({name: value.clone() for name, value in norm.named_buffers()}, norm.momentum) for norm in norms]
    batches = 0
    try:
        with evaluating(model):
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # the average over all batches
                norm.training = True
            for batch in data:
                call(model, batch)
                batches += 1
        if isinstance(model, DistributedDataParallel):
            batches = _over_ranks(model, norms, batches)
        if not batches:
            raise ValueError(f"{where}: data must hold at least one batch, got none; pass some inputs of the model")
        if not all(bool(buffer.isfinite().all()) for norm in norms for buffer in norm.buffers()):
            raise ValueError(f"{where}: data must give finite statistics, got NaN or infinity; clean the data")
        # One that data does not reach knows nothing new.
        unreached = [
            (norm, kept) for norm, (kept, _) in zip(norms, before, strict=True) if not norm.num_batches_tracked
        ]
    except BaseException:
        unreached = [(norm, kept) for norm, (kept, _) in zip(norms, before, strict=True)]
        raise
    finally:
        for norm, kept in unreached:
            for name, value in kept.items():
                norm.get_buffer(name).copy_(value)
        for norm, (_, momentum) in zip(norms, before, strict=True):
            norm.momentum = momentum
    return model


def _over_ranks(model: DistributedDataParallel, norms: Sequence[_BatchNorm], batches: int) -> int:
    """Averages what each rank's batches gave, in place, each batch counting the same; how many there are in all."""
    for norm in norms:
        mean, var, count = norm.running_mean, norm.running_var, norm.num_batches_tracked
        assert mean is not None and var is not None and count is not None
        total = torch.cat([torch.ones_like(mean[:1]), mean, var]).double() * count
        distributed.all_reduce(total, group=model.process_group)
        count.copy_(total[0])
        if count:
            for buffer, average in zip((mean, var), (total[1:] / total[0]).chunk(2), strict=True):
                buffer.copy_(average)
    everywhere = torch.tensor(batches, device=total.device)
    distributed.all_reduce(everywhere, group=model.process_group)
    return int(everywhere)
