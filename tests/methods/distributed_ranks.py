"""What test_distributed runs once for each rank: python distributed_ranks.py RANK RANKS FOLDER."""

import copy
import sys
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from tersetorch.methods import finalize, prune, quantize
from tersetorch.methods.distributed import take_from_rank_0
from tersetorch.methods.parametrization import live_weights


def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(20, 17), nn.ReLU(), nn.Linear(17, 5))


def train(model, rank, steps=4, after=lambda: None):
    """On other data in each rank; returns the loss that this rank saw last."""
    generator = torch.Generator().manual_seed(100 + rank)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(steps):
        loss = model(torch.randn(16, 20, generator=generator)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        after()
    return loss.detach()


def state(model):
    """Everything that is to be the same on every rank, of a bare model."""
    live = live_weights(model)
    held = {f"mask {index}": one.compressed.mask for index, one in enumerate(live)}
    held |= {f"codes {index}": one.compressed.codes for index, one in enumerate(live)}
    return {name: value.clone() for name, value in (held | model.state_dict()).items() if value is not None}


def magnitude(rank):
    ddp = DistributedDataParallel(network(rank))
    train(ddp, rank)
    prune.magnitude(ddp.module, 0.7)
    return train(ddp, rank), state(ddp.module)


def iterative(rank):
    ddp = DistributedDataParallel(network(rank))
    prune.iterative(ddp.module, [0.4, 0.7], lambda model, index: train(ddp, rank))
    return train(ddp, rank), state(ddp.module)


def gradual(rank):
    model = network(rank)  # weights that differ until the model is wrapped
    pruner = prune.GradualPruner(model, 0.7, begin_step=0, end_step=4, frequency=1, initial_sparsity=0.3)
    ddp = DistributedDataParallel(model)
    return train(ddp, rank, 6, pruner.step), state(model)


def gradual_unlike(rank):
    ddp = DistributedDataParallel(network(0), broadcast_buffers=False)
    final = {"0": 0.7 - 0.2 * rank, "2": 0.7}  # a rank that would decide otherwise
    pruner = prune.GradualPruner(ddp.module, final, begin_step=0, end_step=4, frequency=1)
    return train(ddp, rank, 4, pruner.step), state(ddp.module)


def surgery(rank):
    """Each rank has its own seed and threshold, so that it would draw and decide otherwise."""
    ddp = DistributedDataParallel(network(rank), broadcast_buffers=False)
    stepper = prune.DynamicSurgery(ddp.module, 0.3 + 0.4 * rank, biases=True, gamma=0.3, iter_stop=12, seed=rank)
    return train(ddp, rank, 15, stepper.step), state(ddp.module)


def kmeans(rank):
    model = network(rank)
    prune.magnitude(model, 0.5)
    train(DistributedDataParallel(model), rank)
    quantize.kmeans(model, 3, init="random", seed=5)
    ddp = DistributedDataParallel(model)
    return train(ddp, rank), state(model)


def each_on_its_own(rank):
    model = network(rank)
    pruner = prune.GradualPruner(model, 0.7, end_step=2, frequency=1, broadcast=False)
    loss = train(model, rank, 2, pruner.step)
    stepper = prune.DynamicSurgery(model, 0.3, gamma=0.0, broadcast=False)
    train(model, rank, 2 + rank, stepper.step)  # would wait for ever if it were collective
    return loss, state(model)


def a_group_of_each(rank):
    """The wrapper says which ranks belong together: here each is alone."""
    groups = [distributed.new_group([member]) for member in range(distributed.get_world_size())]
    ddp = DistributedDataParallel(network(rank), process_group=groups[rank])
    stepper = prune.DynamicSurgery(ddp, 0.3, gamma=0.0)
    return train(ddp, rank, 2 + rank, stepper.step), state(ddp.module)


def rank_0_alone(rank):
    model = network(0)
    if rank == 0:
        finalize(quantize.kmeans(prune.magnitude(copy.deepcopy(model), 0.5), 3))
    return train(model, rank), state(network(0))


def batch_norm(rank):
    """Unequal numbers of batches; what no batch reaches keeps its statistics."""
    model = nn.Sequential(network(0), nn.BatchNorm1d(5)).append(nn.Identity())
    model[2].unreached = nn.BatchNorm1d(3)
    alone, whole = copy.deepcopy(model), copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    data = [[torch.randn(16, 20, generator=generator) for _ in range(batches)] for batches in (1, 3)]
    ddp = DistributedDataParallel(model)
    assert prune.recalibrate_batch_norm(ddp, data[rank]) is ddp
    prune.recalibrate_batch_norm(whole, data[0] + data[1])
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value)
    prune.recalibrate_batch_norm(alone, data[rank])
    assert not torch.equal(alone[1].running_mean, model[1].running_mean)
    return torch.tensor(float(rank)), state(model)


def any_layout(rank):
    masks = [torch.rand(3, 4, 2, 5, generator=torch.Generator().manual_seed(rank)) < 0.5, torch.tensor(rank == 0)]
    masks[0] = masks[0].to(memory_format=torch.channels_last)
    expected = torch.rand(3, 4, 2, 5, generator=torch.Generator().manual_seed(0)) < 0.5
    take_from_rank_0(nn.Identity(), masks)
    assert torch.equal(masks[0], expected) and masks[0].is_contiguous(memory_format=torch.channels_last)
    return torch.tensor(float(rank)), {"0": masks[0], "1": masks[1]}


CASES = (
    magnitude,
    iterative,
    gradual,
    gradual_unlike,
    surgery,
    kmeans,
    each_on_its_own,
    a_group_of_each,
    rank_0_alone,
    batch_norm,
    any_layout,
)


def main():
    rank, ranks, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    meeting = f"file://{folder / 'meeting'}"
    distributed.init_process_group("gloo", meeting, timedelta(seconds=60), world_size=ranks, rank=rank)
    torch.save({case.__name__: case(rank) for case in CASES}, folder / f"{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
