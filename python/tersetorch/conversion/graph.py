"""What a model's forward does, as torch.fx sees it, and whether it always does that."""

from __future__ import annotations

import dis
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from tersetorch.conversion.swap import deep_copy
from tersetorch.methods.binarize import ShiftBatchNorm1d, ShiftBatchNorm2d, Sign, sign
from tersetorch.nn import FlattenedConv2d, SignMaxPool2d
from tersetorch.nn.shared_module import SharedProduct
from tersetorch.nn.sign_module import SignModule
from tersetorch.nn.sparse_module import SparseModule

# Modules of ours that a graph shows as one call.
LEAVES = (
    SparseModule,
    SharedProduct,
    FlattenedConv2d,
    SignModule,
    SignMaxPool2d,
    Sign,
    ShiftBatchNorm1d,
    ShiftBatchNorm2d,
)
_TORCH = str(Path(torch.__file__).parent)
# Names whose answer on what is traced may not be that on a tensor, or that ask how the model is run.
_QUESTIONS = {"isinstance", "issubclass", "hasattr", "getattr", "callable", "type", "is_grad_enabled"}


def has_one_path(model: nn.Module, name: str, callees: Mapping[CodeType, set[CodeType]]) -> bool:
    """Whether the module that holds layer `name` always does with it what it did while it was traced."""
    holder = model.get_submodule(parent(name))
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


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, LEAVES) or super().is_leaf_module(m, module_qualified_name)


def graphs(model: nn.Module, callees: dict[CodeType, set[CodeType]]) -> list[fx.Graph]:
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
                graph = _Tracer(autowrap_functions=(sign,)).trace(copied)
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


def put(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Puts new in every place of old in model."""
    for module in model.modules():
        for name, child in module._modules.items():
            if child is old:
                module._modules[name] = new


def parent(name: str) -> str:
    """The path of the module that holds the one at this path."""
    return name.rpartition(".")[0]
