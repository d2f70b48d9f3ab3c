"""Takes the neurons that nothing enters or nothing leaves out of a network: its layers become smaller."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.utils.parametrize import type_before_parametrizations

from tersetorch.methods.arguments import check_model
from tersetorch.methods.modes import evaluating
from tersetorch.methods.parametrization import live_weight, parametrized_tensors
from tersetorch.methods.selection import Patterns, select

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# What makes each value from the value at its place alone.
ELEMENTWISE = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.LogSigmoid,
    nn.Tanh, nn.Tanhshrink, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.Hardshrink, nn.Softplus, nn.Softshrink,
    nn.Softsign, nn.Threshold, nn.Identity, _DropoutNd,
)  # fmt: skip
ELEMENTWISE_FUNCTIONS = {
    torch.relu, torch.tanh, torch.sigmoid, functional.relu, functional.relu6, functional.leaky_relu, functional.elu,
    functional.celu, functional.selu, functional.gelu, functional.silu, functional.mish, functional.hardtanh,
    functional.hardswish, functional.hardsigmoid, functional.softplus, functional.sigmoid, functional.tanh,
    functional.dropout,
}  # fmt: skip
ELEMENTWISE_METHODS = {"relu", "tanh", "sigmoid", "contiguous"}
# What makes each channel, dimension 1, from that channel alone.
POOLS = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
)  # fmt: skip
POOL_FUNCTIONS = {
    functional.max_pool1d, functional.max_pool2d, functional.max_pool3d, functional.avg_pool1d, functional.avg_pool2d,
    functional.avg_pool3d, functional.adaptive_avg_pool1d, functional.adaptive_avg_pool2d,
    functional.adaptive_avg_pool3d,
}  # fmt: skip
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def remove_dead_neurons(
    model: nn.Module,
    example_inputs: Tensor | tuple[Any, ...] | Mapping[str, Any],
    *,
    targets: Patterns | None = None,
    ignore: Patterns | None = None,
) -> nn.Module:
    """Removes output channels of Linear and Conv layers that add nothing, in place, and returns model.

    A neuron is an output feature of a Linear or an output channel of a Conv1d, 2d or 3d layer. One goes when

    - no weight leaves it: the layers that read it have zero weights for it; or
    - no weight enters it: its own weights are zero, so that it is constant; what the constant gives goes into the
      biases of the layers that read it. Where one of these has no bias, or pads with zeros what is not zero, it stays.

    Removing one may leave others with nothing: it goes on until none is left to remove, but keeps one in each layer.
    Weights, biases, masks, codes and batch norms between the layers lose the channel, so that in evaluation mode, on
    inputs of the example's size, the outputs are the same within rounding. Their parameters are new, smaller ones:
    build the optimizer anew. Retraining with weight decay first empties more of them.

    A layer is looked at when only activations, pooling, dropout, batch norm, flattening from dimension 1 and means over
    positions stand between it and the Linear and ungrouped Conv layers that read it. A layer whose output is added,
    concatenated or returned stays as it is; so does one that runs twice, shares its weight, has a parametrization of
    someone else, or whose parameters the model reads by itself. A module with hooks stops it.

    Args:
        model: what torch.fx can trace; live and finalized models alike.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments.
        targets: the layers that may lose neurons, as in prune.magnitude.
        ignore: as in prune.magnitude.

    Raises:
        TypeError: model is no module, or example_inputs is none of the three.
        ValueError: torch.fx cannot trace model, it fails on example_inputs, or as prune.magnitude. It is as it was.

    Source:
        Han, Pool, Tran, Dally, Learning both weights and connections (2015), section 3.5 (pruning neurons). Where we
        differ: a neuron that nothing enters is removed with its constant kept, at once, not after further training.
    """
    where = "prune.remove_dead_neurons"
    check_model(where, model)
    selected = select(where, model, targets, ignore, frozen=True)  # the outputs stay, so frozen layers may shrink
    chosen = {id(module) for target in selected for module, _ in target.owners}
    with torch.no_grad(), evaluating(model):
        graph = _trace(where, model)  # in evaluation: functional.dropout is traced as it is there
        undo: list[Callable[[], object]] = []
        try:
            changed = True
            while changed:
                changed = False
                for node in graph.graph.nodes:
                    if id(graph.modules.get(node)) in chosen:
                        values = _run(where, graph, example_inputs)
                        changed |= _shrink(graph, node, values, undo)
            _run(where, graph, example_inputs)
        except BaseException:
            for step in reversed(undo):
                step()
            raise
    return model


@dataclass(frozen=True)
class _Graph:
    """A traced model.

    Attributes:
        graph: its calls.
        model: whose modules they are.
        modules: the module of each node that calls one.
        alone: ids of the modules that run once and hold no parameter that another module holds.
    """

    graph: fx.Graph
    model: fx.GraphModule
    modules: Mapping[fx.Node, nn.Module]
    alone: set[int]


@dataclass
class _Region:
    """What stands between a layer and those that read it.

    Attributes:
        nodes: the nodes in between, in order.
        norms: the batch norms among them.
        readers: the nodes of the layers that read it, each with the node that it reads.
    """

    nodes: list[fx.Node] = field(default_factory=list)
    norms: list[_BatchNorm] = field(default_factory=list)
    readers: list[tuple[fx.Node, fx.Node]] = field(default_factory=list)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # A parametrized class is no class of torch.nn, yet one call.
        kinds = (nn.Linear, *CONVOLUTIONS, *BATCH_NORMS)
        return type_before_parametrizations(m) in kinds or super().is_leaf_module(m, module_qualified_name)


class _Record(fx.Interpreter):
    """Runs a graph and keeps what every node gave."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        # A later call may write into the tensor; only shapes are read of what stays.
        self.values[n] = result
        return result


def _trace(where: str, model: nn.Module) -> _Graph:
    try:
        graph = _Tracer().trace(model)
        traced = fx.GraphModule(model, graph)
    except Exception as error:  # whatever the model's forward raises on a proxy
        raise ValueError(
            f"{where}: model must be traceable by torch.fx, got {type(error).__name__}: {error}; call it on the part "
            "of the model that is"
        ) from error
    modules = {node: traced.get_submodule(str(node.target)) for node in graph.nodes if node.op == "call_module"}
    calls = Counter(id(module) for module in modules.values())
    # What the model reads by itself, as get_attr nodes.
    read = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    by_name = dict(traced.named_parameters(remove_duplicate=False))
    own = {id(by_name[name]) for name in read if name in by_name}
    holders = Counter(id(tensor) for module in set(model.modules()) for tensor in module.parameters(recurse=False))
    alone = {
        id(module)
        for module in modules.values()
        if calls[id(module)] == 1
        and not (module._forward_hooks or module._forward_pre_hooks)
        and all(holders[id(tensor)] == 1 and id(tensor) not in own for tensor in module.parameters())
    }
    return _Graph(graph, traced, modules, alone)


def _run(where: str, graph: _Graph, example_inputs: object) -> dict[fx.Node, Any]:
    """What every node gives for the example inputs."""
    names = [str(node.target) for node in graph.graph.nodes if node.op == "placeholder"]
    if isinstance(example_inputs, Tensor):
        args: tuple[Any, ...] = (example_inputs,)
    elif isinstance(example_inputs, tuple):
        args = example_inputs
    elif isinstance(example_inputs, Mapping):
        unknown = set(example_inputs) - set(names)
        given = [name for name in names if name in example_inputs]
        if unknown or given != names[: len(given)]:
            raise ValueError(
                f"{where}: example_inputs must name the arguments {names} from the first, got {list(example_inputs)}; "
                "pass a tuple in that order"
            )
        args = tuple(example_inputs[name] for name in given)
    else:
        raise TypeError(
            f"{where}: example_inputs must be a tensor, a tuple of arguments or a dict of keyword arguments, got "
            f"{type(example_inputs).__name__}; wrap a single argument in a tuple"
        )
    record = _Record(graph.model)
    try:
        record.run(*args)
    except Exception as error:  # whatever the model raises
        raise ValueError(
            f"{where}: model must run on example_inputs, got {type(error).__name__}: {error}; pass inputs as it takes"
        ) from error
    return record.values


def _shrink(graph: _Graph, node: fx.Node, values: Mapping[fx.Node, Any], undo: list[Callable[[], object]]) -> bool:
    """Removes the dead neurons of the layer that node calls; whether there were any. undo gets what takes it back."""
    layer: Any = graph.modules[node]
    region = _region(graph, node, values)
    if region is None:
        return False
    channels = layer.weight.shape[0]
    if not channels:
        return False
    entered = layer.weight.flatten(1).any(1)
    constants = _constants(graph, node, region, values)
    dead = torch.ones_like(entered)
    for reader, _ in region.readers:
        module: Any = graph.modules[reader]
        repeat = module.weight.shape[1] // channels
        left = module.weight.movedim(1, 0).flatten(1).any(1).view(channels, repeat).any(1)
        dead &= ~left | (~entered & _absorbs(module, constants[reader].view(channels, repeat)))
    if bool(dead.all()):
        dead[0] = False
    if not bool(dead.any()):
        return False
    for reader, _ in region.readers:
        module = graph.modules[reader]
        repeat = module.weight.shape[1] // channels
        gone = dead.repeat_interleave(repeat)
        _move_into_bias(module, gone, constants[reader], undo)
        _select(module, "weight", 1, ~gone, undo)
        _set_size(module, "in", int((~gone).sum()), undo)
    for norm in region.norms:
        gone = dead.repeat_interleave(norm.num_features // channels)
        for name in ("weight", "bias", "running_mean", "running_var"):
            _select(norm, name, 0, ~gone, undo)
        _set(norm, "num_features", int((~gone).sum()), undo)
    _select(layer, "weight", 0, ~dead, undo)
    _select(layer, "bias", 0, ~dead, undo)
    _set_size(layer, "out", int((~dead).sum()), undo)
    return True


def _region(graph: _Graph, node: fx.Node, values: Mapping[fx.Node, Any]) -> _Region | None:
    """What reads the channels of the layer that node calls; None where something mixes them or hands them out."""
    layer = graph.modules[node]
    if not _is_plain(graph, layer) or not _fits(layer, values[node]):
        return None
    region = _Region()
    spread = [node]
    for source in spread:  # grows on the way
        for user in source.users:
            if user in spread:
                continue
            module = graph.modules.get(user)
            if _asks_batch(user):
                continue
            if user.args[:1] != (source,) or any(source in _nodes(rest) for rest in (user.args[1:], user.kwargs)):
                return None
            if module is not None and _is_plain(graph, module) and _reads(module, values[source], layer):
                region.readers.append((user, source))
                continue
            if not _keeps_channels(user, module, graph, layer, values[source], values[user], values[node].ndim):
                return None
            if isinstance(module, _BatchNorm):
                region.norms.append(module)
            spread.append(user)
    order = {each: place for place, each in enumerate(graph.graph.nodes)}
    region.nodes = sorted(spread[1:], key=order.__getitem__)
    return region if region.readers else None


def _asks_batch(user: fx.Node) -> bool:
    """Whether user only asks for the size of dimension 0."""
    if user.op == "call_method" and user.target == "size":
        return user.args[1:] == (0,)
    shape = user.op == "call_function" and user.target is getattr and user.args[1:] == ("shape",)
    return shape and all(each.target is operator.getitem and each.args[1:] == (0,) for each in user.users)


def _nodes(arguments: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg(arguments, found.append)
    return found


def _is_plain(graph: _Graph, module: nn.Module) -> bool:
    """Whether module is a Linear or ungrouped Conv layer that can change its size without anyone else noticing."""
    kind = type_before_parametrizations(module)
    if kind is not nn.Linear and not (kind in CONVOLUTIONS and getattr(module, "groups", 0) == 1):
        return False
    ours = all(live_weight(module, name) is not None for name in parametrized_tensors(module))
    return ours and id(module) in graph.alone


def _fits(layer: nn.Module, output: Tensor) -> bool:
    """Whether output is of a batch: the channels of an unbatched image lie elsewhere."""
    return output.ndim == 2 + len(layer.kernel_size) if isinstance(layer, _ConvNd) else output.ndim > 1


def _reads(module: nn.Module, x: Tensor, layer: nn.Module) -> bool:
    """Whether the channels of layer, of which x is made, are module's input channels, each once or many in a row."""
    if isinstance(module, nn.Linear):
        return isinstance(layer, nn.Linear) or x.ndim == 2
    return isinstance(layer, _ConvNd) and isinstance(module, _ConvNd) and x.ndim == 2 + len(module.kernel_size)


def _keeps_channels(
    user: fx.Node, module: nn.Module | None, graph: _Graph, layer: nn.Module, x: Tensor, y: Any, rank: int
) -> bool:
    """Whether user makes each channel of y from the same channel of x; rank is that of layer's output."""
    if not isinstance(y, Tensor):
        return False
    if module is None:
        if user.target is functional.dropout and user.kwargs.get("training", (*user.args, 0.5, True)[2]) is not False:
            return False  # it drops in evaluation too
        if user.target in ELEMENTWISE_FUNCTIONS or (user.op == "call_method" and user.target in ELEMENTWISE_METHODS):
            return True
    elif module._forward_hooks or module._forward_pre_hooks:
        return False
    elif isinstance(module, ELEMENTWISE):
        return True
    if isinstance(layer, nn.Linear) and x.ndim != 2:
        return False  # the channels are the last dimension, not dimension 1
    if isinstance(module, BATCH_NORMS):
        fits = module.running_mean is not None and x.shape[1] == module.num_features
        return fits and type(module) in BATCH_NORMS and id(module) in graph.alone
    if isinstance(module, POOLS) or user.target in POOL_FUNCTIONS:
        return x.ndim == rank > 2
    if isinstance(module, nn.Flatten):
        return bool(module.start_dim == 1) and module.end_dim in (-1, x.ndim - 1)
    rest = user.args[1:]
    if user.target in (torch.flatten, "flatten"):
        named = dict(zip(("start_dim", "end_dim"), rest, strict=False)) | user.kwargs
        return bool(named.get("start_dim", 0) == 1) and named.get("end_dim", -1) in (-1, x.ndim - 1)
    if user.target in (torch.reshape, "view", "reshape"):
        # Any other size would be that of the network before it shrank.
        sizes = rest[0] if len(rest) == 1 and isinstance(rest[0], Sequence) else rest
        return len(sizes) == 2 and bool(sizes[1] == -1) and y.shape[0] == x.shape[0]
    if user.target in (torch.mean, "mean"):
        dims = rest[0] if rest else user.kwargs.get("dim")
        listed = [dims] if isinstance(dims, int) else dims
        return isinstance(listed, Sequence) and all(isinstance(dim, int) and dim % x.ndim >= 2 for dim in listed)
    return False


def _constants(graph: _Graph, node: fx.Node, region: _Region, values: Mapping[fx.Node, Any]) -> dict[fx.Node, Tensor]:
    """What each reader sees in each of its input channels when the layer gives its bias; NaN where that varies."""
    layer: Any = graph.modules[node]
    output = values[node]
    bias = output.new_zeros(layer.weight.shape[0]) if layer.bias is None else layer.bias.to(output.dtype)
    shape = [1] * output.ndim
    shape[1 if isinstance(layer, _ConvNd) else -1] = -1
    interpreter = fx.Interpreter(graph.model, garbage_collect_values=False)
    interpreter.env = {**values, node: bias.view(shape).expand_as(output).clone()}
    for each in region.nodes:
        interpreter.env[each] = interpreter.run_node(each)
    found = {}
    for reader, source in region.readers:
        module: Any = graph.modules[reader]
        x = interpreter.env[source]
        axis = 1 if isinstance(module, _ConvNd) else x.ndim - 1
        rows = x.movedim(axis, 0).flatten(1)
        if not rows.shape[1]:
            found[reader] = rows.new_full(rows.shape[:1], torch.nan)
            continue
        found[reader] = torch.where((rows == rows[:, :1]).all(1), rows[:, 0], torch.nan)
    return found


def _absorbs(module: Any, constants: Tensor) -> Tensor:
    """For each neuron whether module's bias can take in its constants, [neurons, inputs of each]."""
    padded = (
        isinstance(module, _ConvNd) and module.padding_mode == "zeros" and any(module._reversed_padding_repeated_twice)
    )
    if not isinstance(module._parameters.get("bias"), nn.Parameter) or padded:
        return (constants == 0).all(1)
    return constants.isfinite().all(1)


def _move_into_bias(module: Any, gone: Tensor, constants: Tensor, undo: list[Callable[[], object]]) -> None:
    """Adds what the inputs that go have given to the bias."""
    bias = module._parameters.get("bias")
    # One that leaves by no weight may have any constant, also one that varies.
    constant = torch.where(constants[gone].isfinite(), constants[gone], 0).double()
    if isinstance(bias, nn.Parameter):
        weight = module.weight[:, gone].double()
        given = (weight.flatten(2).sum(2) if weight.ndim > 2 else weight).matmul(constant).to(bias)
        _put(module._parameters, "bias", nn.Parameter(bias + given, bias.requires_grad), undo)


def _select(module: nn.Module, name: str, dim: int, kept: Tensor, undo: list[Callable[[], object]]) -> None:
    """Keeps the entries of one dimension of a parameter or buffer, its mask and codes too.

    A new parameter takes the old one's place: graphs that hold the old one keep its shape.
    """
    live = live_weight(module, name)
    places: list[tuple[nn.Module, str]] = [(module, name)]
    if live is not None:
        places = [(live.compressed, "mask"), (live.compressed, "codes"), (live.held, "original")]
    for holder, key in places:
        table: dict[str, Any] = holder._parameters if key in holder._parameters else holder._buffers
        held = table.get(key)
        if held is not None:
            new = held.detach().index_select(dim, kept.nonzero().flatten().to(held.device))
            _put(table, key, nn.Parameter(new, held.requires_grad) if isinstance(held, nn.Parameter) else new, undo)


def _put(table: dict[str, Any], key: str, new: Tensor, undo: list[Callable[[], object]]) -> None:
    undo.append(partial(table.__setitem__, key, table[key]))
    table[key] = new


def _set_size(module: nn.Module, side: str, size: int, undo: list[Callable[[], object]]) -> None:
    _set(module, f"{side}_features" if isinstance(module, nn.Linear) else f"{side}_channels", size, undo)


def _set(module: nn.Module, attribute: str, value: int, undo: list[Callable[[], object]]) -> None:
    undo.append(partial(setattr, module, attribute, getattr(module, attribute)))
    setattr(module, attribute, value)
