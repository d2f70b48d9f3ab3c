"""The layers that factors may stand in for, and the swap."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tersetorch.methods.modes import switch_off_fast_paths
from tersetorch.methods.selection import Patterns, Target, select

_HOOKS = tuple(sorted(name for name in vars(nn.Module()) if name.endswith("_hooks")))


def choose(
    where: str,
    model: nn.Module,
    targets: Patterns | None,
    ignore: Patterns | None,
    kinds: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv2d),
) -> list[Target]:
    """The weights that targets name, each refused where no factors can stand in; of the default the able ones.

    Raises:
        TypeError, ValueError: as select does; a named layer is of another kind, has groups, hooks or a compressed
            weight, is tied, or is model itself; or none is left.
    """
    chosen = select(where, model, targets, ignore, frozen=True)
    if targets is None:
        able = [target for target in chosen if _problem(model, target, kinds) is None]
        if not able:
            raise ValueError(
                f"{where}: model must have a layer that factors can stand in for, got none; the weight of "
                f"{chosen[0].name!r} must {_problem(model, chosen[0], kinds)}"
            )
        return able
    check(where, model, chosen, kinds)
    return chosen


def check(
    where: str,
    model: nn.Module,
    chosen: Iterable[Target],
    kinds: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv2d),
) -> None:
    """Refuses weights that no factors can stand in for, and a model that gradients are gathered of already.

    Raises:
        ValueError: as choose says.
    """
    for target in chosen:
        problem = _problem(model, target, kinds)
        if problem is not None:
            raise ValueError(f"{where}: the weight of {target.name!r} must {problem}, or ignore=[{target.name!r}]")


def module_of(target: Target) -> nn.Linear | nn.Conv2d:
    """The layer of a weight that choose gave."""
    module = target.owners[0][0]
    assert isinstance(module, nn.Linear | nn.Conv2d)
    return module


def swap(model: nn.Module, layers: Mapping[nn.Linear | nn.Conv2d, nn.Module]) -> nn.Module:
    """Puts each value in every place of its key, in model itself."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if isinstance(child, nn.Linear | nn.Conv2d) and child in layers:
                parent._modules[name] = layers[child]
    switch_off_fast_paths(model, set(layers.values()))
    return model


def check_tensors(where: str, argument: str, given: object, chosen: Sequence[Target]) -> dict[str, Tensor]:
    """A finite tensor that is not negative, of the weight's shape, for every chosen weight, by name.

    Raises:
        TypeError: given is no mapping of tensors.
        ValueError: one is missing, or has another shape or other numbers.
    """
    if not isinstance(given, Mapping) or not all(isinstance(value, Tensor) for value in given.values()):
        raise TypeError(
            f"{where}: {argument} must map layers' names to tensors, got {type(given).__name__}; pass what "
            "factorize.gradient_sizes returns"
        )
    for target in chosen:
        tensor, shape = given.get(target.name), tuple(target.weight.shape)
        if tensor is None or tuple(tensor.shape) != shape:
            came = "nothing" if tensor is None else tuple(tensor.shape)
            raise ValueError(f"{where}: {argument} must hold {shape} for {target.name!r}, got {came}; compute it anew")
        if tensor.is_complex() or not bool(tensor.isfinite().all()) or bool((tensor < 0).any()):
            raise ValueError(
                f"{where}: {argument} must be finite and at least 0, got other numbers for {target.name!r}; "
                "compute it anew"
            )
    return {target.name: given[target.name] for target in chosen}


def _problem(model: nn.Module, target: Target, kinds: tuple[type[nn.Module], ...]) -> str | None:
    """What a weight must be and is not, or None."""
    module, tensor = target.owners[0]
    names = " or ".join(f"nn.{kind.__name__}" for kind in kinds)
    if len(target.owners) > 1:
        return "be of one layer alone, got one that layers share; untie them"
    if target.compressed is not None:
        return "be plain, got one that another method compresses; call tt.finalize first"
    if type(module) not in kinds or tensor != "weight":
        return f"be that of an {names}, got {type(module).__name__}.{tensor}; leave it out of targets"
    if getattr(module, "groups", 1) != 1:
        return f"be of one group, got {module.groups}; leave it out of targets"
    if not target.weight.numel():
        return f"hold numbers, got shape {tuple(target.weight.shape)}; leave it out of targets"
    if module is model:
        return "be that of a layer inside model, got model itself; pass nn.Sequential(model)"
    if any(getattr(module, hooks) for hooks in _HOOKS) or "forward" in vars(module):
        return "be of a layer without hooks, which a swap would lose; remove them"
    if any(isinstance(each, DistributedDataParallel) for each in model.modules()):
        return "be factored before DistributedDataParallel wraps the model; call this first"
    return None


def outside_inference() -> torch.inference_mode:
    """A context in which new parameters can train, also in the caller's inference mode."""
    return torch.inference_mode(False)
