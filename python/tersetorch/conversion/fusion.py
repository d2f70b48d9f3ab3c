"""ReLU that follows a layer: computed by the layer itself, or in the memory of what a dense one returns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import CodeType

from torch import fx, nn

from tersetorch.conversion.graph import graphs, has_one_path, parent, put
from tersetorch.conversion.walk import carries_hooks
from tersetorch.nn import FlattenedConv2d
from tersetorch.nn.shared_module import SharedProduct
from tersetorch.nn.sparse_module import SparseModule

# Layers that have a ReLU of their own.
OURS = (SparseModule, SharedProduct, FlattenedConv2d)
# What these return is theirs to give away: no input, and nothing that their gradients need.
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
    """What became of a model's ReLUs, and of the chains of its layers of signs, by name.

    Attributes:
        fused: layer -> the nn.ReLU that it computes now.
        in_place: the nn.ReLUs that now overwrite their inputs.
        signs: layer of signs -> what it takes and hands on, in words.
    """

    fused: Mapping[str, str] = field(default_factory=dict)
    in_place: tuple[str, ...] = ()
    signs: Mapping[str, str] = field(default_factory=dict)


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
    ours = {layer for layer in layers if isinstance(layer, OURS)}
    for layer in ours:
        layer.relu = False
    modules = dict(model.named_modules())
    fused: dict[str, str] = {}
    in_place = []
    for name, before in _takers(model, nn.ReLU).items():
        producers = [modules[producer] for producer in before]
        relu = modules[name]
        if ours.issuperset(producers):
            for producer, layer in zip(before, producers, strict=True):
                layer.relu = True
                fused[producer] = name
            put(model, relu, nn.Identity().train(relu.training))
        elif not relu.inplace and all(type(p) in _DENSE or isinstance(p, OURS) for p in producers):
            relu.inplace = True
            in_place.append(name)
    return Fusion(fused, tuple(in_place))


def unfused(model: nn.Module) -> tuple[set[nn.Module], set[nn.Module]]:
    """The layers with a ReLU of their own that fuse made, and the nn.Identitys that stand where it stood."""
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
    seen = [_takers_in(graph, model, kind) for graph in graphs(model, callees)]
    return {
        name: before
        for name, before in seen[0].items()
        if all(other.get(name) == before for other in seen) and all(has_one_path(model, n, callees) for n in before)
    }


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
            parent(producer) == parent(name)
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
