"""Quantised models of other libraries: which library it is, and the float model in its place."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tersetorch.conversion.swap import deep_copy
from tersetorch.storage.arguments import check_regular, naming, path_of
from tersetorch.storage.importers import bitsandbytes, gguf, torch_ao, torchao
from tersetorch.storage.importers.quantized_weight import QuantizedWeight
from tersetorch.storage.importers.refusal import WHERE, refuse

Source = nn.Module | Mapping[str, object] | str | PathLike[str]


def read_quantized(source: Source) -> dict[str, Tensor | QuantizedWeight]:
    """The weights of a quantised model, exactly as its library computes with them, by the names of its float model.

    - torch.ao.quantization's int8 layers (linear, convolution, embedding; dynamic, static, fused ReLU), per tensor and
      per channel. Scales of activations are left out.
    - torchao's Int8Tensor, IntxUnpackedToInt8Tensor (int1 to int8, by tensor, row or group), its two
      CodebookQuantizedTensor with single numbers and, of a live model, Int4OpaqueTensor (int4 packed for this CPU).
      Others, packed for a GPU above all, are refused.
    - bitsandbytes' 4-bit (NF4, FP4, doubly quantised too) and 8-bit layers, without the library.
    - GGUF files in Q4_0, Q4_1, Q4_K, Q5_0, Q5_1 and IQ4_NL, by the file's own names; Q8_0 and Q6_K as float32 weights,
      since their tables would be larger.

    Every other tensor is passed on as it is. Nothing of the source is executed, no file of another kind is read, and no
    count in one is believed before it is compared with the tensors that are there. No two libraries are mixed.

    Args:
        source: a live model, its state dict, or the path of a .safetensors or .gguf file.

    Raises:
        TypeError: source is none of these.
        ValueError: nothing in source is quantised, or a part is missing, left over or does not fit the others.
        OSError: the file cannot be read.

    Source:
        Formulas and layouts are in tersetorch.storage.importers' torch_ao, torchao, bitsandbytes and gguf. QLoRA
        (2023), section 3, for NF4 and double quantisation.
    """
    if isinstance(source, nn.Module):
        for name, module in source.named_modules():
            torch_ao.check_module(name, module)
        try:
            state = source.state_dict()
        except NotImplementedError as error:  # some of bitsandbytes' layers
            refuse("have a state dict", f"{error}", "import its other layers")
        return _read_state(state, {})
    if isinstance(source, str | PathLike):
        path = path_of(WHERE, source)
        check_regular(WHERE, "source", path)
        if path.suffix == ".gguf":
            with naming(WHERE, path, "name a file that can be read", "pass a .gguf file"):
                return gguf.read_file(path)
        return _read_state(*_load(path))
    if not isinstance(source, Mapping):
        raise TypeError(
            f"{WHERE}: source must be a model, a state dict or a path, got {type(source).__name__}; pass one"
        )
    for name in source:
        if not isinstance(name, str):
            raise TypeError(f"{WHERE}: source must name its tensors, got {name!r:.60}; pass model.state_dict()")
    return _read_state(source, {})


def import_quantized(source: Source, model: nn.Module | None = None) -> nn.Module:
    """The float model whose weights are, to the bit, those that a quantised model computes with.

    Layers are plain torch.nn ones in the dtype that the library computes weights in, or their bias's where that is
    wider; a fused ReLU becomes nn.Sequential(layer, nn.ReLU()), the stubs of torch.ao nn.Identity. Activations are no
    longer quantised. Where that leaves layers of two dtypes (Int4OpaqueTensor computes float32 weights in a bfloat16
    model), .float() makes one of them and changes no weight. tersetorch.convert, save and the other methods take the
    result as any other model.

    Args:
        source: as read_quantized takes it. A live model is left as it is.
        model: for a state dict or a file, the float model it belongs to, which is left as it is: a copy is loaded.

    Raises:
        TypeError: source is none of these, or model no nn.Module where source is no model.
        ValueError: as read_quantized; or source's names, shapes or dtypes are not model's, or a live model is a graph
            whose code quantises by itself.
        OSError: the file cannot be read.
    """
    where = "import_quantized"
    found = read_quantized(source)
    if isinstance(source, nn.Module):
        return _float_copy(source, found)
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{where}: model must be the float nn.Module that source belongs to, got {type(model).__name__}; "
            "pass an instance"
        )
    dense = {name: value.to_dense() if isinstance(value, QuantizedWeight) else value for name, value in found.items()}
    own = model.state_dict()
    for name, tensor in own.items():
        given = dense.get(name)
        if (
            given is None
            or given.shape != tensor.shape
            or torch.promote_types(given.dtype, tensor.dtype) != tensor.dtype
        ):
            got = "none" if given is None else f"{given.dtype} {list(given.shape)}"
            refuse(
                f"hold {name!r} for model's {tensor.dtype} {list(tensor.shape)}", got, "pass the model it belongs to"
            )
    left = sorted(set(dense) - set(own))
    if left:
        refuse("hold no more than model does", repr(left[0]), "pass the model it belongs to")
    copied = deep_copy(model, verb=where)
    copied.load_state_dict(dense)
    return copied


def is_quantized_file(path: Path) -> bool:
    """Whether a safetensors file that can be read has the marks of a library that read_quantized knows."""
    try:
        with safe_open(path, "pt") as file:
            names, metadata = file.keys(), file.metadata() or {}
    except (SafetensorError, OSError):
        return False
    return torchao.NAMES in metadata or any(bitsandbytes.is_mark(name) for name in names)


def _load(path: Path) -> tuple[dict[str, object], dict[str, str]]:
    if path.suffix != ".safetensors":
        raise ValueError(
            f"{WHERE}: path must name a .safetensors or .gguf file, got {str(path)!r}; load another kind "
            "yourself, if you trust it, and pass the state dict"
        )
    with naming(WHERE, path, "name a file that can be read", "pass a .safetensors file"):
        path.open("rb").close()
        try:
            with safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(
                f"{WHERE}: path must name a .safetensors file, got {str(path)!r} ({error}); copy it again"
            ) from error


def _read_state(state: Mapping[str, Any], metadata: Mapping[str, str]) -> dict[str, Tensor | QuantizedWeight]:
    found: dict[str, Tensor | QuantizedWeight]
    if torchao.NAMES in metadata:
        found = torchao.read_file(state, metadata)
        used = set(state)
    else:
        found, used = torch_ao.read_state(state)
        packed, names = bitsandbytes.read_state(state)
        found |= packed
        used |= names
        for name, value in state.items():
            if torchao.is_torchao(value):
                found[name] = torchao.read_tensor(name, value)
                used.add(name)
    for name, value in found.items():
        if isinstance(value, QuantizedWeight):
            value.validate()
        elif name in state and name not in used:
            refuse(f"hold {name!r} once", "it twice")
    if not any(isinstance(value, QuantizedWeight) for value in found.values()):
        refuse("hold quantised weights", "none", "load a float model with load_state_dict")
    for name, value in state.items():
        if name in used:
            continue
        if not isinstance(value, Tensor):
            refuse("hold tensors beside quantised weights", f"{type(value).__name__} as {name!r}")
        found[name] = value.detach()
    return found


def _float_copy(model: nn.Module, found: Mapping[str, Tensor | QuantizedWeight]) -> nn.Module:
    if isinstance(model, torch.fx.GraphModule) and any(torch_ao.is_quantized_module(m) for m in model.modules()):
        refuse(
            "be a model of modules",
            "a graph whose code quantises activations by itself",
            "pass read_quantized's weights to the model it was made from",
        )
    dense: dict[int, Tensor] = {}

    def read(name: str) -> Tensor | None:
        value = found.get(name)
        if isinstance(value, QuantizedWeight):
            value = dense.setdefault(id(value), value.to_dense())
        return value

    memo: dict[int, Any] = {}
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if type(module) in torch_ao.KNOWN:
            memo[id(module)] = torch_ao.float_module(module, read(f"{prefix}weight"), read(f"{prefix}bias"))
        elif type(module).__module__.startswith("bitsandbytes.") and isinstance(
            found.get(f"{prefix}weight"), QuantizedWeight
        ):
            memo[id(module)] = _linear(module, read(f"{prefix}weight"), read(f"{prefix}bias"))
        else:
            for own, parameter in module.named_parameters(recurse=False):
                if torchao.is_torchao(parameter) and id(parameter) not in memo:
                    weight = read(prefix + own)
                    assert weight is not None
                    memo[id(parameter)] = nn.Parameter(weight)
                    bias = module._parameters.get("bias")
                    if bias is not None and bias.dtype != weight.dtype and not torchao.is_torchao(bias):
                        memo[id(bias)] = nn.Parameter(bias.detach().to(weight.dtype), bias.requires_grad)
    copied = deep_copy(model, memo, verb="import_quantized")
    for module in copied.modules():
        shown = module.__dict__.get("extra_repr")  # torchao's, which would read a quantised weight
        if getattr(shown, "__module__", "").startswith("torchao."):
            del module.__dict__["extra_repr"]
    return copied


def _linear(module: nn.Module, weight: Tensor | None, bias: Tensor | None) -> nn.Module:
    assert weight is not None
    if not isinstance(module, nn.Linear):
        refuse("hold linear layers as bitsandbytes' only ones", type(module).__name__, "quantise no others")
    # A bias may be wider than the weight; neither is rounded.
    dtype = weight.dtype if bias is None else torch.promote_types(weight.dtype, bias.dtype)
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.to(dtype))
    if bias is not None:
        layer.bias = nn.Parameter(bias.to(dtype, copy=True))
    return layer.train(module.training)
