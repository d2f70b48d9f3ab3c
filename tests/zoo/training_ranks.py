"""What test_ranks runs once for each rank: python training_ranks.py RANK RANKS FOLDER."""

import sys
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from tersetorch.methods import binarize, prune, quantize
from tersetorch.methods.parametrization import live_weights
from tersetorch.zoo import fit
from tersetorch.zoo.ranks import alike, from_rank_0, rank, ranks


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


class Breaking(Network):
    """As the other, but for one step."""

    def forward(self, x):
        raise RuntimeError("no memory left")


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


def phases(seed):
    """What a recipe and its relatives decide one after the other; masks, codes and codebooks after each."""
    model, found = network(seed), {}
    settings = {"epochs": 1, "batch_size": 7, "lr": 0.05}

    def note(phase):
        for index, live in enumerate(live_weights(model)):
            held = live.compressed
            parts = {"mask": held.mask, "codes": held.codes, "codebook": held.codebook, "weight": live.original}
            found.update({f"{phase}, {name} {index}": part for name, part in parts.items() if part is not None})
        found.update({name: value.clone() for name, value in found.items() if name.startswith(phase)})

    alike(model)
    prune.magnitude(model, 0.3)
    note("magnitude")
    fit(model, *problem(), **settings)
    surgery = prune.DynamicSurgery(model, 0.5, gamma=0.3, iter_stop=5, seed=rank())
    fit(model, *problem(), **settings, after_step=surgery.step)
    note("surgery")
    prune.magnitude(model, 0.6)
    fit(model, *problem(), **settings)
    note("pruned again")
    quantize.kmeans(model, 2, init="random", seed=3)
    note("shared")
    fit(model, *problem(), **settings, optimizer="adam")
    note("trained values")
    return found


def binary(seed):
    """Stochastic signs: each rank draws its own, and the values below them stay alike."""
    model = alike_network(seed)
    connected = binarize.binary_connect(model, targets=["body.*"], stochastic=True)
    fit(model, *problem(), epochs=1, batch_size=7, optimizer="adam", lr=0.01, after_step=connected.step)
    return model


def binary_activations(seed):
    model = alike_network(seed)
    model.body.insert(1, nn.BatchNorm1d(8))
    connected = binarize.bnn(model.body, stochastic=True)
    fit(model, *problem(), epochs=1, batch_size=7, optimizer="adam", lr=0.01, after_step=connected.step)
    return model


def fixed(seed):
    """Weights are rounded at random after each step, with the same bits everywhere."""
    model = alike_network(seed)
    quantize.fixed_point(model, "<3,8>", targets=["body.*"], seed=5)
    return fit(model, *problem(), epochs=2, batch_size=7)


def alike_network(seed):
    model = network(seed)
    alike(model)
    return model


def refused(work, sentence):
    try:
        work()
    except (ValueError, RuntimeError, TypeError, IndexError) as error:
        assert sentence in str(error), error
        return getattr(error, "__notes__", None)
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
    last = place == count - 1
    images, labels = problem()
    refused(lambda: from_rank_0(fail), "rank 0 says no")
    refused(
        lambda: fit(network(0), images, labels, epochs=1, batch_size=1),
        f"a batch must hold an image for each of the {count} ranks",
    )
    spoilt = images.clone()
    spoilt[24:] = torch.inf if place else 1.0  # one rank alone sees it
    refused(lambda: fit(network(0), spoilt, labels, epochs=1), "the loss must stay finite")
    # What is wrong on one rank ends all, which would wait for each other otherwise.
    noted = refused(lambda: fit(network(0), images, labels, epochs=-1 if last else 1), "epochs must be at least 0")
    assert noted == [f"on rank {count - 1}"]
    noted = refused(lambda: fit(Breaking() if last else network(0), images, labels, epochs=1), "no memory left")
    assert noted == [f"on rank {count - 1}"]
    asked = {"epochs": 1, "lr": 0.1 + last}
    refused(lambda: fit(network(0), images, labels, **asked), "fit: labels and arguments must be the same on every")
    refused(lambda: fit(network(0), images, labels.roll(place), epochs=1), "labels and arguments must be the same")
    larger = nn.Sequential(nn.Linear(4, 8 + last), nn.Linear(8 + last, 3))
    refused(
        lambda: fit(larger, images, labels, epochs=1),
        f"layers must be the same on every rank, got others on rank {count - 1}",
    )
    states = {case.__name__: case(place).state_dict() for case in (pruned, noisy, wrapped, binary, binary_activations)}
    states |= {"fixed": fixed(place).state_dict(), "phases": phases(place)}
    torch.save(states, folder / f"{place}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
