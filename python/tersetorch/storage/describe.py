"""A module tree as the header's nodes, and its tensors as entries and streams.

A node is an object with

    k  kind (a registered torch.nn class, a zoo network, or one of our layers)
    c  its constructor's arguments
    a  attributes set after construction
    t  tensors: name -> number of an entry; of a layer of codes "plain_codes", of signs "signs" (packed_kinds.py)
    m  children: name -> node, the number of an earlier node (a shared module, counted in this order), or null
    e  training flag, where it differs from the parent's (the model's is compared with false)
    o  [class, reason]: tt.load cannot rebuild this module by itself

A node with neither k nor o is what the constructor of its nearest ancestor with a kind makes in that place.
"""

from __future__ import annotations

import json
from typing import Any

from rich.progress import Progress
from torch import Tensor, nn

from tersetorch.formats.vector_codes import VectorCodes, noted_codes
from tersetorch.storage import registry
from tersetorch.storage.compare import difference, needs_values
from tersetorch.storage.entry import Entry
from tersetorch.storage.fields import MAX_PATH
from tersetorch.storage.layers import KINDS, Layer, config_of, encode_layer, make_layer
from tersetorch.storage.packed_kinds import packed_names, packing, plain_form
from tersetorch.storage.streams import Stream
from tersetorch.storage.tensors import encode_tensor

# Modules whose parameters only enter sums of products, where the sign of a zero does not show.
_SUMMING = (
    nn.Linear,
    nn.modules.conv._ConvNd,
    nn.Bilinear,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.MultiheadAttention,
)


class Describer:
    """Walks a model once. Afterwards entries and streams hold its tensors, each stored once."""

    def __init__(self, model: nn.Module, progress: Progress | None = None, in_context: bool = True) -> None:
        self._in_context = in_context
        self.entries: list[Entry] = []
        self.streams: list[list[Stream]] = []
        self._numbers: dict[int, int] = {}
        self._packed: dict[tuple[object, ...], int] = {}
        self._layers: dict[int, Layer] = {}
        self._modules: dict[nn.Module, int] = {}
        self._taken: set[nn.Module] = set()
        self._open: set[nn.Module] = set()
        self._progress = progress or Progress(disable=True)
        stored = {
            id(tensor): tensor.nbytes
            for module in model.modules()
            for name, tensor in (*module._parameters.items(), *module._buffers.items())
            if tensor is not None
            and not (name in module._buffers and (type(module) in KINDS or name in module._non_persistent_buffers_set))
        }
        self._task = self._progress.add_task("saving", total=sum(stored.values()))
        # A parameter that another module uses as well, such as a tied embedding's, does not only enter sums.
        self._exact = {
            id(parameter)
            for module in model.modules()
            if not isinstance(module, _SUMMING)
            for parameter in module._parameters.values()
        }

    def node(self, module: nn.Module, path: str = "", made: nn.Module | None = None, training: bool = False) -> Any:
        """The node of module; made is what its parent's constructor puts in its place.

        Raises:
            ValueError: a tensor cannot be stored, or the module keeps state of another kind.
        """
        if module in self._open:
            raise ValueError(
                f"save: model must be a tree, got {_label(path)}, which contains itself; cut the reference"
            )
        if module in self._modules:
            return self._modules[module]
        self._modules[module] = len(self._modules)
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise ValueError(
                f"save: model must keep its state in tensors, got extra state in {_label(path)} "
                f"({type(module).__name__}); register it as a buffer"
            )
        node: dict[str, Any] = {}
        if type(module) in KINDS:
            built = None
            node |= self._layer(module, path)  # type: ignore[arg-type]
        else:
            if made in self._taken:
                made = None
            node |= _identity(module, made)
            built = node.pop("built", None)
            tensors = self._own_tensors(module, path)
            if tensors:
                node["t"] = tensors
        if built is not None:
            self._taken.add(built)
        if module.training != training:
            node["e"] = module.training
        self._open.add(module)
        children = {
            name: None if child is None else self.node(child, _join(path, name), _child(built, name), module.training)
            for name, child in module._modules.items()
        }
        self._open.remove(module)
        if children:
            node["m"] = children
        return node

    def _layer(self, layer: Layer, path: str) -> dict[str, Any]:
        """Node of one of our layers."""
        parameter = getattr(layer, layer.parameter_field)
        earlier = self._layers.get(id(parameter))
        if earlier is None:
            if id(parameter) in self._numbers:
                raise ValueError(_tied(path))
            self._layers[id(parameter)] = layer
            number = self._add(parameter, *encode_layer(path or "the model", layer, self._in_context))
        else:
            number = self._numbers[id(parameter)]
            same = all(getattr(layer, field).equal(getattr(earlier, field)) for field in layer.buffer_fields)
            if (
                type(layer) is not type(earlier)
                or layer.sparse_weight.columns != earlier.sparse_weight.columns
                or not same
            ):
                raise ValueError(_tied(path))
        node: dict[str, Any] = {"k": KINDS[type(layer)], "t": {"weight": number}}
        if layer.bias is not None:
            node["t"]["bias"] = self._number(layer.bias, _join(path, "bias"))
        if layer._modules:
            raise ValueError(f"save: {_label(path)} must have no children, got {sorted(layer._modules)}; remove them")
        config = config_of(layer)
        if config:
            node["c"] = config
        built = make_layer(node["k"], layer.sparse_weight, layer.bias, config, layer.training)
        layer.train(layer.training)  # brings its layout up to date
        reason, _ = difference(layer, built, ignored=("_packed_from", "_ready", "_pending"))
        return node if reason is None else {**node, "o": [_class_name(layer), reason]}

    def _own_tensors(self, module: nn.Module, path: str) -> dict[str, int]:
        """Numbers of the parameters and persistent buffers of module itself."""
        numbers = {}
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None or name in module._non_persistent_buffers_set:
                continue
            packed = packed_names(module)
            if packed is not None and name == packed[0]:
                plain = plain_form(module)
                if plain is not None:
                    numbers[packed[1]] = self._number_of_packed(module, tensor, plain, _join(path, name))
                    continue
            numbers[name] = self._number(tensor, _join(path, name), noted_codes(module, name))
        return numbers

    def _number_of_packed(self, layer: nn.Module, packed: Tensor, plain: Tensor, path: str) -> int:
        key = id(packed), *packing(layer)
        if key not in self._packed:
            encoded = encode_tensor(path, plain, trains=True, in_context=self._in_context)
            self._packed[key] = self._append(*encoded, packed.nbytes)
        return self._packed[key]

    def _number(self, tensor: Tensor, path: str, sums: VectorCodes | None = None) -> int:
        if id(tensor) in self._layers:
            raise ValueError(_tied(path))
        if id(tensor) not in self._numbers:
            trains = tensor.requires_grad or not isinstance(tensor, nn.Parameter)
            summed = id(tensor) not in self._exact
            return self._add(tensor, *encode_tensor(path, tensor, trains, summed, sums, self._in_context))
        return self._numbers[id(tensor)]

    def _add(self, tensor: Tensor, entry: Entry, streams: list[Stream]) -> int:
        self._numbers[id(tensor)] = len(self.entries)
        return self._append(entry, streams, tensor.nbytes)

    def _append(self, entry: Entry, streams: list[Stream], nbytes: int) -> int:
        self.entries.append(entry)
        self.streams.append(streams)
        self._progress.advance(self._task, nbytes)
        return len(self.entries) - 1


def _identity(module: nn.Module, made: nn.Module | None) -> dict[str, Any]:
    """Kind, config and overrides of a module, or why there are none; "built" is the module that they make."""
    kind = registry.kind_of(module)
    if made is not None and difference(module, made, (), kind.ignored if kind else ())[0] is None:
        return {"built": made}
    if kind is None:
        return {"o": [_class_name(module), "its class is not registered"]}
    try:
        config = kind.config(module)
        restored = registry.from_json(json.loads(json.dumps(config)))
        built = registry.construct(kind, restored, "meta")
        if needs_values(built):
            built = registry.construct(kind, restored, "cpu")
    except Exception:  # whatever an altered module makes a constructor raise
        return {"o": [_class_name(module), "its constructor's arguments cannot be read back from it"]}
    reason, overrides = difference(module, built, kind.overrides, kind.ignored)
    if reason is not None:
        return {"o": [_class_name(module), reason]}
    node: dict[str, Any] = {"k": kind.name, "built": built}
    if config:
        node["c"] = config
    if overrides:
        node["a"] = overrides
    return node


def _child(built: nn.Module | None, name: str) -> nn.Module | None:
    return None if built is None else built._modules.get(name)


def _class_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _join(path: str, name: str) -> str:
    if len(path) + len(name) >= MAX_PATH:
        raise ValueError(
            f"save: model must have paths of fewer than {MAX_PATH} characters, got {_label(path)[:40]}...; nest less"
        )
    if not name.isprintable():
        raise ValueError(
            f"save: model must have names of modules and tensors without control characters, got {name[:40]!r} in "
            f"{_label(path)[:40]}; rename it"
        )
    return f"{path}.{name}".removeprefix(".")


def _label(path: str) -> str:
    return path or "the model itself"


def _tied(path: str) -> str:
    return f"save: {_label(path)} must not share its values with a layer of other positions or kind; untie the two"
