"""Which weights of a model a method works on: from targets and ignore to tensors, each tensor once."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeAlias, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from tersetorch.methods.arguments import check_model
from tersetorch.methods.parametrization import (
    CompressedWeight,
    live_weight,
    parametrization_list,
    parametrized_tensors,
)

Pattern: TypeAlias = str | type[nn.Module]
Patterns: TypeAlias = Pattern | Sequence[Pattern]
Value = TypeVar("Value")
# A value for each pattern; a mapping's key type is invariant, so plain names are a case of their own.
PerPattern: TypeAlias = Mapping[str, Value] | Mapping[Pattern, Value]

DEFAULT_TARGETS: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
__all__ = ["Target", "assign", "find_weights", "select"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
NAMES_SHOWN = 5


@dataclass(frozen=True)
class Target:
    """A weight of a model.

    Attributes:
        name: the path of the module for a tensor called "weight", else the path of the tensor.
        names: every path of the modules that hold the weight, and of the weight in them.
        owners: every module that holds the weight, with the name the tensor has there; more than one when it is tied.
    """

    name: str
    names: tuple[str, ...]
    owners: tuple[tuple[nn.Module, str], ...]

    @property
    def compressed(self) -> CompressedWeight | None:
        """The parametrization of the weight, or None while it has none."""
        live = live_weight(*self.owners[0])
        return None if live is None else live.compressed

    @property
    def weight(self) -> Tensor:
        """The weight that the model computes with, detached."""
        module, tensor = self.owners[0]
        with torch.no_grad():
            return getattr(module, tensor).detach()  # type: ignore[no-any-return]

    def matches(self, pattern: Pattern) -> bool:
        """Whether pattern selects this weight."""
        if isinstance(pattern, str):
            return any(_name_matches(pattern, name) for name in self.names)
        return any(isinstance(module, pattern) for module, _ in self.owners)


def select(
    where: str, model: nn.Module, targets: Patterns | None, ignore: Patterns | None, *, frozen: bool = False
) -> list[Target]:
    """The weights that targets name and ignore does not, in the model's order, checked to be ones a method can handle.

    A pattern is the path of a module ("encoder.fc1") or of a tensor ("rnn.weight_hh_l0"), a glob ("encoder.*", where
    "*" crosses dots), a regular expression that fits the whole path ("re:encoder[.]fc[12]"), or a module type (its
    subclasses too). A module's weights are its tensor "weight" or, where it has none, its parameters of two or more
    dimensions with "weight" in their name. The default targets are nn.Linear and nn.Conv1d, 2d and 3d.

    A weight tied between modules counts once, under its first name; it is selected when any of its names is, and left
    out when any of them is ignored.

    A weight that is frozen (it, or the codebook that it shares, requires no gradient) is refused, unless frozen says
    that the caller changes none.

    Raises:
        TypeError: model is no module, or targets or ignore hold something that is no pattern.
        ValueError: a pattern matches nothing, nothing is left, or a selected weight cannot be handled.
    """
    _check_whole(where, model)
    wanted: Sequence[Pattern] = DEFAULT_TARGETS if targets is None else _as_patterns(where, "targets", targets)
    unwanted = () if ignore is None else _as_patterns(where, "ignore", ignore)
    everything = find_weights(model)
    if targets is not None:
        for pattern in wanted:
            _check_matches(where, "targets", pattern, model, everything)
    for pattern in unwanted:
        _check_present(where, pattern, model, everything)
    chosen = [
        target
        for target in everything
        if any(target.matches(pattern) for pattern in wanted) and not any(target.matches(name) for name in unwanted)
    ]
    if not chosen:
        wish = "a Linear or Conv layer" if targets is None else "a weight in targets"
        raise ValueError(
            f"{where}: model must have {wish} that ignore leaves, got none; "
            + (f"name layers in targets, such as {_some_names(everything)}" if everything else "pass one with layers")
        )
    for target in chosen:
        _check_weight(where, target, frozen)
    if not frozen and torch.is_inference_mode_enabled():
        raise ValueError(
            f"{where}: model must be changed outside torch.inference_mode, got called inside, where new tensors can "
            "never train; leave it first, torch.no_grad will do"
        )
    return chosen


def assign(
    where: str,
    argument: str,
    model: nn.Module,
    values: PerPattern[Value],
    ignore: Patterns | None,
    *,
    frozen: bool = False,
) -> list[tuple[Target, Value]]:
    """Each weight that a key of values selects, with its value: a path wins over patterns, then the first key does.

    Raises:
        TypeError, ValueError: as select does, with the keys of values in the place of targets.
    """
    _check_whole(where, model)
    if not values:
        raise ValueError(f"{where}: {argument} must name at least one layer, got {{}}; pass pattern: number")
    patterns = _as_patterns(where, argument, tuple(values))
    everything = find_weights(model)
    for pattern in patterns:
        _check_matches(where, argument, pattern, model, everything)
    ordered = sorted(patterns, key=lambda pattern: not any(pattern in target.names for target in everything))
    by_pattern = cast(Mapping[Pattern, Value], values)
    return [
        (target, by_pattern[next(pattern for pattern in ordered if target.matches(pattern))])
        for target in select(where, model, patterns, ignore, frozen=frozen)
    ]


def find_weights(model: nn.Module) -> list[Target]:
    """Every weight of model of two or more dimensions, also those that no method can handle, in the model's order."""
    names: dict[int, list[str]] = {}
    shown: dict[int, str] = {}
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for path, module in _modules_outside_parametrizations(model):
        for tensor, key in _weights_of(module):
            full = f"{path}.{tensor}" if path else tensor
            names.setdefault(key, []).extend([path, full] if path else [full])
            shown.setdefault(key, path if path and tensor == "weight" else full)
            holders = owners.setdefault(key, [])
            if (module, tensor) not in holders:
                holders.append((module, tensor))
    return [Target(shown[key], tuple(dict.fromkeys(names[key])), tuple(owners[key])) for key in names]


def _modules_outside_parametrizations(model: nn.Module) -> list[tuple[str, nn.Module]]:
    found: list[tuple[str, nn.Module]] = []
    inside: tuple[str, ...] = ()
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, parametrize.ParametrizationList):
            inside += (path,)
        elif not any(path.startswith(f"{outer}.") for outer in inside):
            found.append((path, module))
    return found


def _weights_of(module: nn.Module) -> list[tuple[str, int]]:
    """The names of a module's weights, each with a key that tied weights share."""
    tensors: dict[str, Tensor] = {
        name: parameter for name, parameter in module._parameters.items() if parameter is not None
    }
    for name in parametrized_tensors(module):
        held: Any = parametrization_list(module, name)
        # One with several originals is someone else's; its first stands for all.
        tensors[name] = held.original if held.is_tensor else held.original0
    if "weight" not in tensors:
        if isinstance(module, DEFAULT_TARGETS) and isinstance(getattr(module, "weight", None), Tensor):
            # Something else computes it, from a hook for example: found here so that it can be refused by name.
            return [("weight", id(module))]
        return [(name, id(each)) for name, each in tensors.items() if "weight" in name and _is_matrix(each)]
    return [("weight", id(tensors["weight"]))] if _is_matrix(tensors["weight"]) else []


def _is_matrix(tensor: Tensor) -> bool:
    return is_lazy(tensor) or tensor.dim() >= 2


def _check_whole(where: str, model: nn.Module) -> None:
    """Refuses what is no module, and FullyShardedDataParallel, under which no layer has a weight of its own."""
    check_model(where, model)
    fsdp = sys.modules.get("torch.distributed.fsdp")  # what nobody imported wraps nothing
    if fsdp is not None and any(isinstance(module, fsdp.FullyShardedDataParallel) for module in model.modules()):
        raise ValueError(
            f"{where}: model must hold whole weights on each rank, got FullyShardedDataParallel; call this before "
            "sharding"
        )


def _is_shard(weight: Tensor) -> bool:
    sharding = sys.modules.get("torch.distributed.tensor")
    return sharding is not None and isinstance(weight, sharding.DTensor)


def _check_weight(where: str, target: Target, frozen: bool) -> None:
    weight = _parameter(where, target)
    problem = None
    if is_lazy(weight):
        problem = "must be initialised, got a lazy one; run the model once"
    elif _is_shard(weight):
        problem = "must be whole on each rank, got a DTensor; call this before sharding"
    elif type(weight) is not nn.Parameter or weight.layout != torch.strided:
        kind = type(weight).__name__ if weight.layout == torch.strided else weight.layout
        problem = f"must be a plain dense parameter, got {kind}"
    elif weight.device.type == "meta":
        problem = "must hold numbers, got a tensor on meta; load the model first"
    elif weight.dtype not in DTYPES:
        problem = f"must be a floating-point tensor, got {weight.dtype}"
    elif not bool(target.weight.isfinite().all()):
        problem = "must be finite, got NaN or infinity; repair the training"
    elif not frozen and not _trains(target, weight):
        problem = "must not be frozen, got one that this would change; call requires_grad_(True) on it"
    if problem is not None:
        raise ValueError(f"{where}: the weight of {target.name!r} {problem}, or pass ignore=[{target.name!r}]")


def _trains(target: Target, weight: Tensor) -> bool:
    codebook = None if target.compressed is None else target.compressed.codebook
    return (weight if codebook is None else codebook).requires_grad


def _parameter(where: str, target: Target) -> Tensor:
    for module, tensor in target.owners:
        held = parametrization_list(module, tensor)
        live = live_weight(module, tensor)
        if held is not None and live is None:
            raise ValueError(
                f"{where}: the weight of {target.name!r} must have no other parametrization, got "
                f"{type(held[0]).__name__}; remove that one, or pass ignore=[{target.name!r}]"
            )
        parameter = module._parameters.get(tensor) if live is None else live.original
        if parameter is None:
            raise ValueError(
                f"{where}: the weight of {target.name!r} must be a parameter, got a tensor that something else "
                f"computes, such as torch.nn.utils.prune; remove that, or pass ignore=[{target.name!r}]"
            )
    assert parameter is not None
    return parameter


def _as_patterns(where: str, argument: str, patterns: Patterns) -> tuple[Pattern, ...]:
    listed = (patterns,) if isinstance(patterns, str | type) else patterns
    if not isinstance(listed, Sequence):
        raise TypeError(
            f"{where}: {argument} must be a pattern or a list of them, got {type(patterns).__name__}; "
            "pass names, globs, 're:...' patterns or module types"
        )
    if not listed and argument == "targets":
        raise ValueError(f"{where}: targets must name at least one layer, got {patterns!r}; leave it out for all")
    for pattern in listed:
        if not isinstance(pattern, str) and not (isinstance(pattern, type) and issubclass(pattern, nn.Module)):
            raise TypeError(
                f"{where}: {argument} must hold names, globs, 're:...' patterns or module types, got {pattern!r}; "
                "pass one of these"
            )
        if isinstance(pattern, str) and pattern.startswith("re:"):
            try:
                re.compile(pattern[3:])
            except re.error as error:
                raise ValueError(
                    f"{where}: {argument} must hold valid regular expressions, got {pattern!r} ({error}); mend it"
                ) from error
    return tuple(listed)


def _name_matches(pattern: str, name: str) -> bool:
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    return pattern == name or fnmatchcase(name, pattern)


def _check_matches(where: str, argument: str, pattern: Pattern, model: nn.Module, everything: Sequence[Target]) -> None:
    if any(target.matches(pattern) for target in everything):
        return
    fix = f"pass a name such as {_some_names(everything)}"
    if isinstance(pattern, str) and pattern in dict(model.named_modules()):
        inner = [target for target in everything if any(name.startswith(f"{pattern}.") for name in target.names)]
        if inner:
            fix = f"pass {pattern + '.*'!r} for all that it holds"
    shown = repr(pattern) if isinstance(pattern, str) else pattern.__name__
    raise ValueError(
        f"{where}: {argument} must match weights of two or more dimensions, got {shown}, which matches none; {fix}"
    )


def _check_present(where: str, pattern: Pattern, model: nn.Module, everything: Sequence[Target]) -> None:
    if any(target.matches(pattern) for target in everything):
        return
    for path, module in model.named_modules(remove_duplicate=False):
        if _name_matches(pattern, path) if isinstance(pattern, str) else isinstance(module, pattern):
            return
    shown = repr(pattern) if isinstance(pattern, str) else pattern.__name__
    raise ValueError(
        f"{where}: ignore must match a module, got {shown}, which matches none; "
        f"pass a name such as {_some_names(everything)}"
    )


def _some_names(targets: Sequence[Target]) -> str:
    names = [repr(target.name) for target in targets]
    more = ", ..." if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more if names else "(the model has no weight of two or more dimensions)"
