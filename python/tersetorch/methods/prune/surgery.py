"""Prunes weights and lets them return while the model trains."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from tersetorch.methods.arguments import check_flag, check_int, check_number
from tersetorch.methods.distributed import number_of_rank_0, take_from_rank_0
from tersetorch.methods.parametrization import LiveWeight, attach, live_weight
from tersetorch.methods.selection import Patterns, PerPattern, Target, assign, select

# What is at most PRUNE times the threshold goes, what is above SPLICE times it returns.
PRUNE, SPLICE = 0.9, 1.1
STATE = {"iteration", "active", "thresholds", "generator"}

# The modules that hold a tensor, and its name there.
Owners: TypeAlias = tuple[tuple[nn.Module, str], ...]


@dataclass(frozen=True)
class _Layer:
    """What one threshold rules.

    Attributes:
        name: of the weight.
        tensors: the weight, then the biases masked with it.
    """

    name: str
    tensors: tuple[Owners, ...]


_SERIALS = itertools.count()


class DynamicSurgery:
    """Masks small weights, which train on unseen and return once they have grown.

    With mu the mean and sigma the population standard deviation of |w| over the weights of a layer that are not zero,
    both taken once, when the surgery begins, a layer has the threshold and the mask T

        t = max(mu + c_rate * sigma, 0)
        T = 0 where |w| <= 0.9 t,  1 where |w| > 1.1 t,  as it was in between

    The layer computes with T * w and so does the gradient of its inputs, but all of w trains, by the whole gradient:
    w <- w - lr * dL/d(T * w). That lets a weight grow back that was pruned too soon. Momentum and weight decay act on
    pruned weights as on the others.

    The masks are set at construction, which is iteration 0; the n-th call of step is iteration n and sets them anew
    with probability (1 + gamma * n)^-power, as long as n < iter_stop. At iter_stop, or when finish is called, the
    surgery is over: the masks stay as they are and pruned weights have no gradient any more. Training can go on.

    Every weight of a layer can return, also one that another method pruned before. Building another surgery on the same
    layers takes them over and ends the one before at its next step. A run that is resumed from the states of model,
    optimizer and surgery gives the same bits as one that was not stopped: build the surgery first, which attaches the
    masks, then load.

    Where convolutions and linear layers are cut together, gradients vanish. Cut them in turn; prune.only keeps the
    other layers still meanwhile, if that is wanted.

    Example:
        for kind, c_rate, steps in ((nn.Conv2d, 1.0, 10_000), (nn.Linear, 3.0, 14_000)):
            surgery = DynamicSurgery(model, c_rate, targets=kind, iter_stop=steps)
            for x, y in batches(steps):
                loss(model(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()
                surgery.step()

    Under torch.distributed every rank has rank 0's draws and masks: construction and step are collective calls.

    Args:
        model: as in prune.magnitude; changed in place.
        c_rate: standard deviations from the mean to the threshold, finite, also below 0; or one such number for each
            pattern, which then stands for targets too, as in prune.magnitude.
        gamma: how fast the masks come to rest, at least 0.
        power: likewise, at least 0.
        iter_stop: the iteration at which the surgery is over, at least 1.
        biases: masks the biases of the layers too, and counts them in mu and sigma, as the authors' code does. Without
            it they are left alone, as all other methods leave them: a layer's few biases seldom pay for what they do,
            and no sparse layer saves them.
        targets: as in prune.magnitude.
        ignore: as in prune.magnitude.
        seed: of the draws, at least 0; they come from a generator of the surgery's own.
        broadcast: False where each rank of torch.distributed trains a model of its own.

    Raises:
        TypeError, ValueError: an argument is of another type or outside its range, or as prune.magnitude; a bias that
            is to be masked must be a plain parameter without NaN too. A weight that is shared or frozen cannot be cut.
            The model is as it was.

    Source:
        Guo, Yao, Chen, Dynamic Network Surgery for efficient DNNs (2016), equations 2 to 4; the threshold, and the
        biases, as the authors' code has them. Where we differ: one draw is for all layers, and the gradient of pruned
        weights ends with the surgery, which changes no output unless they return.
    """

    def __init__(
        self,
        model: nn.Module,
        c_rate: float | PerPattern[float] = 3.0,
        *,
        gamma: float = 1e-3,
        power: float = 1.0,
        iter_stop: int = 10_000,
        biases: bool = False,
        targets: Patterns | None = None,
        ignore: Patterns | None = None,
        seed: int = 0,
        broadcast: bool = True,
    ) -> None:
        where = "prune.DynamicSurgery"
        check_number(where, "gamma", gamma, 0, math.inf)
        check_number(where, "power", power, 0, math.inf)
        check_int(where, "iter_stop", iter_stop, 1)
        check_int(where, "seed", seed, 0, 2**63 - 1)
        check_flag(where, "biases", biases)
        check_flag(where, "broadcast", broadcast)
        chosen = _choose(where, model, c_rate, targets, ignore)
        self._layers = [_layer(where, target, biases) for target, _ in chosen]
        self._thresholds = {
            layer.name: _threshold(layer, rate) for layer, (_, rate) in zip(self._layers, chosen, strict=True)
        }
        self.model = model
        self.gamma = float(gamma)
        self.power = float(power)
        self.iter_stop = iter_stop
        self.broadcast = broadcast
        self._iteration = 0
        self._generator = torch.Generator().manual_seed(seed)
        self._serial = next(_SERIALS)
        for owners in self._tensors():
            attach(owners)
        self._set_active(True)
        self._cut(where, self._lives(where))

    @property
    def iteration(self) -> int:
        """How often step was called."""
        return self._iteration

    @property
    def active(self) -> bool:
        """Whether masks may still change."""
        return self._active

    @property
    def thresholds(self) -> dict[str, float]:
        """The threshold t of each layer."""
        return dict(self._thresholds)

    def step(self) -> None:
        """Counts an iteration and sets the masks anew when the draw says so; call it after the optimizer's step.

        Once the surgery is over it only counts.

        Raises:
            ValueError: a weight is no longer finite, or was finalized or shared since; nothing has changed then.
        """
        where = "prune.DynamicSurgery.step"
        if self._active and any(
            live.compressed.surgery != self._serial for held in self._lives(where) for live in held
        ):
            self.finish()  # another surgery took a layer over
        if self._active and self._iteration + 1 < self.iter_stop:
            lives = self._lives(where)
            before = self._generator.get_state()
            draw = torch.rand(1, generator=self._generator, dtype=torch.float32).item()
            if self.broadcast:
                draw = number_of_rank_0(self.model, draw, lives[0][0].original.device)
            if draw < (1 + self.gamma * (self._iteration + 1)) ** -self.power:
                try:
                    self._cut(where, lives)
                except ValueError:
                    self._generator.set_state(before)
                    raise
        self._iteration += 1
        if self._iteration >= self.iter_stop:
            self.finish()

    def finish(self) -> None:
        """Ends the surgery: the masks stay and pruned weights have no gradient. Call it before weights are shared.

        Once the surgery is over it does nothing.
        """
        if self._active:
            self._set_active(False)

    def state_dict(self) -> dict[str, Any]:
        """Where the surgery stands, what it measured at the start, and its generator; the masks are in the model's."""
        return {
            "iteration": self._iteration,
            "active": self._active,
            "thresholds": dict(self._thresholds),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state that state_dict gave; load the model's own state as well.

        Raises:
            TypeError: the state, or something in it, is of another type.
            ValueError: the state is not of a DynamicSurgery of these layers.
        """
        where = "prune.DynamicSurgery.load_state_dict"
        if not isinstance(state, Mapping):
            raise TypeError(f"{where}: state must be a dict, got {type(state).__name__}; pass what state_dict gave")
        if set(state) != STATE:
            raise ValueError(f"{where}: state must hold {sorted(STATE)}, got {sorted(state)}; pass a surgery's state")
        check_int(where, "state['iteration']", state["iteration"], 0)
        check_flag(where, "state['active']", state["active"])
        thresholds = state["thresholds"]
        if not isinstance(thresholds, Mapping) or set(thresholds) != set(self._thresholds):
            got = sorted(thresholds) if isinstance(thresholds, Mapping) else type(thresholds).__name__
            raise ValueError(
                f"{where}: state['thresholds'] must be of {sorted(self._thresholds)}, got {got}; "
                "build the surgery with the same targets"
            )
        for name, value in thresholds.items():
            check_number(where, f"state['thresholds'][{name!r}]", value, 0, math.inf)
        generator = torch.Generator()
        try:
            generator.set_state(state["generator"])
        except (TypeError, RuntimeError) as error:
            raise ValueError(
                f"{where}: state['generator'] must be a generator's state, got {type(state['generator']).__name__}; "
                "pass what state_dict gave"
            ) from error
        self._iteration = state["iteration"]
        self._thresholds = {layer.name: float(thresholds[layer.name]) for layer in self._layers}
        self._generator = generator
        self._set_active(state["active"])

    def _set_active(self, active: bool) -> None:
        self._active = active
        for owners in self._tensors():
            live = live_weight(*owners[0])
            # Else it was finalized, or another surgery took it over.
            if live is not None and (active or live.compressed.surgery == self._serial):
                live.compressed.dense_gradient = active
                live.compressed.surgery = self._serial if active else None

    def _tensors(self) -> list[Owners]:
        return [owners for layer in self._layers for owners in layer.tensors]

    def _lives(self, where: str) -> list[list[LiveWeight]]:
        """The weight of each layer and the biases masked with it."""
        return [[_live(where, layer.name, owners) for owners in layer.tensors] for layer in self._layers]

    @torch.no_grad()
    def _cut(self, where: str, lives: list[list[LiveWeight]]) -> None:
        masks = []
        fresh = []
        for layer, held in zip(self._layers, lives, strict=True):
            threshold = self._thresholds[layer.name]
            for live in held:
                _check_finite(where, layer.name, live.tensor, live.original)
                size = live.original.abs()
                size = size.float() if size.dtype in (torch.float16, torch.bfloat16) else size
                mask = live.compressed.mask
                fresh.append((mask & (size > PRUNE * threshold)) | (size > SPLICE * threshold))
                masks.append(mask)
        for mask, new in zip(masks, fresh, strict=True):
            mask.copy_(new)  # in place, so that compiled models see it
        if self.broadcast:
            take_from_rank_0(self.model, masks)


def _choose(
    where: str, model: nn.Module, c_rate: float | PerPattern[float], targets: Patterns | None, ignore: Patterns | None
) -> list[tuple[Target, float]]:
    if not isinstance(c_rate, Mapping):
        check_number(where, "c_rate", c_rate, -math.inf, math.inf)
        return [(target, float(c_rate)) for target in select(where, model, targets, ignore)]
    if targets is not None:
        raise ValueError(
            f"{where}: c_rate must be one number where targets is given, got a mapping; leave one of them out"
        )
    for pattern, rate in c_rate.items():
        check_number(where, f"c_rate[{pattern!r}]", rate, -math.inf, math.inf)
    return assign(where, "c_rate", model, c_rate, ignore)


def _layer(where: str, target: Target, biases: bool) -> _Layer:
    live = live_weight(*target.owners[0])
    if live is not None:
        if live.compressed.codebook is not None:
            raise ValueError(
                f"{where}: the weight of {target.name!r} must not be shared, got a codebook; share it after the "
                f"surgery, or pass ignore=[{target.name!r}]"
            )
        _check_finite(where, target.name, live.tensor, live.original)  # pruned ones too, which may return
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for module, tensor in target.owners if biases else ():
        name = tensor.replace("weight", "bias")
        bias = _bias(where, target.name, module, name)
        if bias is not None:
            found.setdefault(id(bias), []).append((module, name))
    return _Layer(target.name, (target.owners, *map(tuple, found.values())))


def _bias(where: str, layer: str, module: nn.Module, name: str) -> Tensor | None:
    live = live_weight(module, name)
    bias = module._parameters.get(name) if live is None else live.original
    if bias is not None:
        _check_finite(where, layer, name, bias)
        if not bias.requires_grad:
            raise ValueError(
                f"{where}: the {name} of {layer!r} must not be frozen, got one that this would change; call "
                "requires_grad_(True) on it, or pass biases=False"
            )
    elif isinstance(getattr(module, name, None), Tensor):
        raise ValueError(
            f"{where}: the {name} of {layer!r} must be a parameter, got a tensor that something else computes; "
            "remove that, or pass biases=False"
        )
    return bias


def _check_finite(where: str, layer: str, tensor: str, values: Tensor) -> None:
    if not bool(values.isfinite().all()):
        raise ValueError(f"{where}: the {tensor} of {layer!r} must be finite, got NaN or infinity; repair the training")


def _threshold(layer: _Layer, c_rate: float) -> float:
    tensors = (getattr(*owners[0]).detach().flatten().double() for owners in layer.tensors)
    sizes = torch.cat([tensor[tensor != 0].abs() for tensor in tensors])
    if not sizes.numel():
        return 0.0
    return max(float(sizes.mean() + c_rate * sizes.std(correction=0)), 0.0)


def _live(where: str, layer: str, owners: Owners) -> LiveWeight:
    live = live_weight(*owners[0])
    tensor = owners[0][1]
    if live is None:
        raise ValueError(
            f"{where}: the {tensor} of {layer!r} must carry its mask, got a finalized one; "
            "call finish first, or build another surgery"
        )
    if live.compressed.codebook is not None:
        raise ValueError(
            f"{where}: the {tensor} of {layer!r} must not be shared, got a codebook; call finish before sharing"
        )
    return live
