"""Exported programs (.pt2), as modules whose layers methods and convert can find."""

from __future__ import annotations

import warnings
from contextlib import suppress
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from torch import fx, nn

from tersetorch.storage.arguments import check_regular, path_of
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
    mode that they had then. State dict names are the program's. What was tied is tied: layers that shared a weight
    share one parameter, and a layer that was called twice is one module.

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
    check_regular(WHERE, "path", file)
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


@dataclass(frozen=True)
class _Call:
    """A call that a layer could stand for.

    Attributes:
        node: the call.
        x: its input.
        weight: its parameter.
        bias: its other parameter, or None.
        arguments: all others by name.
    """

    node: fx.Node
    x: fx.Node
    weight: nn.Parameter
    bias: nn.Parameter | None
    arguments: dict[str, Any]

    @property
    def same(self) -> tuple[Any, ...]:
        """What is alike in the calls of one layer."""
        return self.node.target, id(self.bias), repr(self.arguments)


def _name_layers(module: fx.GraphModule) -> None:
    names = _tied(module)
    graph = module.graph
    now: dict[fx.Node, fx.Node] = {}
    for calls in _calls(module).values():
        layers = _layers(module, calls, names[id(calls[0].weight)])
        for call in calls:
            if layers is None:
                break
            path = layers[call.same]
            with graph.inserting_before(call.node):
                made = graph.call_module(path, (now.get(call.x, call.x),))
            made.meta = dict(call.node.meta)
            call.node.replace_all_uses_with(made)
            now[call.node] = made
            graph.erase_node(call.node)
    for node in reversed(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    module.recompile()


def _tied(module: nn.Module) -> dict[int, list[str]]:
    """Makes parameters that are one tensor under several names one parameter; the names of each, by its id."""
    found: dict[Any, nn.Parameter] = {}
    names: dict[int, list[str]] = {}
    for name, parameter in list(module.named_parameters(remove_duplicate=False)):
        place = (parameter.data_ptr(), parameter.dtype, tuple(parameter.shape), parameter.stride())
        # Empty ones all lie at 0.
        first = found.setdefault(place if parameter.numel() else name, parameter)
        if first is not parameter:
            path, _, own = name.rpartition(".")
            setattr(module.get_submodule(path), own, first)
        names.setdefault(id(first), []).append(name)
    return names


def _calls(module: fx.GraphModule) -> dict[int, list[_Call]]:
    """The calls of layers by the weight's id, of those weights that nothing else uses."""
    held: dict[fx.Node, nn.Parameter] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr" and "." in str(node.target):
            with suppress(AttributeError):  # a buffer or a constant
                held[node] = module.get_parameter(str(node.target))
    calls: dict[int, list[_Call]] = {}
    layers = set()
    for node in module.graph.nodes:
        call = _call(node, held)
        if call is not None:
            calls.setdefault(id(call.weight), []).append(call)
            layers.add(node)
    strange = {id(parameter) for node, parameter in held.items() if not layers.issuperset(node.users)}
    return {
        weight: each
        for weight, each in calls.items()
        if weight not in strange and not any(id(call.bias) in strange for call in each)
    }


def _call(node: fx.Node, held: dict[fx.Node, nn.Parameter]) -> _Call | None:
    """The call of a layer that node is, or None."""
    if node.op != "call_function" or not hasattr(node.target, "_schema"):
        return None
    names = [argument.name for argument in node.target._schema.arguments]
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    weight, bias = given.pop("weight", None), given.pop("bias", None)
    x = given.pop("indices" if node.target is torch.ops.aten.embedding.default else "input", None)
    if weight not in held or (bias is not None and bias not in held) or not isinstance(x, fx.Node) or x in held:
        return None
    return _Call(node, x, held[weight], None if bias is None else held[bias], given)


def _layers(module: fx.GraphModule, calls: list[_Call], names: list[str]) -> dict[tuple[Any, ...], str] | None:
    """Puts the layers of one weight's calls into module: the path of each kind of call; None where one has none.

    The same call comes again where a layer is called again, another one where layers share the weight.
    """
    kinds = {call.same: call for call in calls}
    places: dict[tuple[Any, ...], list[str]] = {}
    left = [name.removesuffix(".weight") for name in names if name.endswith(".weight")]
    for index, (kind, call) in enumerate(kinds.items()):
        fit = [path for path in left if _holds(module.get_submodule(path), call)]
        last = all(other.bias is not call.bias for other in list(kinds.values())[index + 1 :])
        places[kind] = fit if last else fit[:1]  # the names of one layer are those that no other one needs
        left = [path for path in left if path not in places[kind]]
    built = {kind: _build(call.node.target, call) for kind, call in kinds.items()}
    if not all(places.values()) or None in built.values():
        return None
    for kind, call in kinds.items():
        layer = built[kind]
        assert layer is not None
        layer.weight = call.weight
        if call.bias is not None:
            layer.bias = call.bias
        layer.train(module.training)
        for path in places[kind]:
            _put(module, path, layer)
    return {kind: paths[0] for kind, paths in places.items()}


def _holds(held: nn.Module, call: _Call) -> bool:
    """Whether a module of the program is a layer's: its parameters alone."""
    wanted = {"weight": call.weight} | ({} if call.bias is None else {"bias": call.bias})
    own = held._parameters
    alone = not any(True for _ in held.children()) and not any(True for _ in held.buffers())
    return alone and own.keys() == wanted.keys() and all(own[name] is value for name, value in wanted.items())


def _build(target: Any, call: _Call) -> nn.Module | None:
    given, weight, bias = call.arguments, call.weight, call.bias is not None
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


def _put(module: nn.Module, path: str, layer: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, layer)
