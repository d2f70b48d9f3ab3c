"""The inputs that a model's layers really get."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

# Beyond this many bytes, a call reuses an input that was kept already, where one has the same geometry.
MAX_BYTES = 1 << 28


@dataclass(frozen=True)
class Inputs:
    """What a model is called with."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, example_inputs: object) -> Inputs:
        """A tensor, a tuple of arguments or a dict of keyword arguments.

        Raises:
            TypeError: it is something else.
        """
        if isinstance(example_inputs, Tensor):
            return cls(args=(example_inputs,))
        if type(example_inputs) is tuple:
            return cls(args=example_inputs)
        if isinstance(example_inputs, Mapping) and all(isinstance(key, str) for key in example_inputs):
            return cls(kwargs=dict(example_inputs))
        raise TypeError(
            "convert: example_inputs must be a tensor, a tuple of arguments or a dict of keyword arguments, "
            f"got {type(example_inputs).__name__}; wrap a single argument in a tuple"
        )

    def copy(self) -> Inputs:
        """The same with tensors of its own, since a model may write into its inputs."""
        return self.map(_copy)

    def map(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        """The same with change(tensor) for every tensor."""
        args, kwargs = pytree.tree_map_only(Tensor, change, (self.args, self.kwargs))
        return Inputs(args, kwargs)

    def run(self, model: nn.Module) -> object:
        """Calls model with them, without gradients."""
        with torch.no_grad():
            return model(*self.args, **self.kwargs)


@contextmanager
def untouched_generators() -> Iterator[None]:
    """Gives torch's, numpy's and Python's random generators back as they were."""
    state, numpy_state = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)


def seeded_run(model: nn.Module, inputs: Inputs) -> object:
    """What model returns for inputs when every generator starts anew, so that two models can be compared."""
    with untouched_generators():
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        return inputs.copy().run(model)


def capture(model: nn.Module, modules: Iterable[nn.Module], inputs: Inputs) -> dict[nn.Module, list[Tensor] | str]:
    """Runs model once and returns the input of every call of each module, in order, or why it cannot be used.

    Attention's fast paths are off meanwhile: they would read weights instead of calling layers.
    """
    calls: dict[nn.Module, list[Tensor] | str] = {module: [] for module in modules}
    kept: dict[object, Tensor] = {}
    held = 0

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal held
        x = args[0] if args else next(iter(kwargs.values()), None)
        seen = calls[module]
        if isinstance(seen, str):
            return
        if not isinstance(x, Tensor) or not _is_plain(x):
            calls[module] = "it is called with something else than a plain tensor"
            return
        geometry = (x.shape, x.stride(), x.dtype)
        if held > MAX_BYTES and geometry in kept:
            seen.append(kept[geometry])
            return
        copied = _copy(x)
        held += copied.untyped_storage().nbytes()
        kept[geometry] = copied
        seen.append(copied)

    hooks = [module.register_forward_pre_hook(record, with_kwargs=True) for module in calls]
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        inputs.copy().run(model)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for hook in hooks:
            hook.remove()
    return calls


def uncalled(model: nn.Module, modules: Iterable[nn.Module], inputs: Inputs) -> set[nn.Module]:
    """Those of modules that model does not call when it runs as it would in use: no hooks, fast paths on."""
    missing = set(modules)

    def watch(module: nn.Module) -> None:
        forward = module.forward

        def counted(*args: Any, **kwargs: Any) -> object:
            missing.discard(module)
            return forward(*args, **kwargs)

        # On the instance, since a hook would switch fast paths off.
        module.forward = counted

    watched = list(missing)
    for module in watched:
        watch(module)
    try:
        inputs.copy().run(model)
    finally:
        for module in watched:
            del module.forward
    return missing


def _copy(x: Tensor) -> Tensor:
    """A copy with the strides of x; the shape's repeats stay repeats."""
    x = x.detach()
    if not _is_plain(x):
        return x.clone()
    compact = x[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in x.stride())]
    copied = torch.empty_strided(compact.shape, compact.stride(), dtype=x.dtype, device=x.device).copy_(compact)
    return copied.expand(x.shape)


def _is_plain(x: Tensor) -> bool:
    return type(x) in (Tensor, nn.Parameter) and x.layout == torch.strided and not x.is_nested
