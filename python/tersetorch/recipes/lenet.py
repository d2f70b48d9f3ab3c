"""LeNet-300-100 trained and compressed: the plan that the demo shortens and the reproduction runs in full."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from rich.progress import Progress
from torch import nn

from tersetorch.recipes.deep_compression import (
    DeepCompressionRecipe,
    PruneStage,
    ShareStage,
    Training,
    deep_compression,
)
from tersetorch.recipes.trainer import trainer
from tersetorch.zoo import Dataset, LeNet300100, fit, steps_per_epoch

# Fewer images than this and a whole batch of MNIST's size would leave too few steps in an epoch.
SMALL_SET = 10_000
Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class LeNetPlan:
    """How a LeNet is trained and compressed.

    Attributes:
        batch_size: images a step, in every training.
        dropout: rate after each hidden layer; retraining scales it by the paper's rule.
        dense: the training of the dense network.
        recipe: how it is compressed.
    """

    batch_size: int
    dropout: float
    dense: Training
    recipe: DeepCompressionRecipe


def full_plan() -> LeNetPlan:
    """The plan behind the reproduction: chosen on held-out training images of MNIST."""
    return _plan(batch_size=128, dense=40, ramp=25, prune=50, share=12, kept=(0.08, 0.09, 0.3))


def quick_plan(data: Dataset) -> LeNetPlan:
    """A shorter plan, a minute or two of one core; small data sets get smaller batches and more epochs."""
    if len(data.train_images) < SMALL_SET:
        return _plan(batch_size=32, dense=40, ramp=40, prune=80, share=20, kept=(0.1, 0.1, 0.3))
    return _plan(batch_size=128, dense=12, ramp=8, prune=18, share=5, kept=(0.06, 0.08, 0.3))


def _plan(
    *, batch_size: int, dense: int, ramp: int, prune: int, share: int, kept: tuple[float, float, float]
) -> LeNetPlan:
    sparsity = {name: round(1 - part, 4) for name, part in zip(("fc1", "fc2", "fc3"), kept, strict=True)}
    retrain = Training(epochs=prune, lr=0.1, weight_decay=1e-4, input_dropout=0.2)
    return LeNetPlan(
        batch_size=batch_size,
        dropout=0.3,
        dense=Training(epochs=dense, lr=0.1, weight_decay=5e-5, input_dropout=0.1),
        recipe=DeepCompressionRecipe(
            prune=PruneStage(sparsity=sparsity, ramp_epochs=ramp, train=retrain),
            share=ShareStage(bits=4, train=Training(epochs=share, lr=5e-4, optimizer="adam")),
        ),
    )


def train_lenet(data: Dataset, plan: LeNetPlan, *, seed: int = 0, progress: Progress | None = None) -> LeNet300100:
    """A dense LeNet-300-100 trained on data.train_images; seed draws its weights and its batches."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LeNet300100(data.in_features, data.classes, plan.dropout)
    fit(
        model,
        data.train_images,
        data.train_labels,
        **dict(plan.dense),
        batch_size=plan.batch_size,
        seed=seed,
        progress=progress,
        description="train the dense network",
    )
    return model


def compress_lenet(
    model: Network,
    data: Dataset,
    plan: LeNetPlan,
    *,
    seed: int = 0,
    progress: Progress | None = None,
    folder: Path | None = None,
) -> Network:
    """Prunes and shares a network by plan, in place, retraining on data.train_images; returns it live.

    Where it is stopped, the same call with the same folder goes on, as deep_compression does.
    """
    train = trainer(data, batch_size=plan.batch_size, seed=seed + 1, progress=progress)
    steps = steps_per_epoch(len(data.train_images), plan.batch_size)
    deep_compression(model, plan.recipe, train, steps_per_epoch=steps, folder=folder)
    return model
