"""Layers of shared values, sub-vectors, signs, steps or factors, rebuilt from sizes; tensors are stored like any other.

But for packed ones: kernels take codes and bits packed, with chunks that are not full. What a file holds, as
"plain_codes", is uint8 [rows, codes], one by one, so that a coder sees their frequencies and neighbours; as "signs",
bool of the dense weight's shape, True for -1. A reader packs them again. Older files hold the packed "codes".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tersetorch.conversion.thresholds import MONOTONE
from tersetorch.formats import CodebookWeight, ProductWeight
from tersetorch.methods.binarize import ShiftBatchNorm1d, ShiftBatchNorm2d, Sign
from tersetorch.nn import (
    BinaryConv2d,
    BinaryLinear,
    ClusteredConv2d,
    CodebookConv2d,
    CodebookEmbedding,
    CodebookLinear,
    FixedPointConv2d,
    FixedPointLinear,
    FlattenedConv2d,
    LowRankConv2d,
    LowRankLinear,
    ProductConv2d,
    ProductLinear,
    ResidualConv2d,
    ResidualLinear,
    SignMaxPool2d,
)
from tersetorch.nn.fixed_module import FixedPointModule
from tersetorch.nn.shared_module import SharedModule
from tersetorch.nn.sign_module import SignModule
from tersetorch.ops import FLAT_MAX_STAGES
from tersetorch.storage.errors import refuse
from tersetorch.storage.registry import Config, Kind, add, config_of

Packed = SharedModule | SignModule
# The packed buffer of a layer, and the name that a file has for what was packed.
_PLAIN: dict[type[nn.Module], tuple[str, str]] = {SharedModule: ("codes", "plain_codes"), SignModule: ("bits", "signs")}

# The dense layers that they stand in for, and the sizes that both have.
_DENSE: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: ("in_features", "out_features"),
    nn.Conv2d: (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
        "padding_mode",
    ),
    nn.MaxPool2d: ("kernel_size", "stride", "padding", "dilation", "ceil_mode"),
    nn.Embedding: ("num_embeddings", "embedding_dim", "padding_idx"),
}
_LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    BinaryConv2d: nn.Conv2d,
    BinaryLinear: nn.Linear,
    ClusteredConv2d: nn.Conv2d,
    CodebookConv2d: nn.Conv2d,
    CodebookEmbedding: nn.Embedding,
    CodebookLinear: nn.Linear,
    FixedPointConv2d: nn.Conv2d,
    FixedPointLinear: nn.Linear,
    FlattenedConv2d: nn.Conv2d,
    LowRankConv2d: nn.Conv2d,
    LowRankLinear: nn.Linear,
    ProductConv2d: nn.Conv2d,
    ProductLinear: nn.Linear,
    ResidualConv2d: nn.Conv2d,
    ResidualLinear: nn.Linear,
    SignMaxPool2d: nn.MaxPool2d,
}
KINDS = {f"tersetorch.{cls.__name__}": cls for cls in _LAYERS}


def replaces(kind: object, module: nn.Module) -> bool:
    """Whether layers of a kind stand in for modules of this class."""
    cls = KINDS.get(kind) if isinstance(kind, str) else None
    return cls is not None and type(module) is _LAYERS[cls]


def is_of_signs(kind: object) -> bool:
    """Whether modules of a kind hold or pass on packed signs."""
    cls = KINDS.get(kind) if isinstance(kind, str) else None
    return cls is not None and issubclass(cls, SignModule | SignMaxPool2d)


def is_of_codes(kind: object) -> bool:
    """Whether modules of a kind hold codes and what they stand for."""
    cls = KINDS.get(kind) if isinstance(kind, str) else None
    return cls is not None and issubclass(cls, SharedModule)


def is_of_steps(kind: object) -> bool:
    """Whether modules of a kind hold whole steps of fixed point."""
    cls = KINDS.get(kind) if isinstance(kind, str) else None
    return cls is not None and issubclass(cls, FixedPointModule)


def goes_in_chains(module: nn.Module) -> bool:
    """Whether convert may have put an nn.Identity in the place of such a module, as a part of a chain of signs."""
    return isinstance(module, (Sign, *MONOTONE))


def same_sizes(layer: nn.Module, dense: nn.Module) -> bool:
    """Whether a layer of a kind has the sizes of the dense layer it stands in for."""
    # Thresholds hold what was a bias, and a bias may be a batch norm's.
    free = isinstance(layer, SignModule) and (layer.thresholds is not None or layer.bias is not None)
    names = _DENSE[_LAYERS[type(layer)]]
    biased = [getattr(module, "bias", None) is not None for module in (layer, dense)]
    return (free or biased[0] == biased[1]) and all(getattr(layer, name) == getattr(dense, name) for name in names)


def check_layer(module: nn.Module) -> None:
    """Refuses a layer whose tensors, taken from a file, are no weight.

    Raises:
        TerseFileError: a tensor has another dtype, a code names no entry, an unused bit is 1, a step is none, or an
            order of channels is none.
    """
    if isinstance(module, FixedPointModule | SharedModule | SignModule | SignMaxPool2d | ClusteredConv2d):
        try:
            module.shared_weight.validate() if isinstance(module, SharedModule) else module.validate()
        except (TypeError, ValueError) as error:
            refuse(f"hold the weight of a {type(module).__name__}", error)


def packed_names(module: nn.Module) -> tuple[str, str] | None:
    """The packed buffer of a module, and the name that a file has for what was packed; None for other modules."""
    return next((names for kind, names in _PLAIN.items() if isinstance(module, kind)), None)


def plain_form(layer: nn.Module) -> Tensor | None:
    """What was packed: the codes of a layer one by one, uint8 [rows, codes], or its signs, bool of its weight's shape.

    None where packing it again would give others: codes or bits that no pack function made, with padding that is not 0
    or a code that names no entry.
    """
    assert isinstance(layer, SharedModule | SignModule)
    try:
        check_layer(layer)
    except ValueError:
        return None
    if isinstance(layer, SignModule):
        return layer.negative
    weight = layer.shared_weight
    plain = weight.unpacked() if isinstance(weight, CodebookWeight) else weight.row_codes
    return plain if torch.equal(_packed(weight, plain), weight.codes) else None


def packing(layer: nn.Module) -> tuple[object, ...]:
    """What packed numbers depend on beside the numbers."""
    if isinstance(layer, SignModule):
        return type(layer), layer.weight_shape, layer.taps, getattr(layer, "groups", 1)
    assert isinstance(layer, SharedModule)
    values: Tensor = getattr(layer, layer.parameter_field)
    return *_plain_shape(layer.shared_weight), values.shape[-1], getattr(layer, "column_block", 0)


def pack_again(layer: nn.Module, plain: Tensor) -> Tensor:
    """What plain_form took apart, as layer, of the same sizes, holds it.

    Raises:
        TerseFileError: plain holds no codes or signs of that layer.
    """
    name = type(layer).__name__
    if isinstance(layer, SignModule):
        if plain.dtype != torch.bool or tuple(plain.shape) != layer.weight_shape:
            refuse(f"hold bool signs {list(layer.weight_shape)} in a {name}", f"{plain.dtype} {list(plain.shape)}")
        return layer.packed(plain)
    assert isinstance(layer, SharedModule)
    values: Tensor = getattr(layer, layer.parameter_field)
    (rows, columns), entries = _plain_shape(layer.shared_weight), values.shape[-1]
    if plain.dtype != torch.uint8 or tuple(plain.shape) != (rows, columns):
        refuse(f"hold uint8 codes [{rows}, {columns}] in a {name}", f"{plain.dtype} {list(plain.shape)}")
    if plain.numel() and int(plain.max()) >= entries:
        refuse(f"hold the weight of a {name}", f"codes must lie in [0, {entries}), got {int(plain.max())}")
    try:
        return _packed(layer.shared_weight, plain)
    except (TypeError, ValueError) as error:
        refuse(f"hold the sizes of a {name}", error)


def _plain_shape(weight: CodebookWeight | ProductWeight) -> tuple[int, int]:
    return weight.shape if isinstance(weight, CodebookWeight) else (weight.rows, weight.tables)


def _packed(weight: CodebookWeight | ProductWeight, plain: Tensor) -> Tensor:
    if isinstance(weight, CodebookWeight):
        return CodebookWeight.from_codes(plain, _empty(weight.codebook), column_block=weight.column_block).codes
    return ProductWeight.from_codes(plain, _empty(weight.codebooks), weight.columns).codes


def _empty(values: Tensor) -> Tensor:
    """Zeros in the place of values, which may be on device meta."""
    return torch.zeros(values.shape)


def _config(layer: Any) -> Config:
    sizes: Config = layer.sizes
    return sizes


for _name, _cls in KINDS.items():
    # What a layer computes from, made of its parameters; formats are in the config.
    _derived = (*(f"packed_{s}" for s in range(FLAT_MAX_STAGES)), "_packed_from") if _cls is FlattenedConv2d else ()
    if issubclass(_cls, FixedPointModule):
        _derived = ("weight_format", "input_format", "output_format", "packed_steps", "_packed_from")
    add(Kind(_name, _cls, _config, getattr(_cls, "of_sizes", _cls), ignored=_derived))
for _cls in (Sign, ShiftBatchNorm1d, ShiftBatchNorm2d):
    _names = ("stochastic",) if _cls is Sign else ("num_features", "eps", "momentum", "affine", "track_running_stats")
    add(Kind(f"tersetorch.{_cls.__name__}", _cls, config_of(_names, _cls.__init__), _cls))
