"""Work shared out over ranks: the rows of a layer, where one does not depend on the others, or whole layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from tersetorch.methods.distributed import gather


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

    def owners(self, sizes: Sequence[int]) -> list[int]:
        """A rank for each piece of work: the largest first, each to the rank that has least so far."""
        held, owners = [0] * self.count, [0] * len(sizes)
        for place in sorted(range(len(sizes)), key=lambda place: -sizes[place]):
            owners[place] = min(range(self.count), key=held.__getitem__)
            held[owners[place]] += sizes[place]
        return owners

    def each(self, value: Any) -> list[Any]:
        """The small value that each rank calls this with, in their order."""
        return gather(value, self.group)

    def send(self, tensor: Tensor, target: int) -> None:
        """Gives tensor to rank target, which calls receive."""
        distributed.send(_bytes(tensor.contiguous()), group=self.group, group_dst=target)

    def receive(self, tensor: Tensor, source: int) -> None:
        """Overwrites tensor, which is contiguous, with what rank source sends."""
        distributed.recv(_bytes(tensor), group=self.group, group_src=source)

    def of_owner(
        self, owner: int, note: Any, tensors: Sequence[Tensor], device: torch.device
    ) -> tuple[Any, list[Tensor]]:
        """The small note and the tensors that rank owner calls this with; what the others call it with is not read."""
        if self.count == 1:
            return note, list(tensors)
        head = [(note, [(tensor.shape, tensor.dtype) for tensor in tensors])]
        distributed.broadcast_object_list(head, group=self.group, group_src=owner)
        note, shapes = head[0]
        found = []
        for place, (shape, dtype) in enumerate(shapes):
            own = self.rank == owner
            tensor = tensors[place].contiguous() if own else torch.empty(shape, dtype=dtype, device=device)
            distributed.broadcast(_bytes(tensor), group=self.group, group_src=owner)
            found.append(tensor)
        return note, found


def _bytes(tensor: Tensor) -> Tensor:
    """The same memory, as what every backend knows."""
    return tensor.view(-1).view(torch.uint8)


ALONE = Ranks()
