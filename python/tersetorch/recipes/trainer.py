"""A recipe's trainings as the zoo's trainer does them."""

from __future__ import annotations

from rich.progress import Progress
from torch import nn

from tersetorch.recipes.deep_compression import Stage, Train
from tersetorch.zoo import Dataset, fit

WORDS = {"prune": "prune and retrain", "share": "share weights and train the shared values"}


def trainer(data: Dataset, *, batch_size: int, seed: int, progress: Progress | None = None) -> Train:
    """A train(model, stage) for deep_compression, on data.train_images.

    Args:
        data: as tersetorch.zoo.load gives it.
        batch_size: images a step.
        seed: of the batches' order and of dropout; the same in each training.
        progress: a bar for each training is added to it.
    """

    def train(model: nn.Module, stage: Stage) -> None:
        round_ = f", round {stage.round} of {stage.rounds}" if stage.rounds > 1 else ""
        fit(
            model,
            data.train_images,
            data.train_labels,
            **dict(stage.training),
            batch_size=batch_size,
            seed=seed,
            after_step=stage.after_step,
            progress=progress,
            description=WORDS[stage.name] + round_,
        )

    return train
