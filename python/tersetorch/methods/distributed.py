"""The same masks on every rank: what rank 0 decides counts.

The rule: a stepper, which every rank calls in every step of training, takes rank 0's masks. A function that is called
once (prune.magnitude, prune.iterative, quantize.kmeans) says nothing to other ranks, so that one rank may call it
alone, on a copy for instance; it decides from weights and arguments only, never from a global generator, and so alike
wherever the weights are alike, as DistributedDataParallel keeps them. Masks and codes are buffers and codebooks
parameters, which its constructor takes from rank 0 as well; it does not see a codebook that comes later, so share
weights before wrapping.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel


def take_from_rank_0(model: nn.Module, tensors: Sequence[Tensor]) -> None:
    """Overwrites tensors, which are of one dtype, with those that rank 0 calls this with; every rank must call it.

    The ranks are those of model where it is a DistributedDataParallel, else all; where torch.distributed has not
    started, nothing happens.
    """
    if not _started():
        return
    group = group_of(model)
    for device in dict.fromkeys(tensor.device for tensor in tensors):
        check_device(group, device)
        here = [tensor for tensor in tensors if tensor.device == device]
        packed = torch.cat([tensor.flatten() for tensor in here])
        # A backend need not know bool.
        distributed.broadcast(packed.view(torch.uint8), group=group, group_src=0)
        for tensor, given in zip(here, packed.split([tensor.numel() for tensor in here]), strict=True):
            tensor.copy_(given.view(tensor.shape))


def number_of_rank_0(model: nn.Module, number: float, device: torch.device) -> float:
    """The number that rank 0 calls this with, likewise; it must be one of float32, and device the backend's."""
    if not _started():
        return number
    held = torch.tensor([number], dtype=torch.float32, device=device)
    take_from_rank_0(model, [held])
    return held.item()


def group_of(model: nn.Module) -> distributed.ProcessGroup | None:
    """The ranks of model where it is a DistributedDataParallel, else all; None where torch.distributed is not used."""
    if isinstance(model, DistributedDataParallel):
        return model.process_group
    return distributed.group.WORLD if _started() else None


@contextmanager
def failing_together(group: distributed.ProcessGroup | None) -> Iterator[None]:
    """What its body raises on a rank is raised on every rank of group, which would otherwise wait for that one.

    Each must come here, and the body must not wait for other ranks itself. Where several fail, the first one's error
    counts; unless all say the same, a note of it says which rank it came from. With no group nothing is added.
    """
    if group is None:
        yield
        return
    error: Exception | None = None
    try:
        yield
    except Exception as problem:
        error = problem
    told = gather(None if error is None else sendable(error), group)
    failed = [place for place, each in enumerate(told) if each is not None]
    if not failed:
        return
    first = failed[0]
    raised: Exception = error if error is not None and first == distributed.get_rank(group) else told[first]
    if len(failed) < len(told) or len(set(map(str, told))) > 1:
        raised.add_note(f"on rank {first}")
    raise raised


def check_alike(where: str, what: str, value: object, group: distributed.ProcessGroup | None) -> None:
    """Refuses, on every rank of group, what is not the same on all.

    Args:
        where: the public function, for the message.
        what: such as "the model's layers".
        value: what tells one from another; small and picklable.
        group: the ranks that must agree, each of which must call it; None for a process alone.

    Raises:
        ValueError: it is not the same.
    """
    found = gather(value, group)
    other = next((place for place, each in enumerate(found) if each != found[0]), None)
    if other is not None:
        raise ValueError(
            f"{where}: {what} must be the same on every rank, got others on rank {other} than on rank 0; call it with "
            "the same arguments everywhere"
        )


def check_device(group: distributed.ProcessGroup | None, device: torch.device) -> None:
    """Refuses tensors that the ranks' backend cannot send.

    Raises:
        ValueError: the backend is nccl, and the device has no CUDA.
    """
    if device.type == "cpu" and distributed.get_backend(group) == "nccl":
        raise ValueError(
            "torch.distributed: tensors must lie on a CUDA device where the backend is 'nccl', got one on cpu; move "
            "the model, or start the ranks with backend 'gloo'"
        )


def gather(value: Any, group: distributed.ProcessGroup | None) -> list[Any]:
    """The small value that each rank of group calls this with, in their order; this one's alone where there is none."""
    if group is None:
        return [value]
    found = [value] * distributed.get_world_size(group)
    distributed.all_gather_object(found, value, group=group)
    return found


def sendable(error: Exception) -> Exception:
    """The error, or one of the same words where it cannot travel to another process."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _started() -> bool:
    return distributed.is_available() and distributed.is_initialized()
