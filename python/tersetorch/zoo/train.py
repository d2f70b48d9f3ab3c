"""The small trainer of the demo and the reproductions: whole data set in memory, batches by index."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Literal, get_args

import torch
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from tersetorch.methods.distributed import check_alike, failing_together
from tersetorch.zoo.checks import check_count, check_seed
from tersetorch.zoo.ranks import add_up, alike, everyone, rank, ranks

OptimizerName = Literal["sgd", "adam"]
Schedule = Literal["cosine", "constant"]

EVALUATION_BATCH = 1000
SEED_STEP = 0x9E3779B97F4A7C15  # far from any seed that a person or a loop would count to


def steps_per_epoch(images: int, batch_size: int = 128) -> int:
    """Optimizer steps that fit takes in one epoch: whole batches only, one smaller batch when there is no whole one.

    Raises:
        TypeError, ValueError: images or batch_size is not an int of at least 1.
    """
    check_count("steps_per_epoch", "images", images)
    check_count("steps_per_epoch", "batch_size", batch_size)
    return max(1, images // batch_size)


def fit(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    epochs: int,
    batch_size: int = 128,
    lr: float = 0.1,
    optimizer: OptimizerName = "sgd",
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    l1_penalty: float = 0.0,
    schedule: Schedule = "cosine",
    input_dropout: float = 0.0,
    seed: int = 0,
    after_step: Callable[[], object] | None = None,
    progress: Progress | None = None,
    description: str = "training",
) -> nn.Module:
    """Trains model in place on the mean cross-entropy and returns it.

    Each epoch visits the images once in a fresh order; what is left of the last whole batch waits for the next epoch.
    Parameters that do not require gradients stay as they are. The same seed on the same machine with the same number
    of threads gives the same weights; torch's global generator is left as it was found.

    Where torch.distributed has started, every rank must call it with the same arguments. All start from rank 0's
    parameters and buffers, each takes its part of every batch, and the gradients are added up, so that all end with the
    same bits. One process gets the same up to rounding, but for dropout, which each rank draws for itself, and batch
    norm, which sees a rank's part alone and ends with rank 0's statistics. What fails on one rank is raised on all. A
    DistributedDataParallel does its own averaging: each rank trains it on whole batches of the images it was called
    with.

    Args:
        model: gives logits [N, classes] for images.
        images: [N, ...], what model takes.
        labels: int64 [N].
        epochs: passes over the images; 0 does nothing.
        batch_size: images a step.
        lr: learning rate, at the start when schedule is "cosine".
        optimizer: "sgd" (with Nesterov's momentum where momentum > 0) or "adam" (decoupled weight decay).
        momentum: of "sgd", in [0, 1).
        weight_decay: factor of the L2 penalty on tensors of two or more dimensions; biases are not decayed.
        l1_penalty: factor of the L1 penalty on the same tensors, part of the loss: its gradient is sign(w).
        schedule: "cosine" lets lr fall to 0 at the last step; "constant" keeps it.
        input_dropout: part of the input values that each step sets to zero, the others scaled up, in [0, 1).
        seed: draws the order of the images and what the model draws (dropout).
        after_step: called after every optimizer step, such as GradualPruner.step.
        progress: a bar for this training is added to it.
        description: words beside that bar.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is outside its range, no parameter trains, there are more ranks than images in a batch,
            they were called with other arguments or layers, or the loss is no longer finite.

    Source:
        Loshchilov and Hutter, SGDR (2017), equation 5 without restarts, and Decoupled weight decay (2019).
    """
    parts = 1 if isinstance(model, DistributedDataParallel) else ranks()
    together = everyone() if parts > 1 else None
    with failing_together(together):
        fractions = {"weight_decay": weight_decay, "l1_penalty": l1_penalty, "input_dropout": input_dropout}
        _check_fit(model, images, labels, epochs, batch_size, lr, optimizer, momentum, schedule, fractions)
        check_seed("fit", seed)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not trained:
            raise ValueError("fit: model must have a parameter that requires gradients, got none; unfreeze one")
        if parts > min(batch_size, len(images)):
            raise ValueError(
                f"fit: a batch must hold an image for each of the {parts} ranks, got {min(batch_size, len(images))}; "
                "raise batch_size or start fewer"
            )
    if parts > 1:
        drawn = (len(images), hashlib.sha256(labels.cpu().numpy().tobytes()).hexdigest())
        asked = (epochs, batch_size, lr, optimizer, momentum, schedule, fractions, seed)
        check_alike("fit", "labels and arguments", (drawn, asked, len(trained)), together)
        alike(model)
    decayed = [parameter for parameter in trained if parameter.ndim > 1]
    plain = [parameter for parameter in trained if parameter.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    stepper: torch.optim.Optimizer
    if optimizer == "sgd":
        stepper = torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=momentum > 0, foreach=True)
    else:
        stepper = torch.optim.AdamW(groups, lr=lr, foreach=True)

    batches = steps_per_epoch(len(images), batch_size)
    task = None if progress is None else progress.add_task(description, total=epochs * batches)
    training = model.training
    model.train()
    order = torch.Generator().manual_seed(seed)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed if parts == 1 else (seed + rank() * SEED_STEP) % 2**63)
            for epoch in range(epochs):
                shuffled = torch.randperm(len(images), generator=order)
                for batch in range(batches):
                    if schedule == "cosine":
                        part = (epoch * batches + batch) / (epochs * batches)
                        for group in stepper.param_groups:
                            group["lr"] = lr * (1 + math.cos(math.pi * part)) / 2
                    rows = shuffled[batch * batch_size : (batch + 1) * batch_size]
                    stepper.zero_grad()
                    if parts == 1:
                        loss = _loss(model, images[rows], labels[rows], input_dropout)
                        loss.backward()
                    else:
                        own = rows.tensor_split(parts)[rank()]
                        found, error = None, None
                        try:
                            found = _loss(model, images[own], labels[own], input_dropout) * (len(own) / len(rows))
                            found.backward()
                        except Exception as problem:
                            error = problem
                        loss = add_up(trained, found, error)
                    if l1_penalty:
                        for parameter in decayed:
                            if parameter.grad is not None:
                                parameter.grad.add_(parameter.detach().sign(), alpha=l1_penalty)
                    stepper.step()
                    if after_step is not None:
                        after_step()
                    if progress is not None and task is not None:
                        progress.advance(task)
                if not math.isfinite(loss.item()):
                    raise ValueError(
                        f"fit: the loss must stay finite, got {loss.item()} in epoch {epoch + 1}; lower lr={lr}"
                    )
        if parts > 1:
            alike(model)
    finally:
        model.train(training)
    return model


def _loss(model: nn.Module, images: Tensor, labels: Tensor, input_dropout: float) -> Tensor:
    x = functional.dropout(images, input_dropout) if input_dropout else images
    return functional.cross_entropy(model(x), labels)


@torch.no_grad()
def error_rate(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Part of the images, in [0, 1], whose largest logit is not their label's; model is evaluated in eval mode.

    Raises:
        TypeError: model is no module, or images or labels is no tensor.
        ValueError: images and labels differ in number, or there are none.
    """
    _check_pair("error_rate", model, images, labels)
    training = model.training
    model.eval()
    try:
        wrong = sum(
            int((model(some).argmax(1) != wanted).sum())
            for some, wanted in zip(images.split(EVALUATION_BATCH), labels.split(EVALUATION_BATCH), strict=True)
        )
    finally:
        model.train(training)
    return wrong / len(labels)


def _check_pair(where: str, model: nn.Module, images: Tensor, labels: Tensor) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{where}: model must be a torch.nn.Module, got {type(model).__name__}; pass a network")
    for name, tensor in (("images", images), ("labels", labels)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{where}: {name} must be a tensor, got {type(tensor).__name__}; call torch.as_tensor")
    if labels.dtype != torch.int64 or labels.ndim != 1:
        raise ValueError(
            f"{where}: labels must be int64 [N], got {labels.dtype} {tuple(labels.shape)}; pass class numbers"
        )
    if images.ndim < 1 or len(images) != len(labels) or not len(labels):
        raise ValueError(
            f"{where}: images must be as many as labels and at least one, got shapes {tuple(images.shape)} and "
            f"{tuple(labels.shape)}; pass one label for each image"
        )


def _check_fit(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    epochs: int,
    batch_size: int,
    lr: float,
    optimizer: str,
    momentum: float,
    schedule: str,
    fractions: Mapping[str, float],
) -> None:
    _check_pair("fit", model, images, labels)
    check_count("fit", "epochs", epochs, least=0)
    check_count("fit", "batch_size", batch_size)
    numbers = [("lr", lr, math.inf), ("momentum", momentum, 1), *((*each, 1) for each in fractions.items())]
    for name, value, upper in numbers:
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise TypeError(f"fit: {name} must be a number, got {value!r}; pass a float")
        if not 0 <= value < upper:
            raise ValueError(f"fit: {name} must be in [0, {upper}), got {value}; pass a number in that range")
    for name, choice, choices in (
        ("optimizer", optimizer, get_args(OptimizerName)),
        ("schedule", schedule, get_args(Schedule)),
    ):
        if choice not in choices:
            raise ValueError(f"fit: {name} must be one of {', '.join(choices)}, got {choice!r}; pass one of these")
