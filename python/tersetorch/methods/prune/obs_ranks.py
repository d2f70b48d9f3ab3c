"""The rows of a layer shared out over ranks, where what is done to one row does not depend on the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Ranks:
    """Who does the work on a layer.

    Attributes:
        group: what they meet in; None where there is one.
        rank: this one's place.
        count: how many there are.
    """

    group: distributed.ProcessGroup | None = None
    rank: int = 0
    count: int = 1

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        """Those of a DistributedDataParallel; a bare module has one."""
        if not isinstance(model, DistributedDataParallel):
            return cls()
        group = model.process_group
        return cls(group, distributed.get_rank(group), distributed.get_world_size(group))

    def own(self, place: int) -> bool:
        """Whether this rank does the piece of work that comes at place."""
        return place % self.count == self.rank

    def of_rank_0(self, numbers: list[int], device: torch.device) -> list[int]:
        """The numbers that rank 0 calls this with; as many on every rank."""
        held = torch.tensor(numbers, device=device)
        if self.count > 1:
            distributed.broadcast(held, group=self.group, group_src=0)
        return [int(number) for number in held.tolist()]

    def merge(self, *parts: Tensor) -> None:
        """Gives every rank, in place, what each has filled in, where the others have left zeros."""
        if self.count > 1:
            for part in parts:
                distributed.all_reduce(part, group=self.group)


ALONE = Ranks()
