"""Training in fixed point: weights, biases, activations, gradients and updates have the numbers of a format."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from typing import Any, cast
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

from tersetorch.formats import FixedFormat
from tersetorch.formats.fixed_format import FixedFormats, as_fixed, note_formats
from tersetorch.methods.arguments import check_choice, check_int, check_model
from tersetorch.methods.parametrization import PLACE, BakedWeight, own_class, parametrization_list
from tersetorch.methods.quantize.fixed_rounding import DTYPES, Rounding, from_state, rounded, to_state
from tersetorch.methods.selection import DEFAULT_TARGETS, Patterns, Target, select
from tersetorch.ops import ROUNDINGS

# The child of a layer that rounds what it reads and computes.
ACTIVATIONS = "fixed_point"
FLOAT = "float"
_STREAMS = 8  # of random bits that a layer may have
_MAX_SEED = 2**40 - 1

# Who rounds a parameter after a step, and the version and the format that it was rounded to last. Held weakly: neither
# a model nor an optimizer lives longer because of it.
_owners: Any = WeakIdKeyDictionary()
_hooked = False

# glibc before 2.38 cannot use what an aligned tensor leaves behind for another of its size: a step on large weights may
# leave some megabytes that are free and yet taken from the system. They go back after so many bytes of rounded weights.
_TRIM_BYTES = 1 << 28
_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
_since_trim = 0


class FixedWeight(BakedWeight):
    """weight = original, which an optimizer's step leaves rounded; what something else put there is rounded here.

    Attributes:
        values: how the original is rounded after a step; to the nearest in forward.
        gradients: how its gradient is rounded, or None.
    """

    def __init__(self, values: Rounding, gradients: Rounding | None) -> None:
        super().__init__()
        self.values = values
        self.gradients = gradients

    def forward(self, original: Tensor) -> Tensor:
        """The weight, of original's shape and dtype."""
        values: Rounding | None = self.values
        if not torch.compiler.is_compiling() and isinstance(original, nn.Parameter):
            follow(self, original)
            # In evaluation it is rounded all the same: what is written through .data has no version.
            if self.training and _owners[original][1:] == (original._version, self.values.format):
                values = None
        return rounded(original, values, self.gradients, nearest=True)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Takes in a weight that is assigned."""
        return weight

    def get_extra_state(self) -> Tensor:
        """Formats, seeds and how far the random bits are."""
        return to_state([self.values, self.gradients])

    def set_extra_state(self, state: Any) -> None:
        """Goes on from there."""
        values, gradients = from_state("FixedWeight", state, 2)
        if values is None:
            raise ValueError("FixedWeight: a state must have a format for the weight, got zeros; load one")
        self.values, self.gradients = values, gradients

    def extra_repr(self) -> str:
        """What it rounds to."""
        return f"format={str(self.values.format)!r}, stochastic={self.values.stochastic}"


class FixedActivations(nn.Module):
    """What rounds a layer's input, its output and the gradients of both; a child of the layer, which hooks call.

    Attributes:
        inputs: how the input is rounded in training, to the nearest in evaluation; None leaves it.
        outputs: the same of the output.
        gradients: how both gradients are rounded, or None.
    """

    def __init__(self, inputs: Rounding | None, outputs: Rounding | None, gradients: Rounding | None) -> None:
        super().__init__()
        self.inputs = inputs
        self.outputs = outputs
        self.gradients = gradients

    def get_extra_state(self) -> Tensor:
        """Formats, seeds and how far the random bits are."""
        return to_state([self.inputs, self.outputs, self.gradients])

    def set_extra_state(self, state: Any) -> None:
        """Goes on from there."""
        self.inputs, self.outputs, self.gradients = from_state("FixedActivations", state, 3)

    def extra_repr(self) -> str:
        """What it rounds to."""
        return FLOAT if self.outputs is None else f"format={str(self.outputs.format)!r}"


def fixed_point(
    model: nn.Module,
    format: str | FixedFormat,
    *,
    rounding: str = "stochastic",
    activations: str | FixedFormat | None = None,
    gradients: str | FixedFormat | None = None,
    targets: Patterns | None = None,
    ignore: Patterns | None = None,
    seed: int = 0,
) -> nn.Module:
    """Makes layers of model train in fixed point, in place; returns model.

    Weights and biases are rounded to the nearest at once, and after every step of any torch optimizer, one built before
    too, to what they should become: w := round(w + update). In training a layer's input, its output (the exact sum,
    rounded once), the gradients of both and those of its parameters are rounded too; in evaluation inputs and outputs
    are, to the nearest, so that results repeat. Sums themselves are float32: with formats of up to 16 bits they differ
    from exact ones by less than a step for all but very long sums. What lies between the layers stays as it is: ReLU
    and max-pooling keep the numbers of a format.

    Small gradients are what a format loses first. A loss that is a sum over the batch, or scaled, with a learning rate
    that is smaller by as much, keeps more of them; so does a format of their own. The gradient passes where values lie
    inside their range.

    Rounding is replayable: the random bits of each tensor follow from seed and from how many values came before, which
    the state dict holds beside the formats, so that a resumed run (fixed_point on the new model, then load_state_dict)
    goes on to the same bits, on any number of threads. They follow the order of memory, so that channels_last draws
    others. Under torch.compile training gives the same bits too, and gains little: Python rounds, between what is
    compiled, so that fullgraph=True is refused. In evaluation nothing breaks the graph.

    Args:
        model: its layers' weights must be float32, must train and must not be tied.
        format: "<IL,FL>" of weights, biases and, where not named below, of everything else.
        rounding: "stochastic", or "nearest" (ties up).
        activations: the format of inputs and outputs; "float" leaves them as they are.
        gradients: the format of gradients; "float" leaves them as they are.
        targets: which Linear or Conv layers, as tt.prune takes them; all of them when left out.
        ignore: which not, the same way.
        seed: from 0 to 2^40 - 1.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a format does not exist, such as <0,8>, a pattern matches nothing, or a weight cannot be handled.
            The model is as it was.

    Source:
        Gupta et al., Deep Learning with Limited Numerical Precision (2015), sections 3 and 4.
    """
    where = "quantize.fixed_point"
    of_values = as_fixed(where, "format", format)
    of_activations = _optional(where, "activations", activations, of_values)
    of_gradients = _optional(where, "gradients", gradients, of_values)
    check_choice(where, "rounding", rounding, ROUNDINGS)
    check_int(where, "seed", seed, 0, _MAX_SEED)
    check_model(where, model)
    if any(isinstance(module, FixedWeight) for module in model.modules()):
        raise ValueError(
            f"{where}: model must not be in fixed point yet, got one that is; call quantize.switch_fixed_point for "
            "another format, or tt.finalize first"
        )
    chosen = select(where, model, targets, ignore)
    for target in chosen:
        _check_target(where, target)
    stochastic = rounding == "stochastic"
    for number, target in enumerate(chosen):
        module, tensor = target.owners[0]

        def rounding_of(f: FixedFormat | None, stream: int, layer: int = number) -> Rounding | None:
            return None if f is None else Rounding(f, stochastic, (seed << 23) + _STREAMS * layer + stream)

        tensors = [tensor] + ["bias"] * (isinstance(module._parameters.get("bias"), nn.Parameter))
        for i, name in enumerate(tensors):
            _attach(module, name, cast(Rounding, rounding_of(of_values, i)), rounding_of(of_gradients, 2 + i))
        if of_activations is not None or of_gradients is not None:
            of_layer = (rounding_of(of_activations, 4), rounding_of(of_activations, 5), rounding_of(of_gradients, 6))
            module.add_module(ACTIVATIONS, FixedActivations(*of_layer).train(module.training))
            module.register_forward_pre_hook(_round_input)
            module.register_forward_hook(_round_output)
    return model


def switch_fixed_point(
    model: nn.Module,
    format: str | FixedFormat,
    *,
    rounding: str | None = None,
    activations: str | FixedFormat | None = None,
    gradients: str | FixedFormat | None = None,
) -> nn.Module:
    """Goes on in another format in the middle of training, in place, as the paper goes on in 20 bits; returns model.

    Optimizers go on, and so do the random bits. Weights keep their values where the new format has them; a coarser one
    rounds them to the nearest.

    Args:
        model: one that fixed_point was called on.
        format: as there, and the next ones too.
        rounding: what it becomes; it stays when left out.
        activations: the format of inputs and outputs, where they were rounded before; format when left out.
        gradients: the same of gradients.

    Raises:
        TypeError, ValueError: as fixed_point, and where model is not in fixed point.

    Source:
        Gupta et al. (2015), section 4.2: CIFAR-10 starts in 16 bits and goes on in 20.
    """
    where = "quantize.switch_fixed_point"
    of_values = as_fixed(where, "format", format)
    of_activations = as_fixed(where, "activations", of_values if activations is None else activations)
    of_gradients = as_fixed(where, "gradients", of_values if gradients is None else gradients)
    if rounding is not None:
        check_choice(where, "rounding", rounding, ROUNDINGS)
    check_model(where, model)
    roundings = list(_roundings(model, of_values, of_activations, of_gradients))
    if not roundings:
        raise ValueError(f"{where}: model must be in fixed point, got one that is not; call quantize.fixed_point first")
    for one, new in roundings:
        one.format = new
        if rounding is not None:
            one.stochastic = rounding == "stochastic"
    with torch.no_grad():
        for _, original in _weights(model):
            original.copy_(of_values.nearest(original))
    return model


def follow(weight: FixedWeight, original: nn.Parameter) -> None:
    """Has the optimizers that step original round it afterwards."""
    global _hooked
    if not _hooked:
        register_optimizer_step_post_hook(_after_step)
        _hooked = True
    known = _owners.get(original)
    if known is None or known[0]() is not weight:
        _owners[original] = ref(weight), -1, None


def release(model: nn.Module) -> None:
    """Takes the rounding of activations off and leaves its formats at the layers; finalize does the rest."""
    for module in model.modules():
        of_layer = module._modules.get(ACTIVATIONS)
        if not isinstance(of_layer, FixedActivations):
            continue
        del module._modules[ACTIVATIONS]
        for hooks, ours in ((module._forward_pre_hooks, _round_input), (module._forward_hooks, _round_output)):
            for key in [key for key, hook in hooks.items() if hook is ours]:
                del hooks[key]
        held = parametrization_list(module, "weight")
        if held is not None and isinstance(held[0], FixedWeight) and of_layer.inputs and of_layer.outputs:
            formats = FixedFormats(held[0].values.format, of_layer.inputs.format, of_layer.outputs.format)
            note_formats(module, formats)


def _optional(where: str, name: str, value: str | FixedFormat | None, default: FixedFormat) -> FixedFormat | None:
    return None if value == FLOAT else as_fixed(where, name, default if value is None else value)


def _check_target(where: str, target: Target) -> None:
    module, tensor = target.owners[0]
    bias = module._parameters.get("bias")
    problem = None
    if len(target.owners) > 1:
        problem = f"must not be tied to another layer, got one of {len(target.owners)}; untie them"
    elif target.compressed is not None:
        problem = "must not be pruned or shared, got one that is; call tt.finalize first"
    elif not isinstance(module, DEFAULT_TARGETS):
        problem = f"must be that of a Linear or Conv layer, got {type(module).__name__}; leave it in float"
    elif module._parameters[tensor].dtype != torch.float32:  # type: ignore[union-attr]
        problem = f"must be float32, got {module._parameters[tensor].dtype}; convert it"  # type: ignore[union-attr]
    elif parametrize.is_parametrized(module, "bias") or ACTIVATIONS in module._modules:
        problem = "must have a plain bias beside it, got a parametrized one; remove that"
    elif bias is not None and bias.dtype != torch.float32:
        problem = f"must have a float32 bias beside it, got {bias.dtype}; convert it"
    elif bias is not None and not bool(bias.isfinite().all()):
        problem = "must have a finite bias beside it, got NaN or infinity; repair the training"
    if problem is not None:
        raise ValueError(f"{where}: the weight of {target.name!r} {problem}, or pass ignore=[{target.name!r}]")


@torch.no_grad()
def _attach(module: nn.Module, tensor: str, values: Rounding, gradients: Rounding | None) -> None:
    place = list(module._parameters).index(tensor)
    original = cast(nn.Parameter, module._parameters[tensor])
    original.copy_(values.format.nearest(original))
    own_class(module)
    weight = FixedWeight(values, gradients)
    parametrize.register_parametrization(module, tensor, weight)
    setattr(parametrization_list(module, tensor), PLACE, place)
    follow(weight, original)


def _weights(model: nn.Module) -> Iterator[tuple[FixedWeight, nn.Parameter]]:
    for module in model.modules():
        if isinstance(module, parametrize.ParametrizationList) and isinstance(module[0], FixedWeight):
            yield module[0], cast(nn.Parameter, module.original)


def _roundings(
    model: nn.Module, values: FixedFormat, activations: FixedFormat, gradients: FixedFormat
) -> Iterator[tuple[Rounding, FixedFormat]]:
    """Every rounding of model with the format that it is to have."""
    for module in model.modules():
        pairs: list[tuple[Rounding | None, FixedFormat]] = []
        if isinstance(module, FixedWeight):
            pairs = [(module.values, values), (module.gradients, gradients)]
        elif isinstance(module, FixedActivations):
            pairs = [(module.inputs, activations), (module.outputs, activations), (module.gradients, gradients)]
        yield from ((one, new) for one, new in pairs if one is not None)


@torch.no_grad()
def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    global _since_trim
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            known: tuple[ReferenceType[FixedWeight], int, FixedFormat | None] | None = _owners.get(parameter)
            weight = None if known is None else known[0]()
            if known is not None and weight is not None:
                weight.values.round_(parameter)
                _owners[parameter] = known[0], parameter._version, weight.values.format
                if parameter.is_cpu:
                    _since_trim += parameter.nbytes
    if _since_trim > _TRIM_BYTES:
        _since_trim = 0
        if _trim is not None:
            _trim(0)


def _round_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    of_layer = cast(FixedActivations, module._modules[ACTIVATIONS])
    if not args or not isinstance(args[0], Tensor) or args[0].dtype not in DTYPES:
        got = args[0].dtype if args and isinstance(args[0], Tensor) else "something else"
        raise TypeError(
            "quantize.fixed_point: a layer's input must be float32 or bfloat16 and given by position, got "
            f"{got}; convert it"
        )
    return (rounded(args[0], of_layer.inputs, of_layer.gradients, not module.training), *args[1:])


def _round_output(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    of_layer = cast(FixedActivations, module._modules[ACTIVATIONS])
    return rounded(output, of_layer.outputs, of_layer.gradients, not module.training)
