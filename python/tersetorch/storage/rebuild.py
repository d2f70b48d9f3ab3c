"""A model from a header's nodes: built from registered kinds, or put into a copy of the user's instance."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NoReturn

from rich.progress import Progress
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from tersetorch.conversion.swap import deep_copy
from tersetorch.formats.vector_codes import VectorCodes, note_codes
from tersetorch.storage import fields, registry
from tersetorch.storage.compare import needs_values
from tersetorch.storage.entry import Entry
from tersetorch.storage.errors import Budget, TerseFileError, refuse
from tersetorch.storage.layers import LAYERS, Layer, decode_layer, dense_shape, make_layer
from tersetorch.storage.packed_kinds import (
    check_layer,
    goes_in_chains,
    is_of_codes,
    is_of_signs,
    pack_again,
    packed_names,
    packing,
    replaces,
    same_sizes,
)
from tersetorch.storage.tensors import decode_tensor, vector_codes

_NODE_KEYS = set("kcatmeo")
# Arguments that only training looks at, with their defaults.
_DROPOUT = {"p": 0.5, "dropout": 0.0}
IMPORTED = "tersetorch.storage.import_exported of the .pt2 file that it came from"
# What a module costs, without its tensors.
MODULE_BYTES = 4096


class Tensors:
    """Decodes entries when they are asked for, each once, so that what was tied is tied again.

    budget is for what is made beside them: modules, layouts and buffers that no file holds; packed, for packed codes.
    """

    def __init__(
        self,
        entries: list[Entry],
        data: list[list[bytes]],
        packed: Budget,
        budget: Budget,
        progress: Progress | None = None,
    ) -> None:
        self.entries = entries
        self.budget = budget
        self._packed_budget = packed
        self._data = data
        self._plain: dict[int, Tensor] = {}
        self._sums: dict[int, VectorCodes] = {}
        self._packed: dict[tuple[object, ...], Tensor] = {}
        self._parameters: dict[int, nn.Parameter] = {}
        self._layers: dict[int, Layer] = {}
        self._progress = progress or Progress(disable=True)
        self._task = self._progress.add_task("loading", total=sum(entry.decoded_bytes for entry in entries))

    def entry(self, number: Any, compressed: bool) -> Entry:
        """The entry of this number, which must be (or not be) a layer's sparse weight."""
        entry: Entry = self.entries[fields.integer(number, "the number of a tensor", 0, len(self.entries) - 1)]
        if entry.compressed != compressed:
            refuse("use sparse weights in sparse layers, and only there", f"tensor {number}")
        return entry

    def plain(self, number: Any) -> Tensor:
        """The tensor of this number."""
        entry = self.entry(number, compressed=False)
        if number not in self._plain:
            self._plain[number] = decode_tensor(entry, self._data[number])
            self._progress.advance(self._task, entry.decoded_bytes)
        return self._plain[number]

    def sums(self, number: Any) -> VectorCodes | None:
        """Codes of the tensor of this number where it consists of sums, which the tensor does not tell."""
        entry = self.entry(number, compressed=False)
        if entry.stages > 1 and number not in self._sums:
            self._sums[number] = vector_codes(entry, self._data[number])
        return self._sums.get(number)

    def packed(self, number: Any, layer: nn.Module, name: str) -> Tensor:
        """The tensor of this number as layer packs it into buffer name; layers of the same sizes share it."""
        key = fields.integer(number, "the number of a tensor", 0, len(self.entries) - 1), *packing(layer)
        if key not in self._packed:
            # Of a few columns, padding is the most.
            self._packed_budget.take(layer.get_buffer(name).nbytes)
            self._packed[key] = pack_again(layer, self.plain(number))
        return self._packed[key]

    def parameter(self, number: Any) -> nn.Parameter:
        """The tensor of this number as a parameter, always the same object."""
        tensor = self.plain(number)
        if number not in self._parameters:
            trains = self.entries[number].trains
            if trains and not (tensor.is_floating_point() or tensor.is_complex()):
                refuse("mark integer parameters as not training", str(tensor.dtype))
            self._parameters[number] = nn.Parameter(tensor, requires_grad=trains)
        return self._parameters[number]

    def layer(self, kind: str, node: dict[str, Any], training: bool) -> Layer:
        """One of our layers; layers with the same weight share its tensors."""
        names = fields.check_keys(node.get("t"), f"the tensors of a {kind}", {"weight", "bias"})
        number: Any = names.get("weight")
        entry = self.entry(number, compressed=True)
        bias = self.parameter(names["bias"]) if "bias" in names else None
        if bias is not None and tuple(bias.shape) != entry.shape[:1]:
            refuse(f"have a bias of {entry.shape[0]} numbers in a {kind}", list(bias.shape))
        config = registry.from_json(node.get("c", {}))
        earlier = self._layers.get(number)
        if earlier is None:
            layer = decode_layer(kind, entry, self._data[number], bias, config, training, self.budget)
            self._layers[number] = layer
            self._progress.advance(self._task, entry.decoded_bytes)
            return layer
        if type(earlier) is not LAYERS[kind]:
            refuse("share a weight among layers of one kind", kind)
        return make_layer(kind, earlier.sparse_weight, bias, config, training, self.budget)

    def check_all_used(self) -> None:
        """Refuses tensors that no module uses."""
        unused = len(self.entries) - len(self._plain) - len(self._layers)
        if unused:
            refuse("store the tensors of its modules only", f"{unused} more")


class Builder:
    """Builds a whole model from nodes. Every module is built on device meta and compared with its tensors first."""

    def __init__(self, tensors: Tensors, limit: int) -> None:
        self._tensors = tensors
        self._limit = limit
        self._modules: list[nn.Module] = []
        self._taken: set[nn.Module] = set()
        self._open: set[nn.Module] = set()

    def build(self, node: Any, path: str = "", made: nn.Module | None = None, training: bool = False) -> nn.Module:
        """The module of a node; made is what its parent's constructor put in its place.

        Raises:
            TerseFileError: the node is opaque, damaged, or does not fit its tensors.
        """
        if type(node) is int:
            shared = self._modules[fields.integer(node, "the number of a module", 0, len(self._modules) - 1)]
            if shared in self._open:
                refuse("share modules that are complete", f"module {node} inside itself at {path}")
            return shared
        check_node(node)
        if "o" in node:
            name, reason = node["o"]
            fix = "pass model=, an instance of the network's class, or --network to a command"
            if _is_program(node):
                fix = f"pass model={IMPORTED}, or --network and that file to a command"
            refuse(
                "consist of modules that tt.load can rebuild by itself",
                f"{name} at {path or 'the model itself'} ({reason})",
                fix,
            )
        training = node.get("e", training)
        kind = node.get("k")
        if kind in LAYERS:
            self._tensors.budget.take(MODULE_BYTES)
            module: nn.Module = self._tensors.layer(kind, node, training)
            self._modules.append(module)
        else:
            module = self._made(made, path) if kind is None else self._constructed(node)
            self._taken.add(module)
            self._modules.append(module)
            _assign(module, node.get("t", {}), self._tensors, path, refuse)
            check_layer(module)
            self._open.add(module)
            self._put_children(module, node.get("m", {}), path, training)
            self._open.remove(module)
        module.training = training
        return module

    def _made(self, made: nn.Module | None, path: str) -> nn.Module:
        if made is None or made in self._taken:
            refuse("name the kind of every module that no constructor makes", path or "the model itself")
        return made

    def _constructed(self, node: dict[str, Any]) -> nn.Module:
        kind = registry.named(node["k"])
        if kind is None:
            refuse("consist of kinds that are registered", node["k"][:60], "read it with the tersetorch it came from")
        try:
            module = self._construct(kind, _config(kind, node), len(node.get("t", {})))
        except TerseFileError:
            raise
        except Exception as error:  # whatever a constructor raises for arguments that no save wrote
            refuse(f"hold arguments that {kind.name} takes", f"{type(error).__name__}: {str(error)[:200]}")
        _override(module, kind, node)
        return module

    def _construct(self, kind: registry.Kind, config: registry.Config, tensors: int) -> nn.Module:
        if kind.tensors(config) > tensors:
            refuse(f"hold the tensors of {kind.name}({config})", tensors)
        module = registry.construct(kind, config, "meta")
        self._tensors.budget.take(MODULE_BYTES * sum(1 for _ in module.modules()))
        if not needs_values(module):
            return module
        self._tensors.budget.take(sum(_passing_bytes(part) for part in module.modules()))
        size = sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
        if size > self._limit:
            refuse(f"need at most {self._limit} bytes for a {kind.name}", size, "raise max_bytes")
        return registry.construct(kind, config, "cpu")

    def _put_children(self, module: nn.Module, nodes: dict[str, Any], path: str, training: bool) -> None:
        children: dict[str, nn.Module | None] = {}
        for name, node in nodes.items():
            own = name in module._parameters or name in module._buffers or hasattr(type(module), name)
            if not name or "." in name or own:
                refuse("name children as nn.Module allows", repr(name)[:40])
            inside = fields.joined(path, name)
            children[name] = None if node is None else self.build(node, inside, module._modules.get(name), training)
            vars(module).pop(name, None)
        # Older files do not name a network's ReLUs, which were calls of functions.
        relus = {name: child for name, child in module._modules.items() if type(child) is nn.ReLU and name not in nodes}
        module._modules.clear()
        module._modules.update(children | relus)


def adopt(root: Any, model: nn.Module, tensors: Tensors) -> nn.Module:
    """A copy of model with the file's layers in it and the file's tensors; model itself does not change.

    Raises:
        ValueError: model cannot be copied, or its modules or tensors are not those of the file.
        TerseFileError: a node is damaged.
    """
    try:
        pairs = list(_pairs(root, model, {}))
    except ValueError as error:
        if isinstance(error, TerseFileError) or not _is_program(root):
            raise
        raise ValueError(f"{error}, here {IMPORTED}") from error
    # Layers go in through the copy's memo, so that every reference to the replaced ones follows.
    memo: dict[int, Any] = {}
    for node, module, path in pairs:
        if node.get("k") in LAYERS:
            layer = tensors.layer(node["k"], node, training=False)
            weight = getattr(module, "weight", None)
            where = path or "its root"
            if not isinstance(weight, Tensor) or tuple(weight.shape) != dense_shape(layer):
                mismatch(f"a layer with a weight of shape {list(dense_shape(layer))} at {where}", module)
            if (getattr(module, "bias", None) is None) != (layer.bias is None):
                mismatch(f"a layer {'without' if layer.bias is None else 'with'} a bias at {where}", module)
            memo[id(module)] = layer
        elif replaces(node.get("k"), module):
            # A whole layer, built as it is where no model is given.
            built = Builder(tensors, limit=0).build(node, path)
            if not same_sizes(built, module):
                mismatch(f"{built} at {path or 'its root'}", module)
            memo[id(module)] = built
        elif _stands_for_other(node, module):
            memo[id(module)] = nn.Identity() if node["k"] == "Identity" else nn.ReLU(inplace=True)
    inner = [each for node, _, _ in pairs for each in (node, *_below(node))]
    ours = [node for node in inner if node.get("k") in LAYERS or is_of_codes(node.get("k"))]
    relus = any("relu" in node.get("c", {}) for node in ours)
    signs = any(is_of_signs(node.get("k")) for node, _, _ in pairs)
    for node, module, path in pairs:
        expected = type(module) is nn.Identity or (relus if type(module) is nn.ReLU else signs)
        if node.get("k") == "Identity" and not expected:
            mismatch(f"Identity() at {path}", module)
    replaced = set(memo)  # deepcopy adds to memo
    copied = deep_copy(model, memo, verb="load")
    flags: dict[int, bool] = {}
    for node, module, path in pairs:
        twin = copied.get_submodule(path)
        training = node.get("e", flags.get(id(node), False))
        flags |= {id(child): training for child in node.get("m", {}).values()}
        if id(module) not in replaced:
            _assign(twin, node.get("t", {}), tensors, path, mismatch)
            check_layer(twin)
            if "a" in node:
                _override(twin, registry.named(node["k"]), node)
            if node.get("k") is not None and (rate := _dropout_of(type(twin))) is not None:
                _set_dropout(twin, node.get("c", {}).get(rate, _DROPOUT[rate]))
            twin.training = training
        else:
            twin.train(training)
    return copied


def _is_program(node: Any) -> bool:
    """Whether a module was the graph of an exported program, which has fewer modules than the class it came from."""
    return isinstance(node, dict) and "o" in node and str(node["o"]).count("GraphModule") > 0


def _pairs(node: Any, module: nn.Module | None, seen: dict[nn.Module, int], path: str = "") -> Iterator[Any]:
    """Every node once with the module of the user's instance in its place, checked to be of the same kind."""
    if type(node) is int:
        number = fields.integer(node, "the number of a module", 0, len(seen) - 1)
        if module is None or seen.get(module) != number:
            mismatch(f"a module at {path} that is shared as in the file", module)
        return
    if node is None or module is None:
        if node is not module:
            mismatch(f"{'no' if node is None else 'a'} module at {path}", module)
        return
    check_node(node)
    if module in seen:
        mismatch(f"a module of its own at {path}", "one that it shares with another place")
    seen[module] = len(seen)
    yield node, module, path
    kind = node.get("k")
    if kind in LAYERS or replaces(kind, module):
        # What it is made of is counted too, and nothing of it stands in the user's instance.
        for _ in _below(node):
            seen[nn.Identity()] = len(seen)
        return
    if kind is not None:
        known = registry.named(kind)
        if known is None:
            refuse("consist of kinds that are registered", kind[:60], "read it with the tersetorch it came from")
        stored = _config(known, node)
        rate = _dropout_of(known.cls)
        try:
            own = registry.from_json(known.config(module))
            if rate is not None:
                own[rate] = stored[rate] = None
            fits = type(module) is known.cls and own == stored
        except Exception:  # a module that was altered so far that its arguments cannot be told
            fits = False
        if not fits and not _stands_for_other(node, module):
            arguments = ", ".join(f"{name}={value!r}" for name, value in node.get("c", {}).items())
            mismatch(f"{kind}({arguments}) at {path or 'its root'}", module)
    children = node.get("m", {})
    if list(children) != list(module._modules):
        mismatch(f"children {list(children)} at {path or 'its root'}", list(module._modules))
    for name, child in children.items():
        yield from _pairs(child, module._modules[name], seen, fields.joined(path, name))


def _config(kind: registry.Kind, node: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a node's kind; a rate of dropout among them is one, which not every constructor asks."""
    config: dict[str, Any] = registry.from_json(node.get("c", {}))
    rate = _dropout_of(kind.cls)
    if rate is not None:
        fields.number(config.get(rate, 0), f"{rate} of a {kind.name}", 0, 1)
    return config


def _dropout_of(cls: type[nn.Module]) -> str | None:
    """The rate of dropout among the arguments of cls, a class of torch's, if it has one.

    Pruning rewrites it and no output depends on it, so a file's goes into the user's instance, which may have another.
    """
    if not cls.__module__.startswith("torch.nn."):
        return None
    if issubclass(cls, _DropoutNd):
        return "p"
    of_layers = (nn.RNNBase, nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
    return "dropout" if issubclass(cls, of_layers) else None


def _set_dropout(module: nn.Module, value: float) -> None:
    """Also in what a transformer's layer has made of it; nodes of those inside that differ follow."""
    for each in module.modules():
        rate = _dropout_of(type(each))
        if rate is not None and rate not in each._modules:
            setattr(each, rate, value)


def _passing_bytes(module: nn.Module) -> int:
    return sum(module.get_buffer(name).nbytes for name in module._non_persistent_buffers_set)


def _below(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The nodes inside a node that are written out there, which those of modules named a second time are not."""
    for child in node.get("m", {}).values():
        if isinstance(child, dict):
            yield child
            yield from _below(child)


def _stands_for_other(node: dict[str, Any], module: nn.Module) -> bool:
    """Whether a node is what convert leaves of a ReLU, computed elsewhere or in place, or of a part of a chain."""
    left = node.get("k"), node.get("c", {})
    if type(module) is nn.ReLU:
        return left in (("Identity", {}), ("ReLU", {"inplace": True}))
    return left == ("Identity", {}) and goes_in_chains(module)


def check_node(node: Any) -> None:
    """Refuses a node whose fields have other types than the format gives them."""
    fields.check_keys(node, "a module", _NODE_KEYS)
    if "k" in node:
        kind = fields.text(node["k"], "a kind")
        if kind in LAYERS:
            fields.check_keys(node, f"a {kind}", set("ktceo"))
    else:
        fields.check_keys(node, "a module without a kind", set("tmeo"))
    for key in "catm":
        if key in node and not isinstance(node[key], dict):
            refuse(f"have an object as {key} of a module", type(node[key]).__name__)
    if "e" in node:
        fields.flag(node["e"], "a training flag")
    if "o" in node:
        parts = fields.items(node["o"], "an opaque module")
        if len(parts) != 2:
            refuse("have [class, reason] for an opaque module", f"{len(parts)} items")
        for part in parts:
            fields.text(part, "class or reason of an opaque module")


def _override(module: nn.Module, kind: registry.Kind | None, node: dict[str, Any]) -> None:
    """Sets the attributes of a node that its kind knows."""
    for name, value in node.get("a", {}).items():
        if kind is None or name not in kind.overrides or not isinstance(value, bool | int | float | str | None):
            refuse(f"set only known attributes of a {node['k']}", name[:40])
        setattr(module, name, value)


def mismatch(rule: str, came: object) -> NoReturn:
    """Raises ValueError for a model= that is not the file's."""
    shown = came if isinstance(came, list | str) else type(came).__name__
    raise ValueError(f"load: model must have {rule}, got {shown}; pass an instance built as the saved one was")


def _assign(module: nn.Module, names: dict[str, Any], tensors: Tensors, path: str, complain: Any) -> None:
    """Puts tensors into module, whose own must have the same names, shapes and, where they are not meta, dtypes."""
    own = {
        name: tensor
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None and name not in module._non_persistent_buffers_set
    }
    where = path or "its root"
    packed = None
    found = packed_names(module)
    if found is not None and found[1] in names:
        packed, plain = found
        names = {packed if name == plain else name: number for name, number in names.items()}
    if names.keys() != own.keys():
        complain(f"tensors {sorted(names)} at {where}", sorted(own))
    for name, number in names.items():
        entry = tensors.entry(number, compressed=False)
        if name == packed:
            continue
        if entry.shape != tuple(own[name].shape):
            complain(f"shape {list(entry.shape)} for {name} at {where}", str(list(own[name].shape)))
        if not own[name].is_meta and complain is not refuse and entry.dtype != own[name].dtype:
            complain(f"{entry.dtype} for {name} at {where}", str(own[name].dtype))
    for name, number in names.items():
        if name in module._parameters:
            setattr(module, name, tensors.parameter(number))
            note_codes(module, name, tensors.sums(number))
            # The file's order is that of state dicts and optimizers.
            module._parameters[name] = module._parameters.pop(name)
        elif name == packed:
            module._buffers[name] = tensors.packed(number, module, name)
        else:
            module._buffers[name] = tensors.plain(number)
