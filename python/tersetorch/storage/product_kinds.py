"""Layers of shared values or sub-vectors, rebuilt from their sizes; their tensors are stored like any other.

But for codes: kernels take them packed, with chunks that are not full. What a file holds, as "plain_codes", is uint8
[rows, codes], one by one, so that a coder sees their frequencies and neighbours; a reader packs them again. Older files
hold the packed "codes".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tersetorch.formats import CodebookWeight, ProductWeight
from tersetorch.nn import CodebookConv2d, CodebookEmbedding, CodebookLinear, ProductLinear, ResidualLinear
from tersetorch.nn.shared_module import SharedModule
from tersetorch.storage.errors import refuse
from tersetorch.storage.registry import Config, Kind, add

PLAIN_CODES = "plain_codes"

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
    nn.Embedding: ("num_embeddings", "embedding_dim", "padding_idx"),
}
_LAYERS: dict[type[SharedModule], type[nn.Module]] = {
    CodebookConv2d: nn.Conv2d,
    CodebookEmbedding: nn.Embedding,
    CodebookLinear: nn.Linear,
    ProductLinear: nn.Linear,
    ResidualLinear: nn.Linear,
}
KINDS = {f"tersetorch.{cls.__name__}": cls for cls in _LAYERS}


def replaces(kind: object, module: nn.Module) -> bool:
    """Whether layers of a kind stand in for modules of this class."""
    cls = KINDS.get(kind) if isinstance(kind, str) else None
    return cls is not None and type(module) is _LAYERS[cls]


def dense_sizes(layer: nn.Module) -> tuple[object, ...]:
    """The sizes that a layer of a kind has in common with the dense layer it stands in for."""
    names = _DENSE[_LAYERS[type(layer)] if isinstance(layer, SharedModule) else type(layer)]
    return *(getattr(layer, name) for name in names), getattr(layer, "bias", None) is None


def check_layer(module: nn.Module) -> None:
    """Refuses a layer whose tensors, taken from a file, are no weight.

    Raises:
        TerseFileError: a tensor has another dtype, or a code names no entry.
    """
    if isinstance(module, SharedModule):
        try:
            module.shared_weight.validate()
        except (TypeError, ValueError) as error:
            refuse(f"hold the weight of a {type(module).__name__}", error)


def plain_codes(layer: SharedModule) -> Tensor | None:
    """The codes of a layer one by one, uint8 [rows, codes]; None where packing them again would give others.

    Those are codes that no pack function made: padding that is not 0, or a code that names no entry.
    """
    weight = layer.shared_weight
    try:
        weight.validate()
    except (TypeError, ValueError):
        return None
    plain = weight.unpacked() if isinstance(weight, CodebookWeight) else weight.row_codes
    return plain if torch.equal(_packed(weight, plain), weight.codes) else None


def packing(layer: SharedModule) -> tuple[int, int, int, int]:
    """What packed codes depend on beside the codes."""
    values: Tensor = getattr(layer, layer.parameter_field)
    return *_plain_shape(layer.shared_weight), values.shape[-1], getattr(layer, "column_block", 0)


def pack_codes(layer: SharedModule, plain: Tensor) -> Tensor:
    """What plain_codes took apart, as layer, of the same sizes, holds it.

    Raises:
        TerseFileError: plain holds no codes of that layer.
    """
    name = type(layer).__name__
    rows, columns, entries, _ = packing(layer)
    if plain.dtype != torch.uint8 or tuple(plain.shape) != (rows, columns):
        refuse(f"hold uint8 codes [{rows}, {columns}] in a {name}", f"{plain.dtype} {list(plain.shape)}")
    if plain.numel() and int(plain.max()) >= entries:
        refuse(f"hold the weight of a {name}", f"codes must lie in [0, {entries}), got {int(plain.max())}")
    return _packed(layer.shared_weight, plain)


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
    add(Kind(_name, _cls, _config, _cls.of_sizes))  # type: ignore[attr-defined]
