"""Deep Compression as one plan: prune and retrain, share weights and train the shared values, store."""

from __future__ import annotations

import os
import re
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator
from rich.progress import Progress
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from tersetorch.methods import prune, quantize
from tersetorch.methods.arguments import check_choice, did_you_mean
from tersetorch.methods.distributed import check_alike, failing_together
from tersetorch.methods.selection import Pattern, assign, select
from tersetorch.recipes.calibrated import (
    check_calibrated,
    fingerprint_of_batches,
    first_batches,
    prune_calibrated,
    share_calibrated,
)
from tersetorch.recipes.run_folder import RunFolder, fingerprint
from tersetorch.storage import save
from tersetorch.storage.arguments import check_regular, target_of
from tersetorch.storage.streams import CODERS
from tersetorch.zoo.ranks import alike, everyone, from_rank_0

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

Fraction = Annotated[float, Field(ge=0, lt=1)]
Bits = Annotated[int, Field(ge=1, le=8)]
# A recipe of a hundred bytes must not ask for memory, or for time without end.
Epochs = Annotated[int, Field(ge=0, le=1_000_000)]
Rounds = Annotated[int, Field(ge=1, le=1_000)]
# One value for all layers, or one for each: which was meant is seen from the type, and an error speaks of it alone.
_ONE, _EACH = "one value", "one for each"
_which = Discriminator(lambda value: _EACH if isinstance(value, dict) else _ONE)
Fractions = Annotated[Annotated[Fraction, Tag(_ONE)] | Annotated[dict[str, Fraction], Tag(_EACH)], _which]
SharedBits = Annotated[Annotated[Bits, Tag(_ONE)] | Annotated[dict[str, Bits], Tag(_EACH)], _which]
# The recipes that come with the package, by the names of their files.
PUBLISHED = {path.stem: path for path in sorted(Path(__file__).parent.glob("*.yaml"))}
Value = TypeVar("Value", int, float)


# What a stage of method "obs" has where it does not say; one of magnitude has none of it.
OBS = {"solver": "blocked", "calibration": 512, "refine": 3}
# Of a file: the parser takes up to 20 microseconds for each byte.
MOST_BYTES = 64 << 10
# Keys of a mapping, those that it merges counted each time.
MAX_MERGED = 10_000
# Of a number in a file: Python shows none of more than 4300 digits.
MAX_DIGITS = 100


class _Short(reprlib.Repr):
    """What came, in an error: lists of lists by alias (*a) may be far longer than their file."""

    def repr_int(self, x: int, level: int) -> str:
        """As Repr's, which cannot show numbers of thousands of digits."""
        return super().repr_int(x, level) if x.bit_length() < 1000 else f"a number of {x.bit_length()} bits"


_SHORT = _Short()
_SHORT.maxlevel = 3
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 200


class _Plan(BaseModel):
    # Strict: "0.9" or True in a YAML file is a slip, not a number.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class _Loader(yaml.SafeLoader):
    """YAML whose mappings have each key once (of two, one would be lost unseen), with numbers of MAX_DIGITS at most."""

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        """As SafeLoader's, but for numbers that are too long."""
        if isinstance(node, yaml.ScalarNode) and node.tag.endswith((":int", ":float")) and len(node.value) > MAX_DIGITS:
            raise yaml.constructor.ConstructorError(
                None, None, f"a number of more than {MAX_DIGITS} characters", node.start_mark
            )
        return super().construct_scalar(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As SafeLoader's, with keys compared before merges (<<), which may be overruled."""
        seen = set()
        for key, _ in node.value:
            name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else None
            if name is not None and name in seen:
                raise yaml.constructor.ConstructorError(
                    "while reading a mapping", node.start_mark, f"the key {key.value!r} comes twice", key.start_mark
                )
            seen.add(name)
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """As SafeLoader's, but merges of merges, which multiply, end at MAX_MERGED keys."""
        super().flatten_mapping(node)
        if len(node.value) > MAX_MERGED:
            raise yaml.constructor.ConstructorError(
                None, None, f"a mapping of more than {MAX_MERGED} keys", node.start_mark
            )


# 1e-3 is a number to everyone but YAML 1.1, which wants 1.0e-3.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


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
        method: "magnitude" prunes the least weights; "obs" those that cost the outputs least by second derivatives,
            calibrated on examples, and lets the others make up for them (prune.obs): little is lost then without any
            training. Weights are also shared so afterwards.
        rounds: prune to a larger part `rounds` times, retraining after each (Han et al.); the part after round r of R
            is sparsity * (1 - (1 - r / R)^3). Left out when ramp_epochs is given; 1 unless given where method is "obs"
            or there is no training.
        ramp_epochs: prune while training, along the same curve, for this many epochs of one training (Zhu and Gupta);
            the rest of its epochs retrain what is left. Not with "obs".
        frequency: optimizer steps from one pruning to the next during the ramp.
        dropout_rule: scale dropout by the square root of the connections kept (Han et al. 2015, section 3.2).
        solver: of "obs", "blocked" unless given, or "exactobs", which loses less the more is pruned, and takes
            rows * inputs^3 operations for a layer: up to 1,000 inputs.
        calibration: of "obs", 512 unless given: how many training examples it looks at, without their labels.
        refine: of "obs", 3 unless given: rounds of refinement after each sweep, of the "blocked" one that prunes and of
            that which shares.
        train: the training of each round, or of the whole ramp; left out, there is none.
    """

    sparsity: Fractions
    method: Literal["magnitude", "obs"] = "magnitude"
    rounds: Rounds | None = None
    ramp_epochs: Annotated[Epochs, Field(ge=1)] | None = None
    frequency: Annotated[int, Field(ge=1)] = 25
    dropout_rule: bool = True
    solver: Literal["blocked", "exactobs"] | None = None
    calibration: Annotated[int, Field(ge=1)] | None = None
    refine: Annotated[int, Field(ge=0)] | None = None
    train: Training | None = None

    @model_validator(mode="before")
    @classmethod
    def _with_defaults(cls, given: Any) -> Any:
        if not isinstance(given, Mapping) or given.get("method") != "obs":
            return given
        return OBS | {"rounds": 1} | {name: value for name, value in given.items() if value is not None}

    @model_validator(mode="after")
    def _one_method(self) -> Self:
        if self.method == "magnitude":
            for name in OBS:
                came = getattr(self, name)
                if came is not None:
                    raise ValueError(
                        f"{name} must be left out where method is 'magnitude', got {came}; set method: obs"
                    )
        elif self.ramp_epochs is not None:
            raise ValueError(
                f"ramp_epochs must be left out where method is 'obs', got {self.ramp_epochs}; give rounds, with train"
            )
        return self

    @model_validator(mode="after")
    def _one_schedule(self) -> Self:
        if self.train is None:
            if self.ramp_epochs is not None:
                raise ValueError(f"ramp_epochs must be left out where train is, got {self.ramp_epochs}; add train")
            if self.rounds is not None and self.rounds > 1:
                raise ValueError(f"rounds must be 1 where train is left out, got {self.rounds}; add train")
            return self
        if (self.rounds is None) == (self.ramp_epochs is None):
            raise ValueError("exactly one of rounds and ramp_epochs must be given")
        if self.ramp_epochs is not None and self.ramp_epochs > self.train.epochs:
            raise ValueError(f"ramp_epochs must be at most train.epochs = {self.train.epochs}, got {self.ramp_epochs}")
        return self


class ShareStage(_Plan):
    """How many values a layer's weights share.

    Attributes:
        bits: 2^bits values a layer, zero among them; one number for all layers or one for each name or pattern.
        init: how the values start, as in quantize.kmeans; "exact" where prune's method is "obs".
        train: the training of the shared values; left out, there is none.
    """

    bits: SharedBits
    init: Literal["exact", "linear", "density", "random"] = "exact"
    train: Training | None = None


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
        by_obs = self.prune is not None and self.prune.method == "obs"
        if by_obs and self.share is not None and self.share.init != "exact":
            raise ValueError(
                f"share.init must be 'exact' where prune.method is 'obs', got {self.share.init!r}; leave it out"
            )
        return self

    @classmethod
    def named(cls, name: str) -> Self:
        """A recipe that comes with the package: "alexnet", "lenet_300_100", "lenet_5", "squeezenet" or "vgg16".

        Densities and bits are the paper's, for the layer names of tersetorch.zoo's networks.

        Raises:
            ValueError: there is none of that name.
        """
        if name not in PUBLISHED:
            raise ValueError(
                f"DeepCompressionRecipe: name must be one of {', '.join(PUBLISHED)}, got {name!r}; pass one of these"
            )
        return cls.from_yaml(PUBLISHED[name])

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str]) -> Self:
        """Reads a recipe from a YAML file of at most MOST_BYTES.

        Layers are named by names and globs: recipes in Python may have "re:..." patterns too, but a file may be a
        stranger's, and some regular expressions never end.

        Raises:
            ValueError: the file is larger, no regular one, no YAML, or no recipe; the message names what is wrong
                where.
            FileNotFoundError: there is no such file.
        """
        check_regular("DeepCompressionRecipe", "path", Path(path), MOST_BYTES)
        try:
            plan = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
        except OSError:
            raise
        except Exception as error:  # whatever the parser raises for !!bool x, !!int "", nests and dates that are none
            came = str(error)
            if isinstance(error, yaml.MarkedYAMLError) and error.problem and error.problem_mark:
                came = f"{error.problem} in line {error.problem_mark.line + 1}"
            raise ValueError(f"DeepCompressionRecipe: {path} must be YAML, got {came:.1000}; mend the file") from error
        recipe = cls.from_mapping(plan)
        for field, values in (
            ("prune.sparsity", recipe.prune and recipe.prune.sparsity),
            ("share.bits", recipe.share and recipe.share.bits),
        ):
            for pattern in values if isinstance(values, dict) else ():
                if pattern.startswith("re:"):
                    raise ValueError(
                        f"DeepCompressionRecipe: {path} must name layers in {field} by names or globs, such as "
                        f"'encoder.*', got the regular expression {_SHORT.repr(pattern)}; use globs, or pass the "
                        "recipe in Python as a mapping"
                    )
        return recipe

    @classmethod
    def from_mapping(cls, plan: Mapping[str, Any]) -> Self:
        """The recipe with these fields.

        Raises:
            ValueError: plan is no recipe; the message names what is wrong where.
        """
        try:
            return cls.model_validate(plan)
        except ValidationError as error:
            wrong = "; ".join(_problem(cls, problem) for problem in error.errors())
            raise ValueError(
                f"DeepCompressionRecipe: recipe must have valid fields, got {wrong}; mend them there"
            ) from error

    def to_yaml(self) -> str:
        """The recipe as YAML that from_yaml reads back, unless it has "re:..." patterns."""
        return yaml.safe_dump(self.model_dump(exclude_none=True), sort_keys=False)


def _problem(recipe: type[BaseModel], problem: ErrorDetails) -> str:
    """What is wrong with a recipe's field, in words; a name that is no field gets the ones that are."""
    where = ".".join(str(name) for name in problem["loc"] if name not in (_ONE, _EACH)) or "recipe"
    if problem["type"] == "missing":
        return f"{where}: {problem['msg']}"
    if problem["type"] != "extra_forbidden":
        words = "Input should be a mapping" if problem["type"] == "model_type" else problem["msg"]
        return f"{where}: {words}, got {_SHORT.repr(problem['input'])}"
    fields = _fields(recipe, problem["loc"][:-1])
    return f"{where}, where only {', '.join(fields)} may stand{did_you_mean(problem['loc'][-1], fields)}"


def _fields(recipe: type[BaseModel], path: Sequence[int | str]) -> list[str]:
    """The names of the fields that a part of a recipe has."""
    for name in path:
        field = recipe.model_fields.get(str(name))
        kinds = [] if field is None else [field.annotation, *get_args(field.annotation)]
        inner = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if not inner:
            return []
        recipe = inner[0]
    return list(recipe.model_fields)


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


@dataclass(frozen=True)
class _Step:
    """One change of the model with the training that follows; words for its bar."""

    words: str
    run: Callable[[], None]


def deep_compression(
    model: nn.Module,
    recipe: DeepCompressionRecipe | Mapping[str, Any] | str | os.PathLike[str],
    train: Train | None = None,
    *,
    calibration: Iterable[Any] | None = None,
    steps_per_epoch: int | None = None,
    path: str | os.PathLike[str] | None = None,
    coders: Literal["smallest", "fast"] = "smallest",
    folder: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> nn.Module:
    """Prunes model and shares its weights by the recipe, in place; returns it with its parametrizations live.

    After each pruning and after sharing, train(model, stage) retrains what is left; it trains the parameters of model
    that require gradients, with an optimizer of its own, and calls stage.after_step() after every step. A stage of the
    recipe without train is not trained. The third stage of the paper, entropy coding, is tersetorch.save's, which path
    asks for.

    Where prune.method is "obs", prune.obs prunes, and weights are shared by it too, in a second sweep over what is left
    (and was retrained): each is rounded so that those still to come make up for it. This is nearer to the network than
    quantize.kmeans, and than pruning and rounding in one sweep. Linear and Conv layers that the data reaches are shared
    so, whether prune names them or not; others, such as embeddings, by quantize.kmeans.

    Where torch.distributed has started, every rank must call it with the same arguments: all start from rank 0's model,
    and end with the same bits where train leaves them alike, as tersetorch.zoo.fit does. Rank 0 alone writes to folder
    and path. Where a rank is killed, the same call on the same number of ranks (torchrun --max-restarts makes it) goes
    on from folder to the same bits.

    Example:
        def train(model, stage):
            tt.zoo.fit(model, images, labels, **dict(stage.training), after_step=stage.after_step)

        steps = tt.zoo.steps_per_epoch(len(images))
        tt.deep_compression(model, "lenet_5", train, steps_per_epoch=steps, path="lenet5.terse", folder="run")
        print(tt.inspect("lenet5.terse"))  # where every byte went

        # another network, without training
        recipe = {"prune": {"method": "obs", "sparsity": 0.5}, "share": {"bits": 4}}
        tt.deep_compression(other, recipe, calibration=images.split(128), path="small.terse")

    Args:
        model: a trained network.
        recipe: the plan, a mapping with its fields, the name of a recipe that comes with the package (see
            DeepCompressionRecipe.named), or the path of a YAML file.
        train: retrains model in place; what it returns is not looked at. Not needed where the recipe has no training.
        calibration: batches of inputs as prune.obs takes them, the same on every rank; needed where recipe.prune.method
            is "obs". The first that together hold recipe.prune.calibration examples are looked at, or all there are.
        steps_per_epoch: optimizer steps that train takes in an epoch; needed when recipe.prune.ramp_epochs is given.
        path: the file to store the compressed model in, as tersetorch.save does; None to store none.
        coders: of that file, as tersetorch.save takes it.
        folder: where the model's state is kept after each training: the same call, with the model as it came, goes on
            from there after an interruption and ends with the same bits, if train is deterministic. Made where it is
            missing. The batches of calibration must be the same then.
        progress: a bar that counts trainings is added to it.

    Raises:
        TypeError: model is no module, recipe is no recipe, train cannot be called, or calibration is no iterable of
            batches.
        ValueError: the recipe is not valid, a pattern matches no layer, steps_per_epoch is missing or not positive,
            calibration is missing or empty, prune.obs refuses it or a layer, folder holds another run or one that was
            changed since, another run uses it, train did not call stage.after_step() often enough for the ramp to end,
            or ranks were called with other layers or arguments.
        OSError: folder or path cannot be written.
        FileNotFoundError: recipe names no file, or path's folder does not exist. What is wrong with recipe, path and
            folder is said before anything changes.

    Source:
        Han, Mao, Dally, Deep Compression (2016), sections 2 and 3. Where we differ: dropout is scaled, and sparsity
        may rise while training (Zhu and Gupta, To prune, or not to prune, 2017, equation 1).
    """
    with failing_together(everyone()):
        plan, layers = _check(model, recipe, train, steps_per_epoch, path, coders)
        batches = _batches(model, plan, calibration)
        seen = fingerprint_of_batches(batches)
    asked = (plan.model_dump(), seen, steps_per_epoch, layers, path is None, coders, folder is None)
    check_alike("deep_compression", "layers and arguments", asked, everyone())
    steps = _steps(model, plan, train, batches, steps_per_epoch, progress)
    alike(model)
    weights = None if folder is None else fingerprint(model)
    settings = {
        "recipe": plan.model_dump(),
        "calibration": seen,
        "steps_per_epoch": steps_per_epoch,
        "weights": weights,
    }
    with RunFolder("deep_compression", folder, settings, done=0) as run:
        done = _resume(model, plan, run, layers)
        task = None if progress is None else progress.add_task("deep compression", total=len(steps), completed=done)
        for index, step in enumerate(steps[done:], done + 1):
            if progress is not None and task is not None:
                progress.update(task, description=f"deep compression: {step.words}")
            step.run()
            if folder is not None:
                run.keep(model, f"after_{index}")
                run.store(done=index)
                run.forget(f"after_{index - 1}")
            if progress is not None and task is not None:
                progress.advance(task)
    if path is not None:
        from_rank_0(partial(save, model, path, coders=coders, progress=progress))
    return model


def _check(
    model: nn.Module,
    recipe: DeepCompressionRecipe | Mapping[str, Any] | str | os.PathLike[str],
    train: Train | None,
    steps_per_epoch: int | None,
    path: str | os.PathLike[str] | None,
    coders: str,
) -> tuple[DeepCompressionRecipe, list[str]]:
    """The plan, and the names of the layers that it changes."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"deep_compression: model must be an nn.Module, got {type(model).__name__}; pass the network")
    plan = _plan(recipe)
    trained = any(stage is not None and stage.train is not None for stage in (plan.prune, plan.share))
    if not callable(train) and (trained or train is not None):
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
    check_choice("deep_compression", "coders", coders, CODERS)
    if path is not None:  # looked at now, since the file comes last, after hours of training maybe
        target_of("deep_compression", path)
    layers: list[str] = []
    if plan.prune is not None:
        layers += pruned_layers(model, plan.prune)
    if plan.share is not None:
        layers += layer_values(model, "recipe.share.bits", plan.share.bits)
    return plan, list(dict.fromkeys(layers))


def _batches(model: nn.Module, plan: DeepCompressionRecipe, calibration: Iterable[Any] | None) -> list[Any]:
    """What second derivatives are calibrated on; nothing where the recipe does not ask for them."""
    if plan.prune is None or plan.prune.calibration is None:
        return []
    where = "deep_compression"
    batches = first_batches(where, calibration, plan.prune.calibration)
    check_calibrated(where, model, pruned_layers(model, plan.prune), batches)
    return batches


def _plan(recipe: DeepCompressionRecipe | Mapping[str, Any] | str | os.PathLike[str]) -> DeepCompressionRecipe:
    if isinstance(recipe, DeepCompressionRecipe):
        return recipe
    if isinstance(recipe, Mapping):
        return DeepCompressionRecipe.from_mapping(recipe)
    if isinstance(recipe, str) and recipe in PUBLISHED:
        return DeepCompressionRecipe.named(recipe)
    if isinstance(recipe, str | os.PathLike):
        if not Path(recipe).is_file():
            raise FileNotFoundError(
                f"deep_compression: recipe must be one of {', '.join(PUBLISHED)} or the path of a YAML file, "
                f"got {str(recipe)!r}; pass one that exists"
            )
        return DeepCompressionRecipe.from_yaml(recipe)
    raise TypeError(
        "deep_compression: recipe must be a DeepCompressionRecipe, a mapping, a name or the path of a YAML file, "
        f"got {type(recipe).__name__}; pass one of these"
    )


def layer_values(model: nn.Module, name: str, values: Value | dict[str, Value]) -> dict[str, Value]:
    """For each layer that a recipe's field names, its value.

    Raises:
        ValueError: a pattern matches no layer, or one that cannot be changed.
    """
    where = "deep_compression"
    try:
        if isinstance(values, dict):
            return {target.name: value for target, value in assign(where, name, model, {**values}, None)}
        return {target.name: values for target in select(where, model, None, None)}
    except ValueError as error:
        packed = next((type(module).__name__ for module in model.modules() if hasattr(module, "to_dense")), None)
        if "got none" in str(error) and packed is not None:
            raise ValueError(
                f"{where}: model must have a Linear or Conv layer, got {packed} and the like, which convert makes "
                "of them; pass the model that was converted"
            ) from error
        # A recipe has neither targets nor ignore.
        words = (
            str(error).replace(" that ignore leaves", "").replace("name layers in targets", f"name others in {name}")
        )
        raise ValueError(re.sub(r"or pass ignore=\[.*\]$", f"or name the other layers in {name}", words)) from error


def pruned_layers(model: nn.Module, stage: PruneStage) -> dict[str, float]:
    """For each layer that a stage prunes, its sparsity.

    Of every layer, second derivatives leave out the out_proj of nn.MultiheadAttention, whose weight the attention reads
    itself, so that no input of the layer's is ever seen.

    Raises:
        ValueError: a pattern matches no layer.
    """
    found = layer_values(model, "recipe.prune.sparsity", stage.sparsity)
    if stage.method == "magnitude" or isinstance(stage.sparsity, dict):
        return found
    read = {name for name, module in model.named_modules() if isinstance(module, NonDynamicallyQuantizableLinear)}
    return {name: sparsity for name, sparsity in found.items() if name not in read}


def _resume(model: nn.Module, plan: DeepCompressionRecipe, run: RunFolder, layers: list[str]) -> int:
    """Loads what the folder keeps into model; how many steps are done."""
    done: int = run.record["done"]
    if not done:
        return 0
    state = run.kept(f"after_{done}")
    if state is None:
        raise ValueError(
            f"deep_compression: folder must hold the state after step {done}, got none; delete the folder "
            f"{run.folder}, or name another"
        )
    prune.magnitude(model, 0.0, targets=layers)  # makes room for the masks
    model.load_state_dict(state)
    if plan.prune is not None and plan.prune.dropout_rule:
        prune.rescale_dropout(model)
    return done


def _steps(
    model: nn.Module,
    plan: DeepCompressionRecipe,
    train: Train | None,
    batches: Sequence[Any],
    steps_per_epoch: int | None,
    progress: Progress | None,
) -> list[_Step]:
    def trained(stage: Stage) -> None:
        assert train is not None
        train(model, stage)

    steps = []
    if plan.prune is not None and plan.prune.ramp_epochs is None:
        rounds = plan.prune.rounds or 1
        for index in range(1, rounds + 1):
            words = f"{pruning_words(plan.prune)}, round {index} of {rounds}"
            steps.append(
                _Step(words, partial(_prune_round, model, plan.prune, trained, batches, index, rounds, progress))
            )
    if plan.prune is not None and plan.prune.ramp_epochs is not None and steps_per_epoch is not None:
        ramp = plan.prune.ramp_epochs * steps_per_epoch
        steps.append(_Step("prune and retrain", partial(_prune_while_training, model, plan.prune, trained, ramp)))
    if plan.share is not None:
        steps.append(_Step(sharing_words(plan), partial(_share, model, plan, trained, batches, progress)))
    return steps


def calibration_words(plan: PruneStage) -> str:
    """What a stage is calibrated on, said to a person; nothing where it is not."""
    examples = plan.calibration
    return "" if examples is None else f"calibrated on up to {examples} training example{'s' if examples > 1 else ''}"


def pruning_words(plan: PruneStage, detail: str = "") -> str:
    """What a stage does, said to a person."""
    how = "" if plan.method == "magnitude" else " by second derivatives"
    return f"prune{how}{detail}" + (" and retrain" if plan.train is not None else "")


def sharing_words(plan: DeepCompressionRecipe) -> str:
    """The same of the stage share."""
    how = " by second derivatives" if plan.prune is not None and plan.prune.method == "obs" else ""
    then = " and train the shared values" if plan.share is not None and plan.share.train is not None else ""
    return f"share weights{how}{then}"


def _prune_round(
    model: nn.Module,
    plan: PruneStage,
    train: Callable[[Stage], None],
    batches: Sequence[Any],
    index: int,
    rounds: int,
    progress: Progress | None,
) -> None:
    part = 1 - (1 - index / rounds) ** 3
    if plan.method == "obs":
        sparsities = {name: part * sparsity for name, sparsity in pruned_layers(model, plan).items()}
        prune_calibrated(model, sparsities, plan, batches, progress)
    else:
        prune.magnitude(model, _scaled(plan.sparsity, part))
    if plan.dropout_rule:
        prune.rescale_dropout(model)
    if plan.train is not None:
        train(_stage("prune", plan.train, index, rounds))


def _prune_while_training(model: nn.Module, plan: PruneStage, train: Callable[[Stage], None], steps: int) -> None:
    assert plan.train is not None
    pruner = prune.GradualPruner(
        model, sparsity=by_pattern(plan.sparsity), begin_step=0, end_step=steps, frequency=plan.frequency
    )
    taken = 0

    def after_step() -> None:
        nonlocal taken
        before = pruner.sparsity
        pruner.step()
        taken += 1
        if plan.dropout_rule and pruner.sparsity != before:
            prune.rescale_dropout(model)

    train(_stage("prune", plan.train, after_step=after_step))
    if taken < steps:
        raise ValueError(
            f"deep_compression: train must call stage.after_step() at least {steps} times, got {taken}; "
            "call it after every optimizer step and check steps_per_epoch"
        )


def _share(
    model: nn.Module,
    plan: DeepCompressionRecipe,
    train: Callable[[Stage], None],
    batches: Sequence[Any],
    progress: Progress | None,
) -> None:
    assert plan.share is not None
    if plan.prune is not None and plan.prune.method == "obs":
        bits = layer_values(model, "recipe.share.bits", plan.share.bits)
        share_calibrated(model, bits, plan.prune, batches, progress)
    else:
        quantize.kmeans(model, by_pattern(plan.share.bits), init=plan.share.init)
    if plan.share.train is not None:
        train(_stage("share", plan.share.train))


def by_pattern(values: Value | dict[str, Value]) -> Value | dict[Pattern, Value]:
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
