"""How the rows of binary networks train: the papers' loss and rates, and a file to go on from after any epoch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.progress import Progress
from torch import Tensor, nn

from tersetorch.methods import binarize

Method = Literal["float", "binary_connect", "bnn"]
# Epochs of one seed that could draw the same order of images as another seed's, if there were as many.
STRIDE = 1000


@dataclass(frozen=True)
class Variant:
    """One way to train a network.

    Attributes:
        words: what the table calls it.
        method: which weights and activations are signs in training.
        lr: Adam's rate at the first step, before the Glorot factors of binary weights.
        stochastic: signs are drawn in training: those of the weights of "binary_connect", of the activations of "bnn".
        shift: batch norm and AdaMax by shifts.
        keep: whether real values are kept below the signs; without them each step rounds what it makes of the signs to
            signs again.
        dropout: rate after hidden layers.
        input_dropout: rate of the inputs.
    """

    words: str
    method: Method
    lr: float
    stochastic: bool = False
    shift: bool = False
    keep: bool = True
    dropout: float = 0.0
    input_dropout: float = 0.0


@dataclass(frozen=True)
class Plan:
    """How every network of a row is trained.

    Attributes:
        variants: by the name of their test error in the record.
        epochs: passes over the images.
        batch_size: images a step.
        fall: the last step's rate over the first's; between them it falls exponentially.
        width: units or channels of the network.
        images: training images that are used; all of them when it is None.
    """

    variants: Mapping[str, Variant]
    epochs: int
    batch_size: int
    fall: float
    width: int
    images: int | None = None

    def described(self) -> dict[str, Any]:
        """As JSON can hold it."""
        found: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return found


class Checkpoint:
    """A file that keeps, for one seed of one plan, the rows of trained networks and the one that trains.

    Without a path nothing is kept.
    """

    def __init__(self, path: Path | None, plan: Plan) -> None:
        self._path = path
        self._kept: dict[str, Any] = {"plan": json.dumps(plan.described()), "rows": {}, "training": None}
        if path is not None and path.exists():
            found = torch.load(path, weights_only=True)
            if found["plan"] == self._kept["plan"]:
                self._kept = found

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        """What finish was told, by name."""
        rows: dict[str, dict[str, Any]] = self._kept["rows"]
        return rows

    def training(self, name: str) -> dict[str, Any] | None:
        """What keep was told last, if it was about this name."""
        found: dict[str, Any] | None = self._kept["training"]
        return found if found is not None and found["name"] == name else None

    def keep(self, name: str, **state: Any) -> None:
        """Stores how far the training of name is."""
        self._kept["training"] = {"name": name, **state}
        self._write()

    def finish(self, name: str, row: dict[str, Any]) -> None:
        """Stores the row of name, JSON-able."""
        self._kept["training"] = None
        self.rows[name] = row
        self._write()

    def remove(self) -> None:
        """The seed is done."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def _write(self) -> None:
        if self._path is not None:
            partial = self._path.with_name(self._path.name + ".partial")
            torch.save(self._kept, partial)
            partial.replace(self._path)


def train(
    model: nn.Module,
    name: str,
    plan: Plan,
    images: Tensor,
    labels: Tensor,
    seed: int,
    progress: Progress | None,
    checkpoint: Checkpoint,
) -> float | None:
    """Trains plan.variants[name] on the mean squared hinge loss, in place, from where checkpoint has it.

    Binary weights begin uniform in (-1, 1), as the authors' do; the order of images and what is drawn in training
    depend on the seed and the epoch alone, so that a training that was cut off ends as another.

    Returns:
        The part of the binary weights' signs that are not those which the training began with; None without any.
    """
    variant = plan.variants[name]
    handle = _binarized(model, variant, seed)
    originals = _originals(model, handle)
    first = [original.detach() >= 0 for original in originals]
    make: Any = binarize.ShiftAdaMax if variant.shift else torch.optim.Adam
    optimizer = make(model.parameters(), variant.lr, **({} if variant.shift else {"fused": True}))
    steps = len(images) // plan.batch_size
    begun = 0
    kept = checkpoint.training(name)
    if kept is not None:
        model.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
        begun = kept["epoch"]
        if handle is not None:
            handle.reset()
    task = None if progress is None else progress.add_task(variant.words, total=plan.epochs * steps)
    model.train()
    for epoch in range(begun, plan.epochs):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(STRIDE * seed + epoch)
            order = torch.randperm(len(images))
            for step in range(steps):
                for group in optimizer.param_groups:
                    group["lr"] = variant.lr * plan.fall ** ((epoch * steps + step) / max(1, plan.epochs * steps - 1))
                rows = order[step * plan.batch_size : (step + 1) * plan.batch_size]
                loss = binarize.squared_hinge(model(images[rows]), labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if handle is not None:
                    handle.step()
                if not variant.keep:
                    _round(originals)
                if progress is not None and task is not None:
                    progress.update(task, completed=epoch * steps + step + 1)
        checkpoint.keep(name, epoch=epoch + 1, model=model.state_dict(), optimizer=optimizer.state_dict())
    if handle is None:
        return None
    changed = sum(int((before != (original >= 0)).sum()) for before, original in zip(first, originals, strict=True))
    return changed / sum(original.numel() for original in originals)


def _binarized(model: nn.Module, variant: Variant, seed: int) -> binarize.BinaryConnect | None:
    if variant.method == "float":
        return None
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.uniform_(-1, 1)
    attach = binarize.bnn if variant.method == "bnn" else binarize.binary_connect
    handle = attach(model, stochastic=variant.stochastic)
    if not variant.keep:
        _round(_originals(model, handle))
        handle.reset()
    return handle


def _originals(model: nn.Module, handle: binarize.BinaryConnect | None) -> list[nn.Parameter]:
    """The values below the signs."""
    names = [] if handle is None else handle.names
    originals = [model.get_submodule(f"{name}.parametrizations.weight").original for name in names]
    return originals  # type: ignore[return-value]


@torch.no_grad()
def _round(originals: list[nn.Parameter]) -> None:
    """Leaves nothing below the signs but themselves."""
    for original in originals:
        original.copy_(binarize.sign(original))
