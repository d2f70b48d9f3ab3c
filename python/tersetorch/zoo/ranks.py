"""Training and running on several ranks: each takes its part of every batch, and all end with the same bits."""

from __future__ import annotations

import atexit
import hashlib
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from tersetorch.methods.distributed import check_alike, check_device, failing_together, sendable, take_from_rank_0

__all__ = ["add_up", "alike", "from_rank_0", "rank", "ranks", "start"]

Result = TypeVar("Result")

# How long ranks wait for rank 0 to measure; torchrun ends them where it has died.
WAIT = timedelta(days=1)
# Where the ranks of start meet; None elsewhere.
_meeting: PrefixStore | None = None


def start(backend: str = "gloo") -> bool:
    """Starts torch.distributed where torchrun has started this process; whether it has.

    Does as init_process_group does, which after a rank was killed finds the addresses of the ranks that were, and fails
    (seen with torch 2.13, gloo and torchrun --standalone): here those of each restart are kept apart.

    The group ends with the process, if nothing ended it before.

    Args:
        backend: "gloo" for models on the CPU, "nccl" for models on CUDA devices.

    Raises:
        ValueError: backend is "nccl", and there is no CUDA device.
    """
    global _meeting
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return False
    if backend == "nccl" and not torch.cuda.is_available():
        raise ValueError("start: backend must be 'gloo' where there is no CUDA device, got 'nccl'; leave it out")
    store, place, count = next(rendezvous("env://"))
    _meeting = PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    distributed.init_process_group(backend, timeout=WAIT, store=_meeting, rank=place, world_size=count)
    atexit.register(_end)
    return True


def _end() -> None:
    """Ends the group where the script did not: threads of gloo that still run would abort the process."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def first_to_fail() -> bool:
    """Whether no other rank that start has started asked this before: the one whose error is to be told.

    The others wait until it calls told, a moment at most, since torchrun ends all when one of them exits.
    """
    if _meeting is None or _meeting.add("failed", 1) == 1:
        return True
    with suppress(RuntimeError):
        _meeting.wait(["told"], timedelta(seconds=5))
    return False


def told() -> None:
    """Lets the ranks that wait in first_to_fail go on."""
    if _meeting is not None:
        with suppress(RuntimeError):  # the ranks may have parted
            _meeting.set("told", "")


def rank() -> int:
    """This process's place among the ranks; 0 where torch.distributed has not started."""
    return distributed.get_rank() if _started() else 0


def ranks() -> int:
    """How many there are; 1 where torch.distributed has not started.

    Raises:
        RuntimeError: it has not, in a process that torchrun started as one of several, all of which would train, and
            write the same files.
    """
    if _started():
        return distributed.get_world_size()
    if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1":
        raise RuntimeError(
            f"torch.distributed must have started in a process that torchrun started as one of "
            f"{os.environ['WORLD_SIZE']}, got none; call tersetorch.zoo.ranks.start() first"
        )
    return 1


def everyone() -> distributed.ProcessGroup | None:
    """All ranks; None where there is one process."""
    return distributed.group.WORLD if ranks() > 1 else None


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
            came = [(None, sendable(problem))]
    distributed.broadcast_object_list(came, src=0)
    result, error = came[0]
    if error is not None:
        raise error
    return result  # type: ignore[return-value]  # work's own, where nothing was raised


def alike(model: nn.Module) -> None:
    """Gives every rank the parameters and buffers of rank 0's model.

    Raises:
        ValueError: the models' layers are not the same on every rank, or the backend cannot send tensors of their
            device.
    """
    group = everyone()
    if group is None:
        return
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for tensor in named.values():
        check_device(group, tensor.device)
    layers = repr([(name, tuple(tensor.shape), tensor.dtype) for name, tensor in named.items()])
    check_alike("training on ranks", "the model's layers", hashlib.sha256(layers.encode()).hexdigest(), group)
    held = [tensor.detach() for tensor in named.values()]
    for dtype in dict.fromkeys(tensor.dtype for tensor in held):
        take_from_rank_0(model, [tensor for tensor in held if tensor.dtype == dtype])


def add_up(parameters: Sequence[nn.Parameter], loss: Tensor | None, error: Exception | None = None) -> Tensor:
    """Replaces the gradients by their sums over the ranks, the same bits on each; returns the sum of the losses.

    A gradient that is None on every rank stays so, that an optimizer passes its parameter over as it would alone.

    Args:
        parameters: with their gradients.
        loss: of this rank; None where error is given.
        error: what kept this rank from its gradients: every rank raises it.
    """
    present = torch.tensor([parameter.grad is not None for parameter in parameters] + [error is not None])
    present = present.to(parameters[0])
    gradients = [torch.zeros_like(each) if each.grad is None else each.grad for each in parameters]
    loss = torch.zeros_like(present[0]) if loss is None else loss.detach().to(present)
    summed = [present, loss, *gradients]  # together, since a small message takes as long as a large one
    for kind in dict.fromkeys((tensor.dtype, tensor.device) for tensor in summed):
        some = [tensor for tensor in summed if (tensor.dtype, tensor.device) == kind]
        packed = torch.cat([tensor.flatten() for tensor in some])
        distributed.all_reduce(packed)
        for tensor, total in zip(some, packed.split([tensor.numel() for tensor in some]), strict=True):
            tensor.copy_(total.view(tensor.shape))
    *present_anywhere, failed = present.tolist()
    if failed:
        with failing_together(everyone()):
            if error is not None:
                raise error
    for parameter, gradient, anywhere in zip(parameters, gradients, present_anywhere, strict=True):
        parameter.grad = gradient if anywhere else None
    return loss


def _started() -> bool:
    return distributed.is_available() and distributed.is_initialized()
