"""Converted models as ONNX files of standard operators."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from tersetorch.conversion.convert import convert
from tersetorch.conversion.swap import deep_copy
from tersetorch.methods import finalize
from tersetorch.nn import ClusteredConv2d, SignMaxPool2d
from tersetorch.nn.fixed_module import FixedPointModule
from tersetorch.nn.low_rank import LowRankModule
from tersetorch.nn.sign_module import SignModule
from tersetorch.storage.arguments import target_of, write_whole
from tersetorch.storage.inspection import inspect
from tersetorch.storage.writer import save

WHERE = "export_onnx"
OPSET = 18
MOST_BYTES = 2**31 - 2**20  # of one protobuf message, with room for the graph


@dataclass(frozen=True)
class OnnxExport:
    """What an ONNX file holds, and what it cannot.

    Attributes:
        onnx_bytes: of the file.
        terse_bytes: of the .terse file that tersetorch.save writes of the same model.
        lost: for each layer that ran from a compressed weight, what became of it.
    """

    onnx_bytes: int
    terse_bytes: int
    lost: dict[str, str]

    def __str__(self) -> str:
        times = self.onnx_bytes / self.terse_bytes
        lines = [f"{self.onnx_bytes:,} bytes, {times:.3g} times the {self.terse_bytes:,} of the .terse file"]
        return "\n".join([*lines, *(f"{name}: {words}" for name, words in self.lost.items())])


def export_onnx(
    model: nn.Module,
    example_inputs: Tensor | tuple[Any, ...] | Mapping[str, Any],
    path: str | os.PathLike[str],
    *,
    dynamic_batch: bool = True,
) -> OnnxExport:
    """Writes model as ONNX of standard operators: every compressed layer as the dense one with its exact weight.

    ONNX has no operator for sparse weights, shared values or packed signs, so the file is as large as the dense model
    and runs as fast as that; what is lost is said in the result. The values of the weights stay: zeros stay zeros,
    shared values shared, so that a runtime that finds them may use them. Fixed-point layers and packed signs round
    what flows between layers, which no standard operator does likewise: they are refused.

    Args:
        model: trained, finalized or not, converted or not. It is not changed.
        example_inputs: as in tersetorch.convert; a batch of one will do.
        path: the .onnx file to write.
        dynamic_batch: the first dimension of every input tensor may be of any size, the same for all.

    Raises:
        TypeError: model is no nn.Module, or example_inputs is none of the three.
        ValueError: a layer has no standard form, the model cannot be exported, or the file would exceed 2 GiB.
        ModuleNotFoundError: onnx or onnxscript is not installed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{WHERE}: model must be an nn.Module, got {type(model).__name__}; pass the network")
    args, kwargs = _arguments(example_inputs)
    target = target_of(WHERE, path)
    try:
        import onnxscript  # noqa: F401  (torch.onnx needs it)
    except ImportError as error:
        raise ModuleNotFoundError(
            f"{WHERE}: ONNX must be written by onnx and onnxscript, got no such packages; pip install onnx onnxscript"
        ) from error
    plain = finalize(deep_copy(model, verb=WHERE)).eval()
    for name, layer in plain.named_modules():
        if isinstance(layer, SignModule | SignMaxPool2d | FixedPointModule):
            raise ValueError(
                f"{WHERE}: every layer must have a standard form, got {type(layer).__name__} at {name!r}, which rounds "
                "what flows through it; export the model as it was before that conversion"
            )
    dense = _dense(convert(plain, plan={})).eval()
    lost = _lost(plain, dense)
    dynamic, traced = None, (args, kwargs)
    if dynamic_batch:
        dynamic, traced = _dynamic(traced), _two_rows(traced)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's own exporter
            program = torch.export.export(dense, *traced, dynamic_shapes=dynamic)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        fix = "; pass dynamic_batch=False for a file of this batch alone" if dynamic_batch else ""
        raise ValueError(f"{WHERE}: model must pass torch.export, got {type(error).__name__}: {reason}{fix}") from error
    with torch.no_grad():
        old, new = plain(*args, **kwargs), dense(*args, **kwargs)
    for first, second in zip(*(torch.utils._pytree.tree_leaves(outputs) for outputs in (old, new)), strict=True):
        if isinstance(first, Tensor) and not torch.allclose(first, second, rtol=1e-3, atol=1e-3 * _size(first)):
            raise ValueError(
                f"{WHERE}: the dense form must give the model's outputs, got a difference of "
                f"{_size(first - second):.3g}; export the model as it was before it was converted"
            )
    ours = [node for node in program.graph.nodes if str(node.target).startswith("tersetorch.")]
    if ours:
        raise ValueError(
            f"{WHERE}: every layer must have a standard form, got {ours[0].target} in "
            f"{_module_of(ours[0]) or type(model).__name__}; export the model as it was before that conversion"
        )
    if sum(value.numel() * value.element_size() for value in program.state_dict.values()) > MOST_BYTES:
        raise ValueError(f"{WHERE}: the weights must fit a file of 2 GiB, got more; export parts of the model")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(program, (), file, opset_version=OPSET, external_data=False, verbose=False, dynamo=True)
        data = file.read_bytes()
        save(model, Path(folder) / "model.terse")
        terse_bytes = inspect(Path(folder) / "model.terse").file_bytes
    write_whole(WHERE, target, data)
    return OnnxExport(len(data), terse_bytes, lost)


def _arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, tuple):
        return example_inputs, {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    raise TypeError(
        f"{WHERE}: example_inputs must be a tensor, a tuple of arguments or a dict of keyword arguments, got "
        f"{type(example_inputs).__name__}; pass what the model is called with"
    )


def _dynamic(inputs: Any) -> Any:
    """Dynamic shapes for every tensor of the arguments: its first dimension is the batch."""
    batch = torch.export.Dim.DYNAMIC
    args, kwargs = torch.utils._pytree.tree_map(
        lambda value: {0: batch} if isinstance(value, Tensor) and value.ndim else None, inputs
    )
    return args or kwargs


def _two_rows(inputs: Any) -> Any:
    """The same arguments with a batch of two for one of one, whose size the exporter would take for a constant."""
    batched = [x for x in torch.utils._pytree.tree_leaves(inputs) if isinstance(x, Tensor) and x.ndim]
    if any(len(x) != 1 for x in batched):
        return inputs
    return torch.utils._pytree.tree_map(lambda x: torch.cat([x, x]) if isinstance(x, Tensor) and x.ndim else x, inputs)


def _dense(model: nn.Module) -> nn.Module:
    """Model with the plain forms of the layers of ours that convert left.

    Thin layers are plain ones already, and what rounds activations has no plain form.
    """
    if isinstance(model, LowRankModule | ClusteredConv2d | SignModule | SignMaxPool2d | FixedPointModule):
        return model
    if _is_ours(model) and hasattr(model, "to_dense"):
        plain: nn.Module = cast(Any, model).to_dense()
        return nn.Sequential(plain, nn.ReLU()) if getattr(model, "relu", False) else plain
    for name, child in model.named_children():
        setattr(model, name, _dense(child))
    return model


def _size(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def _is_ours(layer: nn.Module) -> bool:
    return type(layer).__module__.startswith("tersetorch.nn")


def _lost(converted: nn.Module, dense: nn.Module) -> dict[str, str]:
    """Words for each layer of ours that has a plain one in its place now."""
    plain = dict(dense.named_modules())
    return {
        name: f"{type(layer).__name__} becomes {_kinds(plain[name])}: dense weight, no kernel of ours"
        for name, layer in converted.named_modules()
        if _is_ours(layer) and name in plain and type(plain[name]) is not type(layer)
    }


def _kinds(layer: nn.Module) -> str:
    parts = list(layer.children()) if isinstance(layer, nn.Sequential) else [layer]
    return " and ".join(type(part).__name__ for part in parts)


def _module_of(node: Any) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]) if stack else ""
