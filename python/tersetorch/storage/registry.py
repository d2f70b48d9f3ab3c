"""The closed table of module kinds that tt.load rebuilds by itself: no import by name, no pickle."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tersetorch.storage.compare import same

Config = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """How modules of one class are described and built again.

    Attributes:
        name: the stable name in files.
        cls: exactly this class, since a subclass may compute something else.
        config: the constructor's keyword arguments, JSON-able (tuples become lists in the file, and come back as such).
        build: a module from those arguments; its children and tensors are replaced by the file's.
        overrides: attributes that may differ from what build sets, and are stored then.
        ignored: attributes and passing buffers that follow from the tensors.
        tensors: at least how many tensors a module with this config has, where the constructor makes as many as a
            number says; compared with the file before construction.
    """

    name: str
    cls: type[nn.Module]
    config: Callable[[Any], Config]
    build: Callable[..., nn.Module]
    overrides: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    tensors: Callable[[Config], int] = lambda config: 0


_by_name: dict[str, Kind] = {}
_by_class: dict[type[nn.Module], Kind] = {}


def register_module(kind: str, cls: type[nn.Module], config: Callable[[Any], Config]) -> None:
    """Lets tt.load rebuild modules of class cls as cls(**config).

    Args:
        kind: the stable name in files, such as "zoo.LeNet300100"; never give it to another class.
        cls: the class; its constructor must not read the values of the parameters that it makes (they have none while
            a file is being checked).
        config: module -> the constructor's keyword arguments, as JSON can hold them.

    Raises:
        TypeError: kind is no string, cls no nn.Module class, or config not callable.
        ValueError: kind is empty, or kind or cls is registered already.
    """
    if not isinstance(kind, str):
        raise TypeError(f"register_module: kind must be a string, got {type(kind).__name__}; name it 'room.Class'")
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"register_module: cls must be a subclass of nn.Module, got {cls!r}; pass the class itself")
    if not callable(config):
        raise TypeError(f"register_module: config must be callable, got {type(config).__name__}; pass a function")
    add(Kind(kind, cls, config, cls))


def add(kind: Kind) -> None:
    """Puts a kind into the table.

    Raises:
        ValueError: its name is empty, or its name or class is registered already.
    """
    if not kind.name:
        raise ValueError("register_module: kind must not be empty, got ''; name it 'room.Class'")
    if kind.name in _by_name or kind.cls in _by_class:
        raise ValueError(
            f"register_module: kind and cls must be new, got {kind.name!r} for {kind.cls.__name__}; "
            "one of the two is registered already"
        )
    _by_name[kind.name] = kind
    _by_class[kind.cls] = kind


def named(name: str) -> Kind | None:
    """The kind of this name."""
    return _by_name.get(name)


def kind_of(module: nn.Module) -> Kind | None:
    """The kind of exactly this module's class."""
    return _by_class.get(type(module))


def config_of(names: Iterable[str], constructor: Callable[..., Any]) -> Callable[[nn.Module], Config]:
    """Reads constructor arguments from the attributes of the same names, leaving out those at their default.

    An argument whose attribute is a parameter, or None in its place, says whether there is one.
    """
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(constructor).parameters.items()
        if parameter.default is not parameter.empty
    }
    wanted = tuple(names)

    def config(module: nn.Module) -> Config:
        found = {}
        for name in wanted:
            value = module._parameters[name] is not None if name in module._parameters else getattr(module, name)
            # Of one type too, since those of a module that is built again are compared so: 1 is not 1.0.
            if name not in defaults or not same(value, defaults[name]):
                found[name] = value
        return found

    return config


def construct(kind: Kind, config: Config, device: str) -> nn.Module:
    """Builds a module on a device without touching the random state; on "meta" it takes no memory for tensors."""
    draws = _NoNormal() if device == "meta" else nullcontext()
    with torch.random.fork_rng(devices=[]), torch.device(device), draws, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return kind.build(**config)


class _NoNormal(TorchFunctionMode):
    """Passes over normal_: a tensor on device meta has no values, yet torch imports its compiler to draw them."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (nn.init.normal_, Tensor.normal_):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def from_json(value: Any) -> Any:
    """Constructor arguments as JSON gave them back: its lists are tuples."""
    if isinstance(value, list):
        return tuple(from_json(item) for item in value)
    if isinstance(value, dict):
        return {key: from_json(item) for key, item in value.items()}
    return value
