"""A whole compression: what is measured before, a recipe or a search within limits, the file, and its record."""

from __future__ import annotations

import copy
import hashlib
import math
import os
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from rich.progress import Progress
from torch import Tensor, nn

from tersetorch.methods import finalize, prune, quantize
from tersetorch.methods.arguments import check_choice, check_int, check_number
from tersetorch.methods.distributed import check_alike, failing_together
from tersetorch.methods.parametrization import release_graphs
from tersetorch.methods.prune.calibration import evaluating
from tersetorch.methods.selection import find_weights, select
from tersetorch.recipes.allocation import BudgetError
from tersetorch.recipes.bits import share_to_budget
from tersetorch.recipes.budget import SPARSITIES, BudgetReport, prune_to_budget
from tersetorch.recipes.calibrated import (
    calibrated_layers,
    check_calibrated,
    drawn_batches,
    prune_calibrated,
    share_calibrated,
)
from tersetorch.recipes.compression_record import CompressionRecord, Point, SensitivityCurves, record_path
from tersetorch.recipes.cost_curves import file_bytes
from tersetorch.recipes.deep_compression import (
    DeepCompressionRecipe,
    Stage,
    Train,
    Training,
    by_pattern,
    calibration_words,
    deep_compression,
    layer_values,
    pruned_layers,
    pruning_words,
    sharing_words,
)
from tersetorch.recipes.run_folder import RunFolder, fingerprint
from tersetorch.storage import save
from tersetorch.storage.arguments import target_of
from tersetorch.storage.streams import CODERS
from tersetorch.zoo import Dataset, error_rate, steps_per_epoch
from tersetorch.zoo.ranks import alike, everyone, from_rank_0

WHERE = "compress"
MAX_BITS = 8
ATTEMPTS = 6
# A sparsity at which shared weights' bytes are compared with plain ones', to split a budget between the two stages.
TYPICAL_SPARSITY = 0.8
ANY_DROP = 100.0
# What is left for a file to be smaller or larger than expected.
MARGIN = 0.97


@dataclass(frozen=True)
class PlannedLayer:
    """What a recipe does to a layer.

    Attributes:
        name: its path.
        weights: how many it has.
        sparsity: part that is pruned in the end; None where limits decide.
        bits: of its shared weights; None where they are not shared.
    """

    name: str
    weights: int
    sparsity: float | None
    bits: int | None


@dataclass(frozen=True)
class CompressionPlan:
    """What compress would do.

    Attributes:
        layers: all that it would change.
        untouched: the other weights of two or more dimensions, and how many numbers each has.
        trainings: words for each training, in order, and for each stage that goes without.
        dense_bytes: of the file that tersetorch.save writes of the model as it is.
        file_bytes: of the model pruned by magnitude and shared without training, near what comes of other methods and
            of training; None where limits decide.
    """

    layers: tuple[PlannedLayer, ...]
    untouched: dict[str, int]
    trainings: tuple[str, ...]
    dense_bytes: int
    file_bytes: int | None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for json.dumps."""
        return {**vars(self), "layers": [vars(layer) for layer in self.layers]}


def plan_compression(model: nn.Module, recipe: DeepCompressionRecipe, *, limited: bool = False) -> CompressionPlan:
    """What compress would do, without training: a copy is pruned and shared to see the file's size.

    Args:
        model: it is not changed.
        recipe: the plan.
        limited: a budget or a largest drop decides the sparsities.

    Raises:
        ValueError: a pattern of the recipe matches no layer.
    """
    release_graphs(model)
    sparsities = {} if recipe.prune is None else pruned_layers(model, recipe.prune)
    bits = {} if recipe.share is None else layer_values(model, "recipe.share.bits", recipe.share.bits)
    changed = {*sparsities, *bits, *(layer_values(model, "recipe.prune.sparsity", 0.0) if limited else ())}
    sizes = {target.name: target.weight.numel() for target in find_weights(model)}
    layers = tuple(
        PlannedLayer(name, size, None if limited else sparsities.get(name, 0.0), bits.get(name))
        for name, size in sizes.items()
        if name in changed
    )
    untouched = {name: size for name, size in sizes.items() if name not in changed}
    trainings = []
    if recipe.prune is not None:
        detail = f" ({words})" if (words := calibration_words(recipe.prune)) else ""
        words = f"{pruning_words(recipe.prune, detail)}, {_epochs(recipe.prune.train)}"
        trainings += [words] * (1 if limited else recipe.prune.rounds or 1)
        if limited:
            trainings[-1] += ", for each trial"
    if recipe.share is not None:
        trainings.append(f"{sharing_words(recipe)}, {_epochs(recipe.share.train)}")
    size = None
    if not limited:
        tried = copy.deepcopy(model)
        if recipe.prune is not None:
            prune.magnitude(tried, {**sparsities})
        if recipe.share is not None:
            quantize.kmeans(tried, by_pattern(recipe.share.bits), init=recipe.share.init)
        size = int(file_bytes(finalize(tried)).whole)
    return CompressionPlan(layers, untouched, tuple(trainings), int(file_bytes(model).whole), size)


@torch.no_grad()
def check_fit(model: nn.Module, data: Dataset, recipe: DeepCompressionRecipe | None = None) -> None:
    """Calls model with two of data's images, so that what does not fit together is said before hours of training.

    Args:
        model: it is not changed.
        data: what compress would train it on.
        recipe: the plan, where its sparsities are followed; with method "obs" they must be of layers that can be
            calibrated.

    Raises:
        ValueError: model does not take the images, does not give logits [N, classes] with one for each class of data,
            or recipe prunes layers that cannot be calibrated.
    """
    images = data.validation_images[:2]
    try:
        with evaluating(model):
            logits = model(images)
    except Exception as error:  # whatever the user's model raises
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(
            f"{WHERE}: model must take the images of {data.name}, {images.dtype} {tuple(images.shape)}, as its only "
            f"argument, got {reason}; pass examples that it takes, or a module that wraps it"
        ) from error
    if not isinstance(logits, Tensor) or logits.shape[:-1] != (len(images),) or not logits.is_floating_point():
        came = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise ValueError(
            f"{WHERE}: model must give one tensor of logits [N, classes] for N images, got {came} for {len(images)}; "
            "pass a module that wraps it"
        )
    if logits.shape[1] < data.classes:
        raise ValueError(
            f"{WHERE}: model must give logits for the {data.classes} classes of {data.name}, got {logits.shape[1]}; "
            "pass the data that it was trained on; losses other than cross-entropy over classes need "
            "tersetorch.prune and tersetorch.quantize in a loop of your own"
        )
    if recipe is not None and recipe.prune is not None and recipe.prune.method == "obs":
        check_calibrated(WHERE, model, pruned_layers(model, recipe.prune), [images])


def compress(
    model: nn.Module,
    recipe: DeepCompressionRecipe,
    data: Dataset,
    train: Train,
    *,
    path: str | os.PathLike[str],
    budget: int | None = None,
    max_drop: float | None = None,
    batch_size: int = 128,
    seed: int = 0,
    coders: Literal["smallest", "fast"] = "smallest",
    folder: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> CompressionRecord:
    """Compresses model in place by a recipe, stores it at path, and its record beside it.

    Without limits this is deep_compression, with the errors and sizes of the models on the way. With a budget or a
    largest drop, recipe.prune.sparsity is not followed: prune_to_budget finds the sparsities, with the method and the
    trainings of the recipe, and the bits of recipe.share are raised (at most to 8) while the drop is too large, or
    chosen by share_to_budget within the budget. Half of the drop is for pruning where weights are shared after it;
    where no sparsity that is tried keeps it, and no budget asks for one, nothing is pruned. Nothing is written where
    the limits cannot be kept.

    Where torch.distributed has started, every rank must call it with the same arguments: all start from rank 0's model,
    train shares out its batches as tersetorch.zoo.fit does, rank 0 alone measures and writes, and what it found decides
    on every rank. What fails on one rank is raised on all. The bytes are the same each time on as many ranks; what is
    trained on another number of them is rounded in another way.

    Args:
        model: a trained network that gives logits.
        recipe: the plan.
        data: train_images are for train and calibration; errors are counted on validation_images, which nobody trains
            on.
        train: as in deep_compression.
        path: the .terse file. The record goes to the same name with the suffix .record.json.
        budget: most bytes of the file.
        max_drop: most percentage points by which the error on held-out images may rise.
        batch_size: images a step of train, and of calibration where recipe.prune.method is "obs".
        seed: of train; draws the training images that are calibrated on, which are the first that it draws.
        coders: of the file, as tersetorch.save takes it.
        folder: where states are kept: the same call goes on from there after an interruption, and where there was a
            budget or max_drop, one with others from what each layer loses. Made where it is missing.
        progress: bars are added to it.

    Raises:
        TypeError: an argument has another type.
        ValueError: an argument is out of range, the limits cannot be kept, ranks were called with other layers, data or
            arguments, or as check_fit, deep_compression and prune_to_budget.
    """
    limited = budget is not None or max_drop is not None
    with failing_together(everyone()):
        check_choice(WHERE, "coders", coders, CODERS)
        if budget is not None:
            check_int(WHERE, "budget", budget, 1)
        if max_drop is not None:
            check_number(WHERE, "max_drop", max_drop, 0, 100)
        target = target_of(WHERE, path)
        target_of(WHERE, record_path(target))  # its name is longer
        check_fit(model, data, None if limited else recipe)
    if everyone() is not None:
        asked = (recipe.model_dump(), budget, max_drop, batch_size, seed, coders, folder is None)
        check_alike(WHERE, "arguments", asked, everyone())
        check_alike(WHERE, "data", _digest(data), everyone())
        alike(model)
    started = time.monotonic()

    def error(tried: nn.Module) -> float:
        return from_rank_0(lambda: 100 * error_rate(tried, data.validation_images, data.validation_labels))

    def point(label: str, tried: nn.Module) -> Point:
        return Point(label=label, file_bytes=_bytes(tried), error_percent=error(tried))

    calibration = None
    if recipe.prune is not None and recipe.prune.calibration is not None:
        calibration = drawn_batches(data.train_images, recipe.prune.calibration, batch_size, seed)
    kept = None if folder is None else Path(folder)
    settings = {
        "weights": fingerprint(model),
        "data": [[*shape, checksum] for shape, checksum in _digest(data)],
        "limited": limited,
        "recipe": recipe.model_dump(),
        "batch_size": batch_size,
        "seed": seed,
    }
    limits = {"budget": budget, "max_drop": max_drop}
    with RunFolder(WHERE, kept, settings, limits, restart=["points"], points=[], before=None) as run:
        if run.record["before"] is None:
            run.store(before=point("as it came", model).model_dump())
        before = Point(**run.record["before"])
        inner = None if kept is None else kept / "steps"

        def note(label: str, tried: nn.Module) -> Point:
            """Stores a model on the way; one that a resumed run meets again replaces itself."""
            found = point(label, tried)
            others = [old for old in run.record["points"] if old["label"] != label]
            run.store(points=[*others, found.model_dump()])
            return found

        sensitivity = None
        if not limited:

            def trained(tried: nn.Module, stage: Stage) -> None:
                train(tried, stage)
                if stage.round == stage.rounds:
                    note("pruned" if stage.name == "prune" else "shared", tried)

            steps = steps_per_epoch(len(data.train_images), batch_size)
            deep_compression(
                model, recipe, trained, calibration=calibration, steps_per_epoch=steps, folder=inner, progress=progress
            )
        else:
            search = _Limits(
                model, recipe, train, calibration or [], error, note, before, budget, max_drop, inner, progress
            )
            sensitivity = search.search()
        finalize(model)
        error_after = error(model)

        def written() -> CompressionRecord:
            save(model, target, coders=coders, progress=progress)
            record = CompressionRecord(
                data=data.name,
                examples=len(data.validation_labels),
                before=before,
                after=Point(label="in the file", file_bytes=target.stat().st_size, error_percent=error_after),
                points=[Point(**old) for old in run.record["points"]],
                sensitivity=sensitivity,
                recipe=recipe.model_dump(exclude_none=True),
                seconds=time.monotonic() - started,
                sha256=hashlib.sha256(target.read_bytes()).hexdigest(),
            )
            record.write(record_path(target))
            return record

        return from_rank_0(written)


def _digest(data: Dataset) -> list[tuple[tuple[int, ...], int]]:
    """What tells one set of examples from another, cheaply."""
    parts = (data.train_images, data.train_labels, data.validation_images, data.validation_labels)
    return [(tuple(part.shape), zlib.crc32(part.cpu().contiguous().view(torch.uint8).numpy().data)) for part in parts]


def _bytes(model: nn.Module) -> int:
    """Of the file of model once it is finalized, as rank 0 finds them."""
    release_graphs(model)
    return from_rank_0(lambda: int(file_bytes(finalize(copy.deepcopy(model))).whole))


class _Limits:
    """The search for sparsities and bits that keep a budget and a largest drop."""

    def __init__(
        self,
        model: nn.Module,
        recipe: DeepCompressionRecipe,
        train: Train,
        batches: Sequence[Tensor],
        error: Callable[[nn.Module], float],
        note: Callable[[str, nn.Module], Point],
        before: Point,
        budget: int | None,
        max_drop: float | None,
        folder: Path | None,
        progress: Progress | None,
    ) -> None:
        self.model, self.recipe, self.train, self.error, self.note = model, recipe, train, error, note
        self.batches = batches
        self.before, self.budget, self.folder, self.progress = before, budget, folder, progress
        self.max_drop = ANY_DROP if max_drop is None else max_drop
        if recipe.prune is None:
            raise ValueError(
                f"{WHERE}: recipe must have a stage prune where budget or max_drop is given, got none; add one"
            )
        self.prune = recipe.prune

    def search(self) -> SensitivityCurves | None:
        """Leaves model within the limits; what each layer loses at each sparsity."""
        pruned_budget = self._pruned_budget()
        release_graphs(self.model)
        plain = copy.deepcopy(self.model)
        sparsest = False
        for attempt in range(1, ATTEMPTS + 1):
            last = attempt == ATTEMPTS
            try:
                found = self._pruned(pruned_budget)
            except BudgetError as error:
                if self.recipe.share is None or last or pruned_budget is None or error.least <= pruned_budget:
                    raise self._too_small(error.least) from error
                # That budget was only expected to do: what the shared file takes is known once it is shared.
                pruned_budget, sparsest = error.least, True
                continue
            if self.recipe.share is None:
                break
            try:
                self._share()
                break
            except BudgetError as error:
                if last or sparsest or self.budget is None or pruned_budget is None:
                    raise self._too_small(error.least) from error
                # Less and less, and in the end whatever is the least.
                pruned_budget *= (MARGIN * self.budget / error.least) ** attempt if attempt < ATTEMPTS // 2 else 0
                _restore(self.model, plain)
        return SensitivityCurves(
            baseline=self.before.error_percent,
            layers={
                name: [(sparsity, 100 - found.baseline + loss) for sparsity, loss in sorted(curve.items())]
                for name, curve in found.losses.items()
            },
        )

    def _pruned(self, budget: float | None) -> BudgetReport:
        """Prunes to a budget, or to what may be lost alone."""
        # Sharing needs a part of what may be lost, where that has an end.
        part = 1.0 if self.recipe.share is None or self.max_drop == ANY_DROP else 0.5
        found = prune_to_budget(
            self.model,
            lambda tried: 100 - self.error(tried),
            max_drop=part * self.max_drop,
            budget=budget,
            method=self._prune if self.prune.method == "obs" else None,
            ignore=self._not_calibrated(),
            retrain=self._retrain,
            folder=self.folder,
            progress=self.progress,
        )
        trials = found.trials
        if found.sparsities is not None:
            if self.prune.dropout_rule:
                prune.rescale_dropout(self.model)
            self._keeps(self.note("pruned", self.model), share=self.recipe.share is not None)
        elif self.budget is not None or self.recipe.share is None:
            best = max(trials, key=lambda trial: trial.score)
            halved = part < 1 and self.max_drop > 0
            words = f", half of the {self.max_drop:g} that may be lost, before weights are shared" if halved else ""
            raise ValueError(
                f"{WHERE}: the error must not rise by more than {part * self.max_drop:g} points{words}, got "
                f"{best.score:.2f} % right of {found.baseline:.2f} % at the best of {_count(len(trials), 'trial')}; "
                "allow a larger drop or budget, or train longer"
            )
        # Else every sparsity that was tried lost too much: the model stays unpruned, and sharing has the whole drop.
        return found

    def _too_small(self, least: float) -> ValueError:
        shared = ", and shared" if self.recipe.share is not None else ""
        return ValueError(
            f"{WHERE}: budget must be at least about {math.ceil(least)} bytes, what the layers take at their "
            f"sparsest{shared}, got {self.budget}; raise it"
        )

    def _retrain(self, tried: nn.Module) -> None:
        if self.prune.dropout_rule:
            prune.rescale_dropout(tried)
        if self.prune.train is not None:
            self.train(tried, Stage("prune", 1, 1, self.prune.train, lambda: None))

    def _not_calibrated(self) -> list[str] | None:
        """Layers that the recipe's method cannot prune."""
        if self.prune.method == "magnitude":
            return None
        names = [target.name for target in select(WHERE, self.model, None, None)]
        found = calibrated_layers(self.model, names, self.batches)
        return [name for name in names if name not in found] or None

    def _prune(self, tried: nn.Module, sparsities: dict[str, float]) -> None:
        prune_calibrated(tried, sparsities, self.prune, self.batches, self.progress)

    def _pruned_budget(self) -> float | None:
        """Bytes that the pruned file may take so that the shared one can be expected to keep the budget.

        Raises:
            ValueError: no shared one can.
        """
        if self.budget is None or self.recipe.share is None:
            return self.budget
        release_graphs(self.model)
        sparsest = prune.magnitude(copy.deepcopy(self.model), SPARSITIES[-1], ignore=self._not_calibrated())
        shared = layer_values(sparsest, "recipe.share.bits", self.recipe.share.bits)
        quantize.kmeans(sparsest, dict.fromkeys(shared, 1))
        if (least := _bytes(sparsest)) > self.budget / MARGIN:
            raise self._too_small(least)
        tried = prune.magnitude(copy.deepcopy(self.model), TYPICAL_SPARSITY, ignore=self._not_calibrated())
        pruned = _bytes(tried)
        quantize.kmeans(tried, by_pattern(self.recipe.share.bits), init=self.recipe.share.init)
        return self.budget * pruned / _bytes(tried)

    def _share(self) -> None:
        """Shares at the recipe's bits, or more of them, or at what the budget pays."""
        assert self.recipe.share is not None
        by_obs, train = self.prune.method == "obs", self.recipe.share.train
        pruned = copy.deepcopy(self.model.state_dict())
        release_graphs(self.model)
        plain = copy.deepcopy(self.model)
        limit = self.budget
        reached = ""
        asked = layer_values(plain, "recipe.share.bits", self.recipe.share.bits)
        for attempt in range(ATTEMPTS if limit is not None else MAX_BITS):
            tried = copy.deepcopy(plain)
            if limit is None:
                widths = {name: min(width + attempt, MAX_BITS) for name, width in asked.items()}
                init = self.recipe.share.init
            else:
                widths = from_rank_0(partial(self._bits, plain, limit, list(asked)))
                init = "exact"
            if by_obs:
                share_calibrated(tried, widths, self.prune, self.batches, self.progress)
            else:
                quantize.kmeans(tried, {**widths}, init=init)
            if train is not None:
                self.train(tried, Stage("share", 1, 1, train, lambda: None))
            point = self.note("shared", tried)
            if self._fits(point):
                self.model.load_state_dict(pruned)
                quantize.kmeans(self.model, {**widths}, init=self.recipe.share.init)
                self.model.load_state_dict(tried.state_dict())
                return
            reached = f"{point.error_percent:.2f} % and {point.file_bytes} bytes"
            if limit is not None and self.budget is not None:
                if point.file_bytes <= self.budget:
                    break  # the drop is too large, and fewer bytes do not help
                # More than the excess: the next choice may miss by as much again.
                limit -= (point.file_bytes - self.budget) << attempt
            elif min(widths.values()) == MAX_BITS:
                break
        raise ValueError(
            f"{WHERE}: the file must keep {self._words()}, got {reached} at the best; allow more, or train longer"
        )

    def _bits(self, plain: nn.Module, limit: int, names: list[str]) -> dict[str, int]:
        return share_to_budget(copy.deepcopy(plain), nbytes=limit, targets=names, progress=self.progress).bits

    def _fits(self, point: Point) -> bool:
        small = self.budget is None or point.file_bytes <= self.budget
        return small and point.error_percent <= self.before.error_percent + self.max_drop

    def _keeps(self, point: Point, share: bool) -> None:
        if not share and not self._fits(point):
            raise ValueError(
                f"{WHERE}: the file must keep {self._words()}, got {point.error_percent:.2f} % and "
                f"{point.file_bytes} bytes; allow more, or train longer"
            )

    def _words(self) -> str:
        error = f"an error of at most {min(self.before.error_percent + self.max_drop, 100):.2f} %"
        return error if self.budget is None else f"{error} and {self.budget} bytes"


def _restore(model: nn.Module, plain: nn.Module) -> None:
    """Gives model the weights and rates that its copy has kept, and no masks."""
    finalize(model).load_state_dict(plain.state_dict())
    for module, kept in zip(model.modules(), plain.modules(), strict=True):
        if isinstance(module, nn.modules.dropout._DropoutNd) and isinstance(kept, nn.modules.dropout._DropoutNd):
            module.p = kept.p


def _epochs(training: Training | None) -> str:
    return "without training" if training is None else _count(training.epochs, "epoch")


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"
