"""What test_ranks runs once for each rank: python training_ranks.py RANK RANKS FOLDER."""

import sys
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from tersetorch.methods import prune
from tersetorch.zoo import fit
from tersetorch.zoo.ranks import from_rank_0, rank, ranks


class Network(nn.Module):
    """With a layer that nothing reaches, whose weights an optimizer is to leave alone."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 3))
        self.unused = nn.Linear(2, 2)

    def forward(self, x):
        return self.body(x)


def problem():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(50, 4, generator=generator)
    return images, (images @ torch.randn(4, 3, generator=generator)).argmax(1)


def network(seed, dropout=0.0):
    torch.manual_seed(seed)
    return Network(dropout)


def pruned(seed):
    """Batches of 7, which two ranks cannot halve, and two optimizers."""
    model = network(seed)
    pruner = prune.GradualPruner(model, 0.5, end_step=8, frequency=2, targets=["body.*"])
    penalties = {"weight_decay": 0.01, "l1_penalty": 0.001}
    fit(model, *problem(), epochs=2, batch_size=7, **penalties, after_step=pruner.step)
    fit(model, *problem(), epochs=1, batch_size=7, lr=0.01, optimizer="adam", weight_decay=0.1)
    return model


def noisy(seed):
    model = nn.Sequential(network(seed, dropout=0.5), nn.BatchNorm1d(3))
    return fit(model, *problem(), epochs=2, batch_size=10, input_dropout=0.2)


def wrapped(seed):
    ddp = DistributedDataParallel(network(seed).body)
    images, labels = problem()
    fit(ddp, images[rank() :: ranks()], labels[rank() :: ranks()], epochs=1, batch_size=5)
    return ddp.module


def refused(work, sentence):
    try:
        work()
    except ValueError as error:
        assert sentence in str(error), error
    else:
        raise AssertionError(f"not refused: {sentence}")


def fail():
    assert rank() == 0
    raise ValueError("rank 0 says no")


def main():
    place, count, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    meeting = f"file://{folder / 'meeting'}"
    distributed.init_process_group("gloo", meeting, timedelta(seconds=60), world_size=count, rank=place)
    assert from_rank_0(rank) == 0
    refused(lambda: from_rank_0(fail), "rank 0 says no")
    refused(
        lambda: fit(network(0), *problem(), epochs=1, batch_size=1),
        "a batch must hold an image for each of the 2 ranks",
    )
    spoilt = problem()[0]
    spoilt[24:] = torch.inf if place else 1.0  # one rank alone sees it
    refused(lambda: fit(network(0), spoilt, problem()[1], epochs=1), "the loss must stay finite")
    states = {case.__name__: case(place).state_dict() for case in (pruned, noisy, wrapped)}
    torch.save(states, folder / f"{place}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
