"""The same masks on every rank: what rank 0 decides counts.

The rule: a stepper, which every rank calls in every step of training, takes rank 0's masks. A function that is called
once (prune.magnitude, prune.iterative, quantize.kmeans) says nothing to other ranks, so that one rank may call it
alone, on a copy for instance; it decides from weights and arguments only, never from a global generator, and so alike
wherever the weights are alike, as DistributedDataParallel keeps them. Masks and codes are buffers and codebooks
parameters, which its constructor takes from rank 0 as well; it does not see a codebook that comes later, so share
weights before wrapping.
"""

from __future__ import annotations

from collections.abc import Sequence

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
    group = model.process_group if isinstance(model, DistributedDataParallel) else distributed.group.WORLD
    for device in dict.fromkeys(tensor.device for tensor in tensors):
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


def _started() -> bool:
    return distributed.is_available() and distributed.is_initialized()
