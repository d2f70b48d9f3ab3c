"""Layers of shared values or sub-vectors, rebuilt from their sizes; their tensors are stored like any other."""

from __future__ import annotations

from torch import nn

from tersetorch.nn import CodebookConv2d, CodebookLinear, ProductLinear, ResidualLinear
from tersetorch.nn.codebook_module import CodedModule
from tersetorch.storage.errors import refuse
from tersetorch.storage.registry import Config, Kind, add

KINDS = {f"tersetorch.{cls.__name__}": cls for cls in (CodebookConv2d, CodebookLinear, ProductLinear, ResidualLinear)}


_LINEAR = ("in_features", "out_features")
_CONV = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")


def replaces(kind: object, module: nn.Module) -> bool:
    """Whether layers of a kind stand in for modules of this class."""
    cls = KINDS.get(kind) if isinstance(kind, str) else None
    return cls is not None and type(module) is (nn.Conv2d if issubclass(cls, CodebookConv2d) else nn.Linear)


def dense_sizes(layer: nn.Module) -> tuple[object, ...]:
    """The sizes that a layer of a kind has in common with the dense layer it stands in for."""
    names = _CONV if isinstance(layer, CodebookConv2d | nn.Conv2d) else _LINEAR
    return *(getattr(layer, name) for name in names), layer.bias is None


def check_layer(module: nn.Module) -> None:
    """Refuses a layer whose tensors, taken from a file, are no weight.

    Raises:
        TerseFileError: a tensor has another dtype, or a code names no entry.
    """
    if isinstance(module, ProductLinear | CodedModule):
        weight = module.product_weight if isinstance(module, ProductLinear) else module.codebook_weight
        try:
            weight.validate()
        except (TypeError, ValueError) as error:
            refuse(f"hold the weight of a {type(module).__name__}", error)


def _config(layer: ProductLinear | CodedModule) -> Config:
    return layer.sizes


for _name, _cls in KINDS.items():
    add(Kind(_name, _cls, _config, _cls.of_sizes))
