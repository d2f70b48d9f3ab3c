"""Would a module that was built again do what the original does? Asked before a file promises it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# What every module has; the tensors, children and hooks among them are compared by name below.
_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))
_HOOKS = tuple(sorted(name for name in _MODULE_ATTRIBUTES if name.endswith("_hooks")))
# Left by our own verbs (a conversion report); no forward reads them.
_NOTES = "_tersetorch_"
# Left by torch.compile at what it compiles.
_COMPILED = "_is_torch_compile"
_MISSING = object()


def difference(
    module: nn.Module,
    built: nn.Module,
    overrides: tuple[str, ...] = (),
    ignored: tuple[str, ...] = (),
) -> tuple[str | None, dict[str, Any]]:
    """What of module, its children apart, the module that was built lacks, or None; and the attributes to override.

    built may be on device meta, unless `needs_values` says that it may not.
    """
    if type(module) is not type(built):
        return f"it is a {type(module).__name__}, not a {type(built).__name__}", {}
    if any(getattr(module, name) for name in _HOOKS):
        return "it has hooks", {}
    if _tensors_of(module, ignored) != _tensors_of(built, ignored):
        return "its parameters or buffers differ from those its constructor makes", {}
    for name in module._non_persistent_buffers_set - set(ignored):
        if not same(module._buffers.get(name), built._buffers.get(name)):
            return f"its non-persistent buffer {name!r} differs from the one its constructor makes", {}
    mine, theirs = _attributes(module), _attributes(built)
    found: dict[str, Any] = {}
    for name in sorted((mine.keys() | theirs.keys()) - set(ignored) - module._modules.keys()):
        value = mine.get(name, _MISSING)
        if same(value, theirs.get(name, _MISSING)):
            continue
        if name not in overrides or not isinstance(value, bool | int | float | str | None):
            return f"its attribute {name!r} differs from the one its constructor sets", {}
        found[name] = value
    return None, found


def needs_values(built: nn.Module) -> bool:
    """Whether a module built on device meta lacks numbers that no file holds: non-persistent buffers, plain tensors."""
    return any(
        module._non_persistent_buffers_set or any(isinstance(value, Tensor) for value in _attributes(module).values())
        for module in built.modules()
    )


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(module).items()
        if name not in _MODULE_ATTRIBUTES and not name.startswith(_NOTES) and name != _COMPILED
    }


def _tensors_of(module: nn.Module, ignored: tuple[str, ...]) -> dict[str, Any]:
    parameters = {name: ("parameter", _shape(tensor)) for name, tensor in module._parameters.items()}
    buffers = {
        name: ("passing" if name in module._non_persistent_buffers_set else "buffer", _shape(tensor))
        for name, tensor in module._buffers.items()
        if name not in ignored
    }
    return {**parameters, **buffers}


def _shape(tensor: Tensor | None) -> tuple[int, ...] | None:
    return None if tensor is None else tuple(tensor.shape)


def same(a: Any, b: Any) -> bool:
    """Equal as far as one can tell without trusting the objects: plain values, and containers of them."""
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and not b.is_meta and torch.equal(a.cpu(), b)
    if a is None or isinstance(a, bool | int | float | str | bytes | torch.dtype | torch.device):
        return bool(a == b)
    return callable(a) and not isinstance(a, nn.Module) and a is b
