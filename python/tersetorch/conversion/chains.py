"""Chains of layers of signs: what lies between two of them becomes thresholds, and packed signs flow.

    layer -> batch norm, Hardtanh, ... -> (max-pool -> batch norm, ...) -> Sign -> (max-pool, flatten) -> layers

The first layer then computes the next one's packed input, a pool pools packed signs, and every other module in between
becomes an nn.Identity. A layer whose surroundings are anything else returns floats, and the report says why; a batch
norm behind it becomes its scale and bias where that changes no bit.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from types import CodeType
from typing import Any, TypeGuard

import torch
from torch import fx, nn

from tersetorch.conversion.graph import graphs, has_one_path, put
from tersetorch.conversion.scales import NORMS, scale_of
from tersetorch.conversion.thresholds import BATCH_NORMS, MONOTONE, Thresholds, UnfoldableError, thresholds_of
from tersetorch.conversion.walk import Site, carries_hooks, label
from tersetorch.formats import SignWeight
from tersetorch.methods.binarize import Sign, sign
from tersetorch.nn import BinaryConv2d, BinaryLinear, SignMaxPool2d

Layer = BinaryLinear | BinaryConv2d
# What leaves signs where they are, in evaluation.
_KEEPS_SIGNS = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
SHOWN = 3


class _BrokenError(Exception):
    """Where a chain ends, in words."""


@dataclass
class _Way:
    """Where a sign's output goes: through which flattens and pools, and to which layers."""

    takers: list[fx.Node] = field(default_factory=list)
    flattened: list[fx.Node] = field(default_factory=list)  # takers behind a flatten
    pools: list[fx.Node] = field(default_factory=list)
    kept: list[fx.Node] = field(default_factory=list)


@dataclass
class _Chain:
    """A layer that can hand packed signs on, and the calls that it makes superfluous."""

    layer: fx.Node
    before: list[fx.Node]
    pool: fx.Node | None
    after: list[fx.Node]
    sign: fx.Node
    way: _Way
    thresholds: Thresholds

    @property
    def dropped(self) -> list[fx.Node]:
        return [*self.before, *self.after, self.sign, *self.way.kept]

    @property
    def pools(self) -> list[fx.Node]:
        return [*([] if self.pool is None else [self.pool]), *self.way.pools]


class _Model:
    """A model, the graph of its evaluation, and what can be said of its modules."""

    def __init__(self, model: nn.Module) -> None:
        self.callees: dict[CodeType, set[CodeType]] = {}
        self.model = model
        self.graph = graphs(model, self.callees)[-1]
        self.calls: dict[str, list[fx.Node]] = {}
        for node in self.graph.nodes:
            if node.op == "call_module":
                self.calls.setdefault(str(node.target), []).append(node)
        hooked = [module for module in model.modules() if carries_hooks(module)]
        self._hooked = {inner for module in hooked for inner in module.modules()}
        self._steady: dict[str, bool] = {}

    def module(self, node: fx.Node) -> nn.Module | None:
        """The module that a node calls, None for another node."""
        return self.model.get_submodule(str(node.target)) if node.op == "call_module" else None

    def check(self, node: fx.Node) -> None:
        """Raises _BrokenError where the module that a node calls may do something else than in the graph."""
        name = str(node.target)
        module = self.module(node)
        if module in self._hooked:
            raise _BrokenError(f"{label(name)} carries hooks, or stands in a module that does")
        if "forward" in vars(module):
            raise _BrokenError(f"the forward of {label(name)} was replaced on the instance")
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            path, holder = ".".join(parts[:depth]), self.model.get_submodule(".".join(parts[: depth - 1]))
            if path not in self._steady:
                # Lists have no forward: those above call what they hold.
                in_list = isinstance(holder, nn.ModuleList | nn.ModuleDict)
                self._steady[path] = in_list or has_one_path(self.model, path, self.callees)
            if not self._steady[path]:
                raise _BrokenError(
                    f"the forward of {type(holder).__name__} branches, or its other methods use {path}, so that one "
                    "graph does not show all it does"
                )


def known_signs(model: nn.Module, sites: list[Site]) -> list[Site]:
    """The sites of model, those marked whose weights are signs and whose input always is."""
    mine = [
        site
        for site in sites
        if site.kept is None
        and isinstance(site.module, nn.Linear | nn.Conv2d)
        and SignWeight.why_not(site.module.weight) is None
    ]
    if not mine:
        return sites
    sources = sign_sources(model)
    unknown = "the model's graph does not show its input" if sources else "torch.fx cannot follow the model's forward"
    known = {id(site): sources.get(site.name, unknown) for site in mine}
    return [replace(site, unsigned=known[id(site)]) if id(site) in known else site for site in sites]


def sign_sources(model: nn.Module) -> dict[str, str | None]:
    """For each nn.Linear and nn.Conv2d that is called: None where its input is always signs, else why it is not known.

    Signs are what a Sign, or tersetorch.binarize.sign, returns in evaluation, also through modules and methods that
    only move numbers or take the largest.
    """
    seen = _Model(model)
    found: dict[str, str | None] = {}
    for name, nodes in seen.calls.items():
        if isinstance(model.get_submodule(name), nn.Linear | nn.Conv2d):
            reasons = []
            for node in nodes:
                try:
                    seen.check(node)
                    _check_signs(seen, _argument(node))
                except _BrokenError as broken:
                    reasons.append(str(broken))
            found[name] = reasons[0] if reasons else None
    return found


def _check_signs(seen: _Model, node: fx.Node | None) -> None:
    """Raises _BrokenError unless node is known to be +1 and -1 only."""
    if node is None:
        raise _BrokenError("it is called with more than one tensor")
    module = seen.module(node)
    # Exactly these classes: a subclass may compute something else.
    if module is not None and type(module) is not Sign:
        if type(module) in (nn.Flatten, nn.MaxPool2d, *_KEEPS_SIGNS):
            seen.check(node)
            return _check_signs(seen, _argument(node))
        raise _BrokenError(f"its input is what {_shown(seen, node)} returns, not signs")
    if module is not None:
        return seen.check(node)
    if node.op == "call_function" and node.target is sign and (len(node.args) < 2 or node.args[1] is False):
        return None
    if _only_moves(node):
        return _check_signs(seen, node.args[0] if isinstance(node.args[0], fx.Node) else None)
    raise _BrokenError(f"its input is {_shown(seen, node)}, not signs")


def _only_moves(node: fx.Node) -> bool:
    names = ("flatten", "reshape", "view", "contiguous", "permute", "transpose", "unsqueeze", "squeeze")
    functions = (torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.unsqueeze, torch.squeeze)
    if node.op == "call_method":
        return str(node.target) in names
    return node.op == "call_function" and node.target in functions


def fold(model: nn.Module, layers: Iterable[nn.Module]) -> dict[str, str]:
    """Makes chains of those of layers that are layers of signs, in place; says of each what became of it, by name."""
    chosen = {layer for layer in layers if _counts(layer) and layer.thresholds is None}
    names = {name: layer for name, layer in model.named_modules() if layer in chosen}
    if not names:
        return {}
    seen = _Model(model)
    if not len(seen.graph.nodes):
        return dict.fromkeys(names, "returns floats: torch.fx cannot follow the model's forward")
    chains: dict[str, _Chain] = {}
    ends: dict[str, str] = {}
    for name, layer in names.items():
        try:
            chains[name] = _follow(seen, name, layer)
        except _BrokenError as broken:
            ends[name] = str(broken)
    _drop_entangled(seen, chains, ends)
    for chain in chains.values():
        _apply(seen, chain)
    normed = {name: _fold_norm(seen, name, names[name]) for name in ends}
    gone = {node for chain in chains.values() for node in chain.dropped}
    _drop_signs(seen, gone)
    packed = {str(taker.target) for chain in chains.values() for taker in chain.way.takers}
    return {
        name: _taken(layer, name in packed)
        + (_told(seen, chains[name]) if name in chains else f"returns floats: {ends[name]}{normed[name]}")
        for name, layer in names.items()
    }


def _fold_norm(seen: _Model, name: str, layer: Layer) -> str:
    """Lets a layer that returns floats compute the batch norm that follows it; says what became of it, or nothing."""
    calls = seen.calls.get(name, [])
    node = next(iter(calls[0].users), None) if len(calls) == 1 and len(calls[0].users) == 1 else None
    if node is None or type(seen.module(node)) not in NORMS or _argument(node) is None:
        return ""
    norm = _known(seen.module(node))
    try:
        for each in (calls[0], node):
            seen.check(each)
        if len(seen.calls[str(node.target)]) != 1:
            raise _BrokenError("it is called elsewhere too")
        scale, bias = scale_of(layer, norm)
    except (_BrokenError, UnfoldableError) as reason:
        return f"; {node.target} stays: {reason}"
    layer.scale_(scale.to(layer.bits.device), bias.to(layer.bits.device))
    layer.batched = isinstance(layer, BinaryLinear)
    put(seen.model, norm, nn.Identity().train(norm.training))
    return f"; its scale and bias stand for {node.target}"


def _taken(layer: Layer, packed: bool) -> str:
    if layer.inputs != "signs":
        return "takes 8-bit pixels, "
    return "takes packed signs, " if packed else "packs the signs of its input, "


def _follow(seen: _Model, name: str, layer: Layer) -> _Chain:
    """The chain that begins with a layer.

    Raises:
        _BrokenError: there is none.
    """
    calls = seen.calls.get(name, [])
    if len(calls) != 1:
        raise _BrokenError(f"it is called {len(calls)} times")
    node = calls[0]
    seen.check(node)
    parts: tuple[list[fx.Node], list[fx.Node]] = ([], [])
    pool: fx.Node | None = None
    while True:
        users = list(node.users)
        if len(users) != 1:
            used = ", ".join(_shown(seen, user) for user in users[:SHOWN])
            raise _BrokenError(f"what {_shown(seen, node)} returns is used by {used or 'nobody'}")
        node = users[0]
        module = seen.module(node)
        if type(module) is Sign:
            break
        if _argument(node) is None or type(module) not in (*MONOTONE, nn.MaxPool2d):
            raise _BrokenError(f"it is followed by {_shown(seen, node)}, not by a Sign")
        if type(module) is nn.MaxPool2d:
            _check_pool(seen, node, isinstance(layer, BinaryConv2d))
            if pool is not None:
                raise _BrokenError(f"a second pool, {_shown(seen, node)}, stands before its Sign")
            pool = node
        else:
            seen.check(node)
            parts[pool is not None].append(node)
    seen.check(node)
    way = _Way()
    _follow_signs(seen, node, isinstance(layer, BinaryConv2d), layer, way, flattened=False)
    modules = [[_known(seen.module(part)) for part in nodes] for nodes in parts]
    try:
        thresholds = thresholds_of(layer, modules[0], modules[1], pool is not None)
    except UnfoldableError as error:
        raise _BrokenError(str(error)) from error
    return _Chain(calls[0], parts[0], pool, parts[1], node, way, thresholds)


def _follow_signs(seen: _Model, node: fx.Node, images: bool, layer: Layer, way: _Way, flattened: bool) -> None:
    """Follows signs from node to the layers of signs that take them.

    Raises:
        _BrokenError: somebody else takes them, or takes them in a way that packed signs do not allow.
    """
    if not node.users:
        raise _BrokenError("nobody uses its signs")
    for user in node.users:
        module = seen.module(user)
        if _asks_for_samples(user, node):
            continue
        if module is not None:
            if _argument(user) is not node:
                raise _BrokenError(f"its signs are also given to {_shown(seen, user)}")
            seen.check(user)
        if isinstance(module, BinaryConv2d) and module.inputs == "signs" and images and not flattened:
            way.takers.append(user)
        elif isinstance(module, BinaryLinear) and module.inputs == "signs" and (flattened or not images):
            if flattened:
                if module.in_features % layer.weight_shape[0] or len(seen.calls[str(user.target)]) > 1:
                    raise _BrokenError(f"{_shown(seen, user)} takes other things than its flattened images")
                way.flattened.append(user)
            elif module.in_features != layer.weight_shape[0]:
                raise _BrokenError(f"{_shown(seen, user)} takes {module.in_features} signs, several rows at once")
            way.takers.append(user)
        elif type(module) is nn.MaxPool2d:
            _check_pool(seen, user, images and not flattened)
            way.pools.append(user)
            _follow_signs(seen, user, images, layer, way, flattened)
        elif type(module) in _KEEPS_SIGNS:
            way.kept.append(user)
            _follow_signs(seen, user, images, layer, way, flattened)
        elif _flattens(user, module, node):
            _follow_signs(seen, user, images, layer, way, flattened=images)
        else:
            raise _BrokenError(f"its signs are used by {_shown(seen, user)}")


def _flattens(node: fx.Node, module: nn.Module | None, argument: fx.Node) -> bool:
    """Whether a node makes rows of whole samples of its argument, of packed ones as well."""
    if type(module) is nn.Flatten:
        return (module.start_dim, module.end_dim) == (1, -1)
    if module is not None or not node.args or node.args[0] is not argument:
        return False
    if node.target == "flatten" or node.target is torch.flatten:
        dims = dict(zip(("start_dim", "end_dim"), node.args[1:], strict=False)) | node.kwargs
        return (dims.get("start_dim", 0), dims.get("end_dim", -1)) == (1, -1)
    if node.target in ("view", "reshape") or node.target is torch.reshape:
        sizes: Any = node.args[1] if isinstance(node.args[1], tuple | list) else node.args[1:]
        return len(sizes) == 2 and bool(sizes[1] == -1) and _counts_samples(sizes[0], argument)
    return False


def _counts_samples(size: Any, x: fx.Node) -> bool:
    """Whether a node is the first size of x, or of an input of the model: x.size(0), x.shape[0] or x.size()[0]."""
    if not isinstance(size, fx.Node):
        return False
    if size.target is operator.getitem and size.args[1] == 0 and isinstance(size.args[0], fx.Node):
        size = size.args[0]
    elif size.target != "size" or tuple(size.args[1:]) != (0,):
        return False
    whole = size.args[0]
    return size.target in (getattr, "size") and isinstance(whole, fx.Node) and (whole is x or whole.op == "placeholder")


def _asks_for_samples(node: fx.Node, x: fx.Node) -> bool:
    """Whether a node only asks for the number of samples of x, which packed signs have too."""
    if (node.target is getattr and node.args[1:] == ("shape",)) or (node.target == "size" and len(node.args) == 1):
        return all(_counts_samples(user, x) for user in node.users)
    return _counts_samples(node, x)


def _check_pool(seen: _Model, node: fx.Node, images: bool) -> None:
    module = seen.module(node)
    if not isinstance(module, nn.MaxPool2d) or module.return_indices or not images:
        raise _BrokenError(f"{_shown(seen, node)} is no max-pool of images that returns values alone")
    if len(seen.calls[str(node.target)]) != 1:
        raise _BrokenError(f"{_shown(seen, node)} is called more than once")
    seen.check(node)


def _drop_entangled(seen: _Model, chains: dict[str, _Chain], ends: dict[str, str]) -> None:
    """Takes out chains one of whose modules somebody else needs as it is, or whose taker gets floats from elsewhere."""
    while True:
        gone = {node for chain in chains.values() for node in (*chain.dropped, *chain.pools)}
        spared = gone | _superfluous_signs(seen, gone)
        broken = {}
        for name, chain in chains.items():
            for node in chain.dropped:
                others = [call for call in seen.calls[str(node.target)] if call not in spared]
                if others:
                    broken[name] = f"{_shown(seen, node)} is also called elsewhere, where it is needed as it is"
        if not broken:
            return
        for name, reason in broken.items():
            del chains[name]
            ends[name] = reason


def _superfluous_signs(seen: _Model, gone: set[fx.Node]) -> set[fx.Node]:
    """Calls of a Sign whose output goes to layers of signs alone, which take signs themselves."""
    return {
        node
        for node in seen.graph.nodes
        if node not in gone and type(seen.module(node)) is Sign and _ends_in_signs(seen, node)
    }


def _ends_in_signs(seen: _Model, node: fx.Node) -> bool:
    for user in node.users:
        module = seen.module(user)
        if _takes_signs(module) and _argument(user) is node:
            continue
        passes = type(module) in (nn.Flatten, *_KEEPS_SIGNS) or _only_moves(user)
        if not passes or not _ends_in_signs(seen, user):
            return False
    return bool(node.users)


def _drop_signs(seen: _Model, gone: set[fx.Node]) -> None:
    """Puts an nn.Identity where every call of a Sign is superfluous."""
    superfluous = _superfluous_signs(seen, gone)
    for nodes in seen.calls.values():
        module = seen.module(nodes[0])
        if type(module) is Sign and any(node in superfluous for node in nodes):
            try:
                for node in nodes:
                    seen.check(node)
            except _BrokenError:
                continue
            if all(node in gone or node in superfluous for node in nodes):
                put(seen.model, module, nn.Identity().train(module.training))


def _apply(seen: _Model, chain: _Chain) -> None:
    """Changes the model's modules as a chain says."""
    layer = _known(seen.module(chain.layer))
    assert isinstance(layer, BinaryLinear | BinaryConv2d)
    found = chain.thresholds
    device = layer.bits.device
    layer.fold_(found.values.to(device), found.negated.to(device))
    # Elsewhere the dimension that a batch norm, or a flatten of images, takes for samples is another one.
    normed = any(isinstance(seen.module(node), BATCH_NORMS) for node in (*chain.before, *chain.after))
    layer.batched = normed if isinstance(layer, BinaryLinear) else bool(chain.way.flattened)
    for node in chain.way.flattened:
        taker = seen.module(node)
        assert isinstance(taker, BinaryLinear)
        taker.lay_out_(taker.in_features // layer.weight_shape[0])
    for node in chain.pools:
        pool = seen.module(node)
        assert isinstance(pool, nn.MaxPool2d)
        flipped = found.flipped.to(device) if node is chain.pool else None
        put(seen.model, pool, SignMaxPool2d.from_dense(pool, flipped))
    for node in chain.dropped:
        module = seen.module(node)
        if module is not None and type(module) is not nn.Identity:
            put(seen.model, module, nn.Identity().train(module.training))


def _told(seen: _Model, chain: _Chain) -> str:
    inner = [str(node.target) for node in chain.dropped]
    pooled = f", which {chain.pool.target} pools" if chain.pool is not None else ""
    return f"hands packed signs on{pooled}: its thresholds stand for {', '.join(inner)}"


def _counts(module: object) -> TypeGuard[Layer]:
    """Whether a module's product is an integer."""
    return isinstance(module, BinaryLinear | BinaryConv2d) and module.inputs != "real"


def _takes_signs(module: object) -> TypeGuard[Layer]:
    return isinstance(module, BinaryLinear | BinaryConv2d) and module.inputs == "signs"


def _argument(node: fx.Node) -> fx.Node | None:
    """The one tensor that a module is called with."""
    one = len(node.args) == 1 and not node.kwargs and isinstance(node.args[0], fx.Node)
    return node.args[0] if one else None  # type: ignore[return-value]


def _known(module: nn.Module | None) -> nn.Module:
    assert module is not None
    return module


def _shown(seen: _Model, node: fx.Node) -> str:
    """A node as a person would name it."""
    module = seen.module(node)
    if module is not None:
        return f"{node.target} ({type(module).__name__})"
    if node.op == "output":
        return "the model's output"
    if node.op == "placeholder":
        return f"the model's input {node.target}"
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return f"{name}()"
