"""BinaryConnect: weights that are signs in every pass, while real values below them take the updates."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tersetorch.methods.arguments import check_choice, check_flag
from tersetorch.methods.binarize.binary_weight import BinaryWeight, Scale
from tersetorch.methods.parametrization import (
    PLACE,
    own_class,
    parametrization_list,
)
from tersetorch.methods.selection import Patterns, Target, select


class BinaryConnect:
    """Follows the real values below a model's signs through a training loop.

        binary = tt.binarize.binary_connect(model)
        for x, y in batches:
            loss(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            binary.step()

    step multiplies the optimizer's change of each weight by its Glorot factor sqrt((fan_in + fan_out) / 1.5), where
    that was asked for, and clips the values to [-1, 1], beyond which they would no longer move the signs. Between two
    calls of step the values may only change by the optimizer: what a checkpoint brings in is taken in by reset. A deep
    copy of (model, binary) goes on by itself.

    Attributes:
        names: the layers whose weights are signs.
    """

    def __init__(self, targets: list[Target], glorot: bool) -> None:
        self.names = [target.name for target in targets]
        self._held = [_held(*target.owners[0]) for target in targets]
        self._factors = [_glorot_factor(original) if glorot else 1.0 for original in self._originals()]
        self._before: list[Tensor] = []
        self.reset()

    @torch.no_grad()
    def step(self) -> None:
        """To be called after each optimizer.step()."""
        for original, factor, before in zip(self._originals(), self._factors, self._before, strict=True):
            if factor != 1.0:
                # In place of before + factor * change, which would move a value that did not change by a rounding.
                original.add_(original - before, alpha=factor - 1)
            original.clamp_(-1, 1)
            before.copy_(original)

    @torch.no_grad()
    def reset(self) -> None:
        """Clips the values, and takes them for those that the next change starts from."""
        originals = self._originals()
        for original in originals:
            original.clamp_(-1, 1)
        self._before = [original.detach().clone() for original in originals]

    def _originals(self) -> list[Tensor]:
        """The parameters as they are now: load_state_dict(assign=True) puts new ones in their place."""
        return [held.original for held in self._held]


def binary_connect(
    model: nn.Module,
    targets: Patterns | None = None,
    ignore: Patterns | None = None,
    *,
    stochastic: bool = False,
    scale: Scale = "none",
    glorot: bool = True,
) -> BinaryConnect:
    """Makes weights of model signs in every forward and backward pass, in place; their real values train below.

    Optimizers that hold a weight go on with it: the parameter is the same object, clipped to [-1, 1]. A model trains
    best from real values that are spread over (-1, 1). tt.finalize leaves the signs (times the scale), and for
    stochastic ones the real values, which such nets are evaluated with.

    Args:
        model: its layers' weights must train and must not be tied.
        targets: which, as tt.prune takes them; all linear and convolutional layers when left out.
        ignore: which not, the same way.
        stochastic: whether training draws each sign, +1 with probability clip((w + 1) / 2, 0, 1).
        scale: "none", or "row" for signs times each row's mean |w| (binary-weight networks of XNOR-Net).
        glorot: whether step enlarges changes as the authors' code does with Adam; leave it False for plain SGD rates.

    Returns:
        What is stepped in the loop.

    Raises:
        TypeError: model is no module, or a flag is no bool.
        ValueError: targets or ignore match nothing, a weight cannot be handled, or scale comes with stochastic.

    Source:
        Courbariaux, Bengio, David, BinaryConnect (2015), algorithm 1; the Glorot factors are section 2.5's, as in the
        authors' code.
    """
    return connect("binarize.binary_connect", model, targets, ignore, stochastic, scale, glorot)


def connect(
    where: str,
    model: nn.Module,
    targets: Patterns | None,
    ignore: Patterns | None,
    stochastic: bool,
    scale: Scale,
    glorot: bool,
) -> BinaryConnect:
    """binary_connect for the caller that errors name."""
    check_flag(where, "stochastic", stochastic)
    check_flag(where, "glorot", glorot)
    check_choice(where, "scale", scale, ("none", "row"))
    if stochastic and scale != "none":
        raise ValueError(f"{where}: scale must be 'none' for stochastic signs, got {scale!r}; leave one of them out")
    chosen = select(where, model, targets, ignore)
    for target in chosen:
        if len(target.owners) > 1:
            raise ValueError(
                f"{where}: the weight of {target.name!r} must not be tied to another layer, got one of "
                f"{len(target.owners)}; untie them, or pass ignore=[{target.name!r}]"
            )
        if target.compressed is not None:
            raise ValueError(
                f"{where}: the weight of {target.name!r} must not be pruned or shared, got one that is; call "
                f"tt.finalize first, or pass ignore=[{target.name!r}]"
            )
    for target in chosen:
        module, tensor = target.owners[0]
        place = list(module._parameters).index(tensor)
        own_class(module)
        parametrize.register_parametrization(module, tensor, BinaryWeight(stochastic, scale))
        setattr(parametrization_list(module, tensor), PLACE, place)
    return BinaryConnect(chosen, glorot)


def _held(module: nn.Module, tensor: str) -> parametrize.ParametrizationList:
    held = parametrization_list(module, tensor)
    assert held is not None
    return held


def _glorot_factor(weight: Tensor) -> float:
    """sqrt((fan_in + fan_out) / 1.5), a kernel's positions counted in both."""
    positions = weight.shape[2:].numel()
    return float(((weight.shape[0] + weight.shape[1]) * positions / 1.5) ** 0.5)
