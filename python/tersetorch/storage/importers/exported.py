"""Exported programs (.pt2), as modules whose layers methods and convert can find."""

from __future__ import annotations

import warnings
from os import PathLike
from typing import Any

import torch
from torch import Tensor, fx, nn

from tersetorch.storage.arguments import path_of
from tersetorch.storage.importers.exported_archive import MODEL, HarmfulError, rewritten

WHERE = "import_exported"
_CONVOLUTIONS: dict[Any, Any] = {
    torch.ops.aten.conv1d.default: nn.Conv1d,
    torch.ops.aten.conv1d.padding: nn.Conv1d,
    torch.ops.aten.conv2d.default: nn.Conv2d,
    torch.ops.aten.conv2d.padding: nn.Conv2d,
}


def import_exported(path: str | PathLike[str]) -> nn.Module:
    """The program that torch.export.save wrote, with plain layers in place of the calls that use their weights.

    An exported program is a list of operations: nothing in it is an nn.Linear that could be pruned, shared or moved to
    another kernel. Here aten.linear, aten.conv1d, aten.conv2d and aten.embedding, whose weight is a parameter of the
    program under a name that ends in ".weight" and which no other operation uses, become nn.Linear, nn.Conv1d,
    nn.Conv2d and nn.Embedding at that name; everything else stays as it was exported, dropout and batch norm in the
    mode that they had then. State dict names are the program's.

    torch.export.load would run code from such a file: it unpickles, and evaluates sizes and names as Python. Here it
    gets nothing but a graph of operators of aten, tersetorch, quantized_decomposed and torchvision, which reach no
    file, and plain tensors, each of them looked at; example inputs are not read. What else a file holds is refused.
    Reading takes at most three times the file's bytes, and the graph's objects.

    Args:
        path: of the .pt2 file.

    Returns:
        A module that computes what the program computes, for inputs that the program was exported for.

    Raises:
        TypeError: path is no path.
        ValueError: the file holds no exported program, more than one, pickled objects, deflated parts, other operators
            or containers, or names and sizes that are more than that.
        FileNotFoundError: there is no such file.
    """
    file = path_of(WHERE, path)
    try:
        archive = rewritten(file)
    except FileNotFoundError:
        raise FileNotFoundError(f"{WHERE}: path must exist, got {path}; pass a file that does") from None
    except HarmfulError as error:
        raise ValueError(
            f"{WHERE}: path must hold one exported program of aten's operators without pickled objects, got {file} "
            f"with {error}; write it with torch.export.save, from a model of plain tensors"
        ) from error
    # Imported here, since it imports torch's compiler for two seconds.
    from torch.export.pt2_archive._package import load_pt2

    try:
        # Not torch.export.load, which falls back to an older form that it unpickles.
        with warnings.catch_warnings():  # about torch's own use of itself
            warnings.simplefilter("ignore", FutureWarning)
            module = load_pt2(archive).exported_programs[MODEL].module(check_guards=False)
        # A module of its own: that of a program refuses train().
        plain = fx.GraphModule(module, module.graph)
        _name_layers(plain)
    except Exception as error:  # whatever torch makes of a graph that fits nothing
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{WHERE}: path must hold an exported program, got {file} ({type(error).__name__}: {reason}); write it "
            "with torch.export.save"
        ) from error
    return plain.eval()


def _name_layers(module: fx.GraphModule) -> None:
    graph = module.graph
    for node in list(graph.nodes):
        built = _layer(module, node)
        if built is None:
            continue
        path, layer, x = built
        layer.train(module.training)
        _put(module, path, layer)
        with graph.inserting_before(node):
            call = graph.call_module(path, (x,))
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        graph.erase_node(node)
    for node in reversed(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    module.recompile()


def _layer(module: fx.GraphModule, node: fx.Node) -> tuple[str, nn.Module, fx.Node] | None:
    """The name, layer and input that stand for a call; None where the call is not that of a layer."""
    if node.op != "call_function":
        return None
    names = [argument.name for argument in node.target._schema.arguments] if hasattr(node.target, "_schema") else []
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    weight, bias = given.get("weight"), given.get("bias")
    path = _parameter(weight, ".weight")
    if path is None or not isinstance(module.get_parameter(f"{path}.weight"), nn.Parameter):
        return None
    held = module.get_submodule(path)
    if bias is not None and _parameter(bias, ".bias") != path:
        return None
    left = {name for name, _ in held.named_parameters()} - ({"weight"} if bias is None else {"weight", "bias"})
    if left or any(True for _ in held.children()) or any(True for _ in held.buffers()):
        return None
    values = module.get_parameter(f"{path}.weight")
    x = given.get("indices") if node.target is torch.ops.aten.embedding.default else given.get("input")
    layer = _build(node.target, given, values)
    if layer is None or not isinstance(x, fx.Node):
        return None
    layer.weight = values
    if bias is not None:
        layer.bias = module.get_parameter(f"{path}.bias")
    return path, layer, x


def _build(target: Any, given: dict[str, Any], weight: Tensor) -> nn.Module | None:
    bias = given.get("bias") is not None
    with torch.device("meta"):
        if target is torch.ops.aten.linear.default and weight.ndim == 2:
            return nn.Linear(weight.shape[1], weight.shape[0], bias=bias)
        if target is torch.ops.aten.embedding.default:
            if given.get("scale_grad_by_freq") or given.get("sparse"):
                return None
            padding = given.get("padding_idx", -1)
            return nn.Embedding(weight.shape[0], weight.shape[1], padding_idx=None if padding == -1 else padding)
        if target in _CONVOLUTIONS:
            groups, size = given.get("groups", 1), weight.shape[2:]
            whole: dict[str, Any] = {
                name: tuple(given[name]) if isinstance(given[name], list | tuple) else given[name]
                for name in ("stride", "padding", "dilation")
                if name in given
            }
            for name, value in whole.items():
                if isinstance(value, tuple) and len(value) == 1:
                    whole[name] = value * len(size)
            layer: nn.Module = _CONVOLUTIONS[target](
                weight.shape[1] * groups, weight.shape[0], tuple(size), groups=groups, bias=bias, **whole
            )
            return layer
    return None


def _parameter(node: Any, suffix: str) -> str | None:
    """The path before suffix of a parameter that one call alone uses."""
    if not isinstance(node, fx.Node) or node.op != "get_attr" or len(node.users) != 1:
        return None
    target = str(node.target)
    return target.removesuffix(suffix) if target.endswith(suffix) else None


def _put(module: nn.Module, path: str, layer: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, layer)
