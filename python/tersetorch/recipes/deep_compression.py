"""Deep Compression as one plan: prune and retrain, share weights and train the shared values."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import nn

from tersetorch.methods import prune, quantize
from tersetorch.methods.selection import Pattern, assign, select

Fraction = Annotated[float, Field(ge=0, lt=1)]
Bits = Annotated[int, Field(ge=1, le=8)]
Epochs = Annotated[int, Field(ge=0)]
Value = TypeVar("Value", int, float)


class _Plan(BaseModel):
    # Strict: "0.9" or True in a YAML file is a slip, not a number.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Training(_Plan):
    """What a stage asks of train(model, stage); fit of tersetorch.zoo takes the same words.

    Attributes:
        epochs: passes over the training images.
        lr: learning rate at the start.
        weight_decay: factor of the L2 penalty.
        l1_penalty: factor of the L1 penalty.
        optimizer: "sgd" or "adam".
        input_dropout: part of the input values that each step sets to zero.
    """

    epochs: Epochs
    lr: Annotated[float, Field(gt=0)]
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    l1_penalty: Annotated[float, Field(ge=0)] = 0.0
    optimizer: Literal["sgd", "adam"] = "sgd"
    input_dropout: Fraction = 0.0


class PruneStage(_Plan):
    """Which weights go, and how fast.

    Attributes:
        sparsity: part of each layer's weights to prune, one number for all layers or one for each name or pattern.
        rounds: prune to a larger part `rounds` times, retraining after each (Han et al.); the part after round r of R
            is sparsity * (1 - (1 - r / R)^3). Left out when ramp_epochs is given.
        ramp_epochs: prune while training, along the same curve, for this many epochs of one training (Zhu and Gupta);
            the rest of its epochs retrain what is left.
        frequency: optimizer steps from one pruning to the next during the ramp.
        dropout_rule: scale dropout by the square root of the connections kept (Han et al. 2015, section 3.2).
        train: the training of each round, or of the whole ramp.
    """

    sparsity: Fraction | dict[str, Fraction]
    rounds: Annotated[int, Field(ge=1)] | None = None
    ramp_epochs: Annotated[int, Field(ge=1)] | None = None
    frequency: Annotated[int, Field(ge=1)] = 25
    dropout_rule: bool = True
    train: Training

    @model_validator(mode="after")
    def _one_schedule(self) -> Self:
        if (self.rounds is None) == (self.ramp_epochs is None):
            raise ValueError("exactly one of rounds and ramp_epochs must be given")
        if self.ramp_epochs is not None and self.ramp_epochs > self.train.epochs:
            raise ValueError(f"ramp_epochs must be at most train.epochs = {self.train.epochs}, got {self.ramp_epochs}")
        return self


class ShareStage(_Plan):
    """How many values a layer's weights share.

    Attributes:
        bits: 2^bits values a layer, zero among them; one number for all layers or one for each name or pattern.
        init: how the values start, as in quantize.kmeans.
        train: the training of the shared values.
    """

    bits: Bits | dict[str, Bits]
    init: Literal["exact", "linear", "density", "random"] = "exact"
    train: Training


class DeepCompressionRecipe(_Plan):
    """The plan of deep_compression; a stage that is left out is not done.

    Attributes:
        prune: what to prune and how.
        share: how to share weights.
    """

    prune: PruneStage | None = None
    share: ShareStage | None = None

    @model_validator(mode="after")
    def _some_stage(self) -> Self:
        if self.prune is None and self.share is None:
            raise ValueError("at least one of prune and share must be given")
        return self

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str]) -> Self:
        """Reads a recipe from a YAML file.

        Raises:
            ValueError: the file is no YAML, or no recipe; the message names what is wrong where.
            FileNotFoundError: there is no such file.
        """
        try:
            plan = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"DeepCompressionRecipe: {path} must be YAML, got {error}; mend the file") from error
        return cls.from_mapping(plan)

    @classmethod
    def from_mapping(cls, plan: Mapping[str, Any]) -> Self:
        """The recipe with these fields.

        Raises:
            ValueError: plan is no recipe; the message names what is wrong where.
        """
        try:
            return cls.model_validate(plan)
        except ValidationError as error:
            wrong = "; ".join(
                f"{'.'.join(map(str, problem['loc'])) or 'recipe'}: {problem['msg']}, got {problem['input']!r}"
                for problem in error.errors()
            )
            raise ValueError(
                f"DeepCompressionRecipe: recipe must have valid fields, got {wrong}; mend them there"
            ) from error

    def to_yaml(self) -> str:
        """The recipe as YAML that from_yaml reads back."""
        return yaml.safe_dump(self.model_dump(exclude_none=True), sort_keys=False)


@dataclass(frozen=True)
class Stage:
    """What train(model, stage) is to do.

    Attributes:
        name: "prune" or "share".
        round: which round of the stage this is, from 1.
        rounds: how many rounds it has.
        training: what the recipe asks for; fit(model, images, labels, **dict(stage.training)) does it.
        after_step: to be called after every optimizer step.
    """

    name: Literal["prune", "share"]
    round: int
    rounds: int
    training: Training
    after_step: Callable[[], None]


Train = Callable[[nn.Module, Stage], object]


def deep_compression(
    model: nn.Module,
    recipe: DeepCompressionRecipe | Mapping[str, Any] | str | os.PathLike[str],
    train: Train,
    *,
    steps_per_epoch: int | None = None,
) -> nn.Module:
    """Prunes model and shares its weights by the recipe, in place; returns it with its parametrizations live.

    After each pruning and after sharing, train(model, stage) retrains what is left; it trains the parameters of model
    that require gradients, with an optimizer of its own, and calls stage.after_step() after every step. The third
    stage of the paper, entropy coding, is tersetorch.storage.save's.

    Args:
        model: a trained network.
        recipe: the plan, a mapping with its fields, or the path of a YAML file.
        train: retrains model in place; what it returns is not looked at.
        steps_per_epoch: optimizer steps that train takes in an epoch; needed when recipe.prune.ramp_epochs is given.

    Raises:
        TypeError: model is no module, recipe is no recipe, or train cannot be called.
        ValueError: the recipe is not valid, a pattern matches no layer, steps_per_epoch is missing or not positive,
            or train did not call stage.after_step() often enough for the ramp to end.
        FileNotFoundError: recipe names no file.

    Source:
        Han, Mao, Dally, Deep Compression (2016), sections 2 and 3. Where we differ: dropout is scaled, and sparsity
        may rise while training (Zhu and Gupta, To prune, or not to prune, 2017, equation 1).
    """
    plan = _check(model, recipe, train, steps_per_epoch)
    if plan.prune is not None and plan.prune.rounds is not None:
        _prune_in_rounds(model, plan.prune, train, plan.prune.rounds)
    if plan.prune is not None and plan.prune.ramp_epochs is not None and steps_per_epoch is not None:
        _prune_while_training(model, plan.prune, train, plan.prune.ramp_epochs * steps_per_epoch)
    if plan.share is not None:
        quantize.kmeans(model, _by_pattern(plan.share.bits), init=plan.share.init)
        train(model, _stage("share", plan.share.train))
    return model


def _check(
    model: nn.Module,
    recipe: DeepCompressionRecipe | Mapping[str, Any] | str | os.PathLike[str],
    train: Train,
    steps_per_epoch: int | None,
) -> DeepCompressionRecipe:
    if not isinstance(model, nn.Module):
        raise TypeError(f"deep_compression: model must be an nn.Module, got {type(model).__name__}; pass the network")
    if isinstance(recipe, DeepCompressionRecipe):
        plan = recipe
    elif isinstance(recipe, Mapping):
        plan = DeepCompressionRecipe.from_mapping(recipe)
    elif isinstance(recipe, str | os.PathLike):
        plan = DeepCompressionRecipe.from_yaml(recipe)
    else:
        raise TypeError(
            "deep_compression: recipe must be a DeepCompressionRecipe, a mapping or the path of a YAML file, "
            f"got {type(recipe).__name__}; pass one of these"
        )
    if not callable(train):
        raise TypeError(
            f"deep_compression: train must be callable as train(model, stage), got {type(train).__name__}; "
            "pass a function that retrains the model"
        )
    if steps_per_epoch is not None and (not isinstance(steps_per_epoch, int) or isinstance(steps_per_epoch, bool)):
        raise TypeError(
            f"deep_compression: steps_per_epoch must be an int, got {steps_per_epoch!r}; pass a whole number"
        )
    ramp = plan.prune is not None and plan.prune.ramp_epochs is not None
    if (ramp and steps_per_epoch is None) or (steps_per_epoch is not None and steps_per_epoch < 1):
        raise ValueError(
            "deep_compression: steps_per_epoch must be at least 1 where recipe.prune has ramp_epochs, "
            f"got {steps_per_epoch}; pass the optimizer steps that train takes in an epoch"
        )
    if plan.prune is not None:
        _check_layers(model, "recipe.prune.sparsity", plan.prune.sparsity)
    if plan.share is not None:
        _check_layers(model, "recipe.share.bits", plan.share.bits)
    return plan


def _check_layers(model: nn.Module, name: str, values: float | dict[str, float] | dict[str, int]) -> None:
    if isinstance(values, dict):
        assign("deep_compression", name, model, {**values}, None)
    else:
        select("deep_compression", model, None, None)


def _prune_in_rounds(model: nn.Module, plan: PruneStage, train: Train, rounds: int) -> None:
    def retrain(network: nn.Module, index: int) -> None:
        if plan.dropout_rule:
            prune.rescale_dropout(network)
        train(network, _stage("prune", plan.train, index, rounds))

    parts = [1 - (1 - index / rounds) ** 3 for index in range(1, rounds + 1)]
    prune.iterative(model, [_scaled(plan.sparsity, part) for part in parts], retrain)


def _prune_while_training(model: nn.Module, plan: PruneStage, train: Train, steps: int) -> None:
    pruner = prune.GradualPruner(
        model, sparsity=_by_pattern(plan.sparsity), begin_step=0, end_step=steps, frequency=plan.frequency
    )
    taken = 0

    def after_step() -> None:
        nonlocal taken
        before = pruner.sparsity
        pruner.step()
        taken += 1
        if plan.dropout_rule and pruner.sparsity != before:
            prune.rescale_dropout(model)

    train(model, _stage("prune", plan.train, after_step=after_step))
    if taken < steps:
        raise ValueError(
            f"deep_compression: train must call stage.after_step() at least {steps} times, got {taken}; "
            "call it after every optimizer step and check steps_per_epoch"
        )


def _by_pattern(values: Value | dict[str, Value]) -> Value | dict[Pattern, Value]:
    """The same with keys of the type that methods take, which may be module types too."""
    return {pattern: value for pattern, value in values.items()} if isinstance(values, dict) else values


def _scaled(sparsity: float | dict[str, float], part: float) -> float | dict[Pattern, float]:
    if isinstance(sparsity, dict):
        return {pattern: part * value for pattern, value in sparsity.items()}
    return part * sparsity


def _stage(
    name: Literal["prune", "share"],
    training: Training,
    index: int = 1,
    rounds: int = 1,
    after_step: Callable[[], None] = lambda: None,
) -> Stage:
    return Stage(name, index, rounds, training, after_step)
