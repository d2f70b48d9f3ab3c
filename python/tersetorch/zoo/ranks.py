"""Training and running on several ranks: each takes its part of every batch, and all end with the same bits."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from tersetorch.methods.distributed import take_from_rank_0

Result = TypeVar("Result")


def start(backend: str = "gloo") -> bool:
    """Starts torch.distributed where torchrun has started this process; whether it has.

    Does as init_process_group does, which after a rank was killed finds the addresses of the ranks that were, and fails
    (seen with torch 2.13, gloo and torchrun --standalone): here those of each restart are kept apart.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return False
    store, place, count = next(rendezvous("env://"))
    store = PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    distributed.init_process_group(backend, store=store, rank=place, world_size=count)
    return True


def rank() -> int:
    """This process's place among the ranks; 0 where torch.distributed has not started."""
    return distributed.get_rank() if _started() else 0


def ranks() -> int:
    """How many there are; 1 where torch.distributed has not started."""
    return distributed.get_world_size() if _started() else 1


def from_rank_0(work: Callable[[], Result]) -> Result:
    """What work() gives on rank 0, which alone does it; what it raises there is raised on every rank.

    Every rank must call it, and goes on once the work is done. The result must be picklable.
    """
    if ranks() == 1:
        return work()
    came: list[tuple[Result | None, Exception | None]] = [(None, None)]
    if rank() == 0:
        try:
            came = [(work(), None)]
        except Exception as problem:
            came = [(None, problem)]
    distributed.broadcast_object_list(came, src=0)
    result, error = came[0]
    if error is not None:
        raise error
    return result  # type: ignore[return-value]  # work's own, where nothing was raised


def alike(model: nn.Module) -> None:
    """Gives every rank the parameters and buffers of rank 0's model."""
    held = [tensor.detach() for tensor in (*model.parameters(), *model.buffers())]
    for dtype in dict.fromkeys(tensor.dtype for tensor in held):
        take_from_rank_0(model, [tensor for tensor in held if tensor.dtype == dtype])


def add_up(parameters: Sequence[nn.Parameter], loss: Tensor) -> Tensor:
    """Replaces the gradients by their sums over the ranks, the same bits on each; returns the sum of the losses.

    A gradient that is None on every rank stays so, that an optimizer passes its parameter over as it would alone.
    """
    present = torch.tensor([parameter.grad is not None for parameter in parameters]).to(loss)
    gradients = [torch.zeros_like(each) if each.grad is None else each.grad for each in parameters]
    loss = loss.detach()
    summed = [present, loss, *gradients]  # together, since a small message takes as long as a large one
    for kind in dict.fromkeys((tensor.dtype, tensor.device) for tensor in summed):
        some = [tensor for tensor in summed if (tensor.dtype, tensor.device) == kind]
        packed = torch.cat([tensor.flatten() for tensor in some])
        distributed.all_reduce(packed)
        for tensor, total in zip(some, packed.split([tensor.numel() for tensor in some]), strict=True):
            tensor.copy_(total.view(tensor.shape))
    for parameter, gradient, anywhere in zip(parameters, gradients, present.tolist(), strict=True):
        parameter.grad = gradient if anywhere else None
    return loss


def _started() -> bool:
    return distributed.is_available() and distributed.is_initialized()
