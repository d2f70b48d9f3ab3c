"""What test_obs_ranks runs once for each rank: python pruning_ranks.py RANK RANKS FOLDER."""

import sys
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from tersetorch.methods import prune

obs = sys.modules["tersetorch.methods.prune.obs"]
exact_obs = sys.modules["tersetorch.methods.prune.exact_obs"]


class Network(nn.Module):
    """Grouped convolutions, a ReLU in place that spoils what the layer before it was called with, and tied layers."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(4, 8, 3, padding=1, stride=2)
        self.conv2 = nn.Conv2d(8, 16, 3, groups=2)
        self.fc1 = nn.Linear(64, 12)
        self.fc2 = nn.Linear(12, 12)
        self.fc3 = nn.Linear(12, 12, bias=False)
        self.fc3.weight = self.fc2.weight

    def forward(self, x):
        x = self.conv2(self.conv1(x).relu())
        y = x.flatten(1)
        z = self.fc1(y)
        y.relu_()
        return self.fc3(self.fc2(z).relu()) + y[:, :12]


def network():
    torch.manual_seed(0)
    return Network()


def mlp(outputs=4):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, outputs))


def batches(count=5, shape=(4, 8, 8)):
    """Of different sizes, the last one smallest."""
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(shape[-1], shape[-1], generator=generator)
    return [torch.randn(12 - index, *shape, generator=generator) @ mix for index in range(count)]


ONE_PASS = {
    "layerwise": {"solver": "layerwise", "sparsity": 0.5},
    "exactobs": {"solver": "exactobs", "sparsity": {"*conv*": 0.5, "*fc*": 0.7}},
    "blocked": {"sparsity": 0.6, "bits": 3},
    "pattern": {"pattern": "2:4", "dtype": torch.float32},
}


def one_pass(arguments, model, data):
    """The state that pruning leaves, the notes, and the bytes of the moments that were kept at a time."""
    kept = []

    def counted(*given, **named):
        found = moments(*given, **named)
        kept.append(sum(each.hessian.nbytes for each in found.values()))
        return found

    moments, obs.moments_by_owner = obs.moments_by_owner, counted
    try:
        history = []
        prune.obs(model, iter(data), one_pass=True, history=history, **arguments)
    finally:
        obs.moments_by_owner = moments
    bare = model.module if isinstance(model, DistributedDataParallel) else model
    return bare.state_dict(), [vars(note) for note in history], kept[0]


def in_turn(solver, model, data):
    exact_obs.BATCH_BYTES = 3 * 20 * 20 * 8  # a few rows at a time
    return prune.obs(model, data, 0.5, solver=solver)


def refused(sentence, data, **arguments):
    """Every rank must get the sentence, and have the model as it was."""
    model = mlp()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        prune.obs(DistributedDataParallel(model), data, **{"sparsity": 0.5, **arguments})
    except (ValueError, RuntimeError, TypeError) as error:
        assert sentence in str(error), error
        noted = getattr(error, "__notes__", None)
    else:
        raise AssertionError(f"not refused: {sentence}")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return noted


def breaking(data):
    yield from data
    raise RuntimeError("the disk is gone")


def main():
    rank, ranks, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    meeting = f"file://{folder / 'meeting'}"
    distributed.init_process_group("gloo", meeting, timedelta(seconds=60), world_size=ranks, rank=rank)
    data = batches(shape=(20,))
    found = {"in turn": in_turn("blocked", DistributedDataParallel(mlp()), data[rank::ranks]).module.state_dict()}
    if rank == 0:  # a bare module asks nobody
        prune.obs(mlp(), data[:1], 0.5)
        prune.obs(mlp(), data[:1], 0.5, one_pass=True)
    for solver in ("exactobs", "layerwise"):  # rank 0 alone has data, so that H is one process's to the bit
        alone = data[:1] if rank == 0 else []
        found[solver] = in_turn(solver, DistributedDataParallel(mlp(5)), alone).module.state_dict()
    for case, arguments in ONE_PASS.items():
        found[f"one pass, {case}"] = one_pass(arguments, DistributedDataParallel(network()), batches()[rank::ranks])
    last = rank == ranks - 1
    spoilt = [batch.clone() for batch in data]
    spoilt[1][0, 0] = torch.nan if last else 0.0
    for one in (False, True):
        noted = refused("the disk is gone", breaking(data[:1]) if last else data, targets="*0", one_pass=one)
        assert noted == [f"on rank {ranks - 1}"]
        small, sentence = [torch.randn(5, 3)], "inputs of 20 weights each, got 3"
        refused(sentence, small if last else data, targets="*0", one_pass=one)
        refused("got NaN or infinity at the layer 'module.0'", spoilt, one_pass=one)
        assert refused("data must hold at least one batch, got none", [], one_pass=one) is None
        refused("damping must be a number", data, damping="x" if last else 0.1, one_pass=one)
        refused("must be positive definite", [torch.ones(5, 20)], damping=0, one_pass=one)
    refused("arguments must be the same on every rank, got others on rank", data, sparsity=0.4 + 0.1 * last)
    torch.save(found, folder / f"{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
