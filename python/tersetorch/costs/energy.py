"""Picojoules of one inference, by operation and memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from tersetorch.costs import flattened
from tersetorch.costs.arithmetic import NORMS, operations
from tersetorch.costs.coefficients import ACCESSES, COEFFICIENTS
from tersetorch.costs.count import hides_products, kind_of, multiplies, own_modules
from tersetorch.costs.runs import LayerRun, arguments, run
from tersetorch.nn import CodebookEmbedding, FlattenedConv2d
from tersetorch.nn.fixed_module import FixedPointModule
from tersetorch.nn.shared_module import SharedModule
from tersetorch.nn.sign_module import SignModule

CACHE_BYTES = 2**20


@dataclass(frozen=True)
class LayerEnergy:
    """What one layer takes for the example inputs.

    Attributes:
        name: its path in the model, "" for the model itself.
        kind: its class.
        operations: how often it does what, by the names of COEFFICIENTS.
        bits: that it takes from each memory or gives to it: "register", "sram", "dram".
        picojoules: of each of these operations and memories.
    """

    name: str
    kind: str
    operations: Mapping[str, int]
    bits: Mapping[str, int]
    picojoules: Mapping[str, float]

    @property
    def total(self) -> float:
        """All of it, in picojoules."""
        return sum(self.picojoules.values())

    @property
    def arithmetic(self) -> float:
        """The operations, in picojoules."""
        return sum(energy for name, energy in self.picojoules.items() if name not in ACCESSES)


@dataclass(frozen=True)
class ModelEnergy:
    """What a model takes for the example inputs.

    Attributes:
        layers: every layer that was counted and ran, in the model's order.
        uncounted: paths of modules whose operations are not in it.
        cache_bytes: of the memory on the chip.
        weight_bytes: of all layers, what plain layers share once; they stay on the chip between inferences where they
            fit.
    """

    layers: tuple[LayerEnergy, ...]
    uncounted: tuple[str, ...]
    cache_bytes: int
    weight_bytes: int

    @property
    def picojoules(self) -> dict[str, float]:
        """Of each operation and memory, in the order of COEFFICIENTS."""
        found: Counter[str] = Counter()
        for layer in self.layers:
            found.update(layer.picojoules)
        return {name: found[name] for name in COEFFICIENTS if name in found}

    @property
    def total(self) -> float:
        """All of it, in picojoules."""
        return sum(layer.total for layer in self.layers)

    @property
    def inferred(self) -> tuple[str, ...]:
        """The operations in it whose energy no source states."""
        return tuple(name for name in self.picojoules if COEFFICIENTS[name].inferred)


def energy(
    model: nn.Module,
    example_inputs: Tensor | tuple[Any, ...] | Mapping[str, Any],
    *,
    cache_bytes: int = CACHE_BYTES,
) -> ModelEnergy:
    """Adds up the energy of one inference on hardware in 45 nm CMOS, by a table of what each step takes.

    E = sum over operations of (times done) * E(operation) + sum over memories of (words of 32 bits moved) * E(memory).

    Operations are those that the layer does: a dense layer multiplies by its zeros, a sparse one passes over them, one
    of codes or products multiplies in the arithmetic of its layout, one of signs compares and counts bits, or adds.
    Normalisation counts a multiplication and an addition a number, and what statistics take where none are kept.
    Indices, masks, activations and pooling count nothing.

    Memory: weights, in the bytes of the format that the layer computes from, come from DRAM at every call, unless those
    of the whole model fit cache_bytes, which then keeps them between inferences. What a layer is handed and gives moves
    to and from DRAM unless both fit what is left of the cache; a flattened convolution of layout "chain" hands on its
    maps likewise. Each of these bytes passes the cache once, and every
    operand of a product is read from a register once: sums stay where they are added up. That is the least that any
    order of computing moves, so this is a lower bound, and a comparison of models rather than a forecast.

    Args:
        model: on any device, trained or converted.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments; the batch that they have is what
            weights are fetched for.
        cache_bytes: of the memory on the chip, of banks of 32 KiB.

    Returns:
        Picojoules, operations and bits by layer. model is left as it was.

    Raises:
        TypeError: model is no nn.Module, example_inputs is none of the three, or cache_bytes no int.
        ValueError: cache_bytes is negative, model still has lazy parameters, or the table has no figure for a dtype.

    Source:
        Horowitz, Computing's energy problem (2014); Han et al. (2015), figure 1, and (2016), section 1. Each figure of
        costs.COEFFICIENTS names its own; those marked inferred are ours.
    """
    args, kwargs = arguments("energy", model, example_inputs)
    if not isinstance(cache_bytes, int) or isinstance(cache_bytes, bool):
        raise TypeError(f"energy: cache_bytes must be an int, got {type(cache_bytes).__name__}; pass whole bytes")
    if cache_bytes < 0:
        raise ValueError(f"energy: cache_bytes must be at least 0, got {cache_bytes}; pass 0 for no cache")
    modules = list(own_modules(model))
    counted = {module: name for name, module in modules if _counts(module)}
    runs = run(model, counted, args, kwargs)
    weights = {module: _weight_bytes(module) for module in counted}
    held = sum(weights.values()) - _shared_bytes(counted)
    kept = held <= cache_bytes
    left = cache_bytes - held if kept else cache_bytes
    layers = tuple(
        _layer(name, module, runs[module], weights[module], kept, left)
        for module, name in counted.items()
        if module in runs
    )
    uncounted = tuple(name for name, module in modules if module not in counted and _hides(module))
    return ModelEnergy(layers, uncounted, cache_bytes, held)


def _counts(module: nn.Module) -> bool:
    return multiplies(module) or isinstance(module, (*NORMS, nn.Embedding, CodebookEmbedding))


def _shared_bytes(modules: Iterable[nn.Module]) -> int:
    """Bytes of weights and biases that a plain layer has from an earlier one."""
    seen: set[int] = set()
    again = 0
    for module in modules:
        if isinstance(module, nn.Linear | _ConvNd | nn.Embedding):
            parameters = list(module.parameters(recurse=False))
            again += sum(each.nbytes for each in parameters if id(each) in seen)
            seen |= {id(each) for each in parameters}
    return again


def _hides(module: nn.Module) -> bool:
    return hides_products(module) or isinstance(module, nn.EmbeddingBag)


def _layer(name: str, module: nn.Module, ran: LayerRun, weight: int, kept: bool, left: int) -> LayerEnergy:
    looked_up = isinstance(module, nn.Embedding | CodebookEmbedding)
    done, operands = (Counter[str](), 0) if looked_up else operations(module, ran)
    fetched = ran.written if looked_up else ran.calls * weight
    handed = sum(ran.moved)
    outside = (0 if kept else fetched) + sum(each for each in ran.moved if each > left)
    bits = {"register": operands, "sram": 8 * (fetched + handed), "dram": 8 * outside}
    spent = {one: times * COEFFICIENTS[one].picojoules for one, times in done.items() if times}
    spent |= {one: count / 32 * COEFFICIENTS[one].picojoules for one, count in bits.items() if count}
    return LayerEnergy(name, kind_of(module), dict(done), bits, spent)


def _weight_bytes(module: nn.Module) -> int:
    """Bytes of what a call reads beside its inputs."""
    bias = getattr(module, "bias", None)
    others = bias.nbytes if isinstance(bias, Tensor) else 0
    if isinstance(module, NORMS):
        return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()) if tensor.dim() > 0)
    if isinstance(module, FlattenedConv2d):
        return flattened.weight_bytes(module)
    if isinstance(module, SignModule):
        return sum(tensor.nbytes for tensor in module.buffers())
    if isinstance(module, FixedPointModule):
        return module.steps.nbytes + others
    weight: Any = getattr(module, "packed_weight", None)
    if weight is None:
        own = "sparse_weight" if hasattr(type(module), "sparse_weight") else "shared_weight"
        weight = getattr(module, own) if own != "shared_weight" or isinstance(module, SharedModule) else module.weight
    if hasattr(weight, "nbytes"):
        return int(weight.nbytes) + others
    # A convolution's own layouts, tensors and sizes.
    return sum(part.nbytes for part in vars(weight).values() if isinstance(part, Tensor)) + others
