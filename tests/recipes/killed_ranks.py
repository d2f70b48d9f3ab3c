"""What test_ranks starts with torchrun: python killed_ranks.py FOLDER.

Rank 0 kills itself in the middle of the second training. When torchrun has started all ranks again, each also runs the
same without a folder, which nothing interrupts.
"""

import os
import signal
import sys
from pathlib import Path

import torch
from torch import distributed, nn

import tersetorch as tt
from tersetorch.zoo.ranks import rank, start

TRAINING = {"epochs": 2, "lr": 0.05}
RECIPE = {
    "prune": {"sparsity": 0.8, "rounds": 2, "train": TRAINING},
    "share": {"bits": 3, "train": TRAINING},
}


def network():
    torch.manual_seed(rank())  # rank 0's counts
    return nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Dropout(0.3), nn.Linear(30, 10))


def main():
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    assert start()
    started_again = os.environ["TORCHELASTIC_RESTART_COUNT"] != "0"
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(60, 20, generator=generator), torch.randint(0, 10, (60,), generator=generator)
    trained = []

    def train(model, stage):
        trained.append(f"{stage.name} {stage.round}")
        steps = 0

        def after_step():
            nonlocal steps
            stage.after_step()
            steps += 1
            if rank() == 0 and not started_again and stage.round == 2 and steps == 3:
                os.kill(os.getpid(), signal.SIGKILL)

        tt.zoo.fit(model, images, labels, **dict(stage.training), batch_size=15, after_step=after_step)

    model = tt.deep_compression(network(), RECIPE, train, path=folder / "model.terse", folder=folder / "run")
    resumed, trained = trained, []
    whole = tt.deep_compression(network(), RECIPE, train, path=folder / "whole.terse")
    torch.save((resumed, trained, model.state_dict(), whole.state_dict()), folder / f"{rank()}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
