"""Builds the replacements of layers and the copy of a model that holds them."""

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from tersetorch.conversion.candidates import Candidate
from tersetorch.conversion.walk import weight_name
from tersetorch.methods.modes import switch_off_fast_paths
from tersetorch.nn import FlattenedConv2d
from tersetorch.nn.codebook_module import CodedModule
from tersetorch.nn.low_rank import LowRankModule
from tersetorch.nn.sparse_conv_module import SparseConvBase
from tersetorch.nn.sparse_linear_module import SparseLinearBase
from tersetorch.nn.sparse_module import SparseModule


def build(candidate: Candidate, modules: list[nn.Module], samples: int | None = None) -> list[nn.Module]:
    """One replacement for each of modules, which use one weight: the replacements share what comes from it.

    They are laid out for so many samples at once, or, with None, for a number that the layout chooses.
    """
    layers = [candidate.build(module) for module in modules]
    first = layers[0]
    for layer in layers[1:]:
        for path, tensor in (*first.named_parameters(), *first.named_buffers()):
            owner, _, name = path.rpartition(".")
            if name != "bias":
                setattr(layer.get_submodule(owner), name, tensor)
    for layer in layers:
        if isinstance(layer, SparseModule | CodedModule | FlattenedConv2d) and candidate.layout != layer.plain_layout:
            layer.pack(candidate.layout, **candidate.options(samples))
    return layers


def deep_copy(model: nn.Module, memo: dict[int, Any] | None = None, *, verb: str = "convert") -> nn.Module:
    """copy.deepcopy.

    Args:
        model: any nn.Module.
        memo: as copy.deepcopy takes it.
        verb: what the caller was asked for, with which the error begins.

    Raises:
        ValueError: a member of model cannot be copied.
    """
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:  # whatever the member raises
        raise ValueError(
            f"{verb}: model must be copyable with copy.deepcopy, got {type(error).__name__}: {error}; "
            "remove the hooks of torch.nn.utils.prune, weight_norm or spectral_norm, and detach what it keeps from a "
            "forward pass"
        ) from error


def dense_again(model: nn.Module, kept: Callable[[nn.Module], bool], identities: Iterable[nn.Module] = ()) -> nn.Module:
    """A deep copy of model with the dense forms of its sparse layers and the plain layouts of its flattened ones.

    Where it has none of them it is model itself.

    What was the fastest on one machine is then chosen anew on this one. Layers that use one weight go on doing so, and
    encoder layers whose fast path a conversion switched off have it again.

    Args:
        model: any nn.Module.
        kept: which of these layers stay as they are.
        identities: modules in whose place an nn.ReLU stood, which comes back.

    Raises:
        ValueError: model cannot be copied.
    """
    memo: dict[int, Any] = {}
    weights: dict[int, Tensor] = {}
    unpacked = False
    for layer in model.modules():
        if isinstance(layer, FlattenedConv2d) and layer.layout != layer.plain_layout and not kept(layer):
            copy.deepcopy(layer, memo).pack(layer.plain_layout).relu = False
            unpacked = True
        if not isinstance(layer, SparseLinearBase | SparseConvBase) or kept(layer):
            continue
        dense, source = layer.to_dense(), getattr(layer, layer.parameter_field)
        dense.weight.requires_grad_(source.requires_grad)
        dense.weight = weights.setdefault(id(source), dense.weight)
        if layer.bias is not None:
            dense.bias = copy.deepcopy(layer.bias, memo)
        memo[id(layer)] = dense
    if not weights and not unpacked:
        return model
    memo |= {id(identity): nn.ReLU().train(identity.training) for identity in identities}
    restored = {dense for dense in memo.values() if isinstance(dense, nn.Linear)}
    copied = deep_copy(model, memo)
    for module in copied.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and not restored.isdisjoint(module.modules()):
            module.activation_relu_or_gelu = _fast_activation(module.activation)
    return copied


def _fast_activation(activation: Any) -> int:
    """What nn.TransformerEncoderLayer's constructor notes of its activation: 1, 2, or 0 for no fast path."""
    if activation is functional.relu or isinstance(activation, nn.ReLU):
        return 1
    return 2 if activation is functional.gelu or isinstance(activation, nn.GELU) else 0


def swapped_copy(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """A deep copy of model in which every reference to a key is one to its replacement.

    Replacements are used, not copied; each takes over the training and requires_grad flags of the layer it replaces
    and the copy of its bias, which may be tied to others. Where one lands inside an nn.TransformerEncoderLayer, the
    fast path of that layer and of the encoders around it is switched off: it would read weights instead of calling
    layers, or hand them nested tensors.

    Raises:
        ValueError: model cannot be copied, or its own __deepcopy__ copies layers in some other way.
    """
    memo: dict[int, Any] = {id(module): replacement for module, replacement in replacements.items()}
    for module, replacement in replacements.items():
        _take_over(module, replacement, memo)
    copied = deep_copy(model, memo)
    if not set(replacements.values()) <= set(copied.modules()):
        raise ValueError(
            f"convert: model must hand copy.deepcopy's memo to its layers, got a {type(model).__name__} whose copy "
            "lacks the new ones; convert the part below it"
        )
    switch_off_fast_paths(copied, set(replacements.values()))
    return copied


def _take_over(module: nn.Module, replacement: nn.Module, memo: dict[int, Any]) -> None:
    if type(replacement) is type(module):
        for name, own in module._parameters.items():
            replacement._parameters[name] = copy.deepcopy(own, memo)
        replacement.train(module.training)
        return
    weight = module._parameters.get(weight_name(module))
    bias = module._parameters.get("bias")
    for path, parameter in replacement.named_parameters():
        # Of factors the replacement has the flag already.
        if path.rpartition(".")[2] != "bias" and weight is not None:
            parameter.requires_grad_(weight.requires_grad)
    holder = replacement.second if isinstance(replacement, LowRankModule) else replacement
    if bias is not None and "bias" in holder._parameters:
        holder.bias = copy.deepcopy(bias, memo)
    replacement.train(module.training)
