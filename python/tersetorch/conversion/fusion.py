"""ReLU that follows a layer: computed by the sparse layer itself, or in the memory of what a dense one returns."""

from __future__ import annotations

import dis
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from tersetorch.conversion.swap import deep_copy
from tersetorch.conversion.walk import carries_hooks
from tersetorch.nn.codebook_module import CodedModule
from tersetorch.nn.sparse_module import SparseModule

_TORCH = str(Path(torch.__file__).parent)
# Names whose answer on what is traced may not be that on a tensor, or that ask how the model is run.
_QUESTIONS = {"isinstance", "issubclass", "hasattr", "getattr", "callable", "type", "is_grad_enabled"}
# What these return is theirs to give away: no input, and nothing that their gradients need.
# Layers that have a ReLU of their own.
OURS = (SparseModule, CodedModule)

_DENSE = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
)


@dataclass(frozen=True)
class Fusion:
    """What became of a model's ReLUs, by name.

    Attributes:
        fused: sparse layer -> the nn.ReLU that it computes now.
        in_place: the nn.ReLUs that now overwrite their inputs.
    """

    fused: Mapping[str, str] = field(default_factory=dict)
    in_place: tuple[str, ...] = ()


def fuse(model: nn.Module, layers: Iterable[nn.Module]) -> Fusion:
    """Lets those of layers compute the ReLU that follows them, and leaves an nn.Identity in its place.

    Other nn.ReLUs overwrite what a layer or batch normalisation returned. Outputs keep their bits, and gradients too.

    That a ReLU follows is read from the model's graph, as torch.fx sees it in training and in evaluation mode; where it
    sees none, nothing changes. A graph shows one path only, that of the arguments it is traced with. So a layer and its
    ReLU must be children of one module whose forward, with the functions it calls, cannot branch, and no other method
    of it or of the modules around it may name the layer. Nobody else may use what the layer returns, and neither they
    nor the modules around them may carry hooks. A ReLU that is called in several places is fused where all of its
    layers are among layers.
    """
    sparse = {layer for layer in layers if isinstance(layer, OURS)}
    for layer in sparse:
        layer.relu = False
    modules = dict(model.named_modules())
    fused: dict[str, str] = {}
    in_place = []
    for name, before in _takers(model, nn.ReLU).items():
        producers = [modules[producer] for producer in before]
        relu = modules[name]
        if sparse.issuperset(producers):
            for producer, layer in zip(before, producers, strict=True):
                layer.relu = True
                fused[producer] = name
            _put(model, relu, nn.Identity().train(relu.training))
        elif not relu.inplace and all(type(p) in _DENSE or isinstance(p, OURS) for p in producers):
            relu.inplace = True
            in_place.append(name)
    return Fusion(fused, tuple(in_place))


def unfused(model: nn.Module) -> tuple[set[nn.Module], set[nn.Module]]:
    """The sparse layers with a ReLU of their own that fuse made, and the nn.Identitys that stand where it stood."""
    if not any(isinstance(module, OURS) and module.relu for module in model.modules()):
        return set(), set()
    modules = dict(model.named_modules())
    layers: set[nn.Module] = set()
    identities = set()
    for name, before in _takers(model, nn.Identity).items():
        producers = {modules[producer] for producer in before}
        if all(isinstance(producer, OURS) and producer.relu for producer in producers):
            layers |= producers
            identities.add(modules[name])
    return layers, identities


def _takers(model: nn.Module, kind: type[nn.Module]) -> dict[str, list[str]]:
    """The modules of a kind that only ever take what other modules hand to nobody else: name -> those modules."""
    if not any(type(module) is kind for module in model.modules()):
        return {}
    callees: dict[CodeType, set[CodeType]] = {}
    seen = [_takers_in(graph, model, kind) for graph in _graphs(model, callees)]
    return {
        name: before
        for name, before in seen[0].items()
        if all(other.get(name) == before for other in seen) and all(_has_one_path(model, n, callees) for n in before)
    }


def _has_one_path(model: nn.Module, name: str, callees: Mapping[CodeType, set[CodeType]]) -> bool:
    """Whether the module that holds layer `name` always does with it what it did while it was traced."""
    holder = model.get_submodule(_parent(name))
    forward: Any = type(holder).forward
    if "forward" in vars(holder) or not isinstance(forward, FunctionType):
        return False
    ran, left = set[CodeType](), [forward.__code__]
    while left:
        code = left.pop()
        if code not in ran:
            ran.add(code)
            left.extend(callees.get(code, ()))
    if any(_branches(code) for code in ran):
        return False
    attribute = name.rpartition(".")[2]
    path = name.split(".")
    around = [model.get_submodule(".".join(path[:depth])) for depth in range(len(path))]
    return not any(_names(code, attribute) for module in around for code in _methods(module) - ran)


def _branches(code: CodeType) -> bool:
    """Whether what code does may depend on its arguments, on a flag, or on what kind of value something is."""
    jumps = any("JUMP" in each.opname and "IF" in each.opname for each in dis.get_instructions(code))
    return jumps or bool(_QUESTIONS & set(code.co_names)) or any(map(_branches, _inner(code)))


def _methods(module: nn.Module) -> set[CodeType]:
    """The code of the methods that module's classes define, torch's own and what builds and runs it apart."""
    kinds = [kind for kind in type(module).__mro__ if not kind.__module__.startswith("torch.")]
    members = [value for kind in kinds for name, value in vars(kind).items() if name not in ("__init__", "forward")]
    members = [value.fget if isinstance(value, property) else value for value in members]
    members = [getattr(value, "__func__", value) for value in members]
    return {value.__code__ for value in members if isinstance(value, FunctionType)}


def _names(code: CodeType, attribute: str) -> bool:
    return attribute in code.co_names or attribute in code.co_consts or any(_names(c, attribute) for c in _inner(code))


def _inner(code: CodeType) -> Iterator[CodeType]:
    return (value for value in code.co_consts if isinstance(value, CodeType))


def _takers_in(graph: fx.Graph, model: nn.Module, kind: type[nn.Module]) -> dict[str, list[str]]:
    calls: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls.setdefault(str(node.target), []).append(node)
    hooked = [module for module in model.modules() if carries_hooks(module)]
    untouchable = {inner for module in hooked for inner in module.modules()}
    found = {}
    for name, nodes in calls.items():
        module = model.get_submodule(name)
        if type(module) is not kind or "forward" in vars(module) or module in untouchable:
            continue
        before = [_producer(node) for node in nodes]
        names = sorted({producer for producer in before if producer is not None})
        if None not in before and all(
            _parent(producer) == _parent(name)
            and model.get_submodule(producer) not in untouchable
            and all(_user(call) == name for call in calls[producer])
            for producer in names
        ):
            found[name] = names
    return found


def _producer(node: fx.Node) -> str | None:
    """The module whose output is the one argument of a call."""
    if len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node):
        return None
    before = node.args[0]
    return str(before.target) if before.op == "call_module" and len(before.users) == 1 else None


def _user(node: fx.Node) -> str | None:
    """The one module that is called with the output of a call."""
    users = list(node.users)
    return str(users[0].target) if len(users) == 1 and users[0].op == "call_module" else None


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, OURS) or super().is_leaf_module(m, module_qualified_name)


def _graphs(model: nn.Module, callees: dict[CodeType, set[CodeType]]) -> list[fx.Graph]:
    """What model does in training and in evaluation mode; an empty graph where torch.fx cannot follow it.

    callees gets, for all code that ran and is not torch's, the code that it called, torch's left out.
    """
    graphs = []
    # A copy, since forward may keep what it computes; its tensors are the model's own.
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    for training in (True, False):
        copied = deep_copy(model, dict(tensors))
        for module in copied.modules():
            # Not by train(), which a module may take as a reason to lay out its weight.
            module.training = training
        try:
            with _noting(callees):
                graph = _Tracer().trace(copied)
        except Exception:  # whatever a forward raises that meets no tensor
            return [fx.Graph()]
        graphs.append(fx.Graph() if _keeps_proxies(copied) else graph)
    return graphs


@contextmanager
def _noting(callees: dict[CodeType, set[CodeType]]) -> Iterator[None]:
    """Notes which code calls which meanwhile; torch's own calls of modules stand between a module and its children."""
    before = sys.getprofile()

    def note(frame: FrameType, event: str, argument: object) -> None:
        caller = frame.f_back
        if event == "call" and caller is not None and not frame.f_code.co_filename.startswith(_TORCH):
            callees.setdefault(caller.f_code, set()).add(frame.f_code)

    sys.setprofile(note)
    try:
        yield
    finally:
        sys.setprofile(before)


def _keeps_proxies(model: nn.Module) -> bool:
    """Whether a module put aside what passed through it: who reads it there, the graph does not show."""
    kept = (value for module in model.modules() for name, value in vars(module).items() if name != "_modules")
    return any(isinstance(leaf, fx.Proxy) for value in kept for leaf in pytree.tree_leaves(value))


def _put(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for module in model.modules():
        for name, child in module._modules.items():
            if child is old:
                module._modules[name] = new
