"""What test_ranks starts with torchrun: python searching_ranks.py FOLDER.

Each rank would measure other times and scores than rank 0.
"""

import sys
from pathlib import Path

import torch
from torch import distributed, nn

import tersetorch as tt
from tersetorch.recipes import budget
from tersetorch.recipes.cost_curves import CostCurves
from tersetorch.zoo.ranks import from_rank_0, rank, start


def measured(model, targets, grid, *_):
    """Times of rank 0 alone: a half, and for each layer what is left of it."""
    assert rank() == 0
    return CostCurves(0.5, {target.name: {sparsity: 1 - sparsity for sparsity in grid} for target in targets})


def main():
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    assert start()
    budget.cost_curves = measured
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(64, 20, generator=generator)
    torch.manual_seed(rank())  # rank 0's counts
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 10))
    dense = from_rank_0(lambda: model.state_dict())
    wanted = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 10))
    wanted.load_state_dict(dense)
    labels = wanted(images).argmax(1)

    def score(tried):
        return 1 - tt.zoo.error_rate(tried, images, labels) - 0.3 * torch.rand(()).item() * rank()

    def retrain(tried):
        tt.zoo.fit(tried, images, labels, epochs=10, batch_size=16, lr=0.05)

    asked = {"max_drop": 0.4, "unit": "milliseconds", "example_inputs": images[:1], "retrain": retrain, "trials": 4}
    found = tt.prune_to_budget(model, score, **asked, folder=folder / "run")
    again = tt.prune_to_budget(wanted, score, **asked, folder=folder / "run")  # from the folder, without a training
    assert found.to_dict() == again.to_dict() and found.chosen is not None

    def broken(tried):
        if rank() == 1:
            raise ValueError("no data here")
        return 1.0

    try:
        tt.prune_to_budget(nn.Linear(3, 2), broken, max_drop=1.0)
    except ValueError as error:
        assert str(error) == "no data here" and error.__notes__ == ["on rank 1"]
    else:
        raise AssertionError("not refused")
    try:
        tt.prune_to_budget(nn.Linear(3, 2), lambda tried: 1.0, max_drop=0.1 + rank())
    except ValueError as error:
        assert "prune_to_budget: layers and arguments must be the same on every rank" in str(error)
    else:
        raise AssertionError("not refused")
    torch.save((found.to_dict(), model.state_dict(), wanted.state_dict()), folder / f"{rank()}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
