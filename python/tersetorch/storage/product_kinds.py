"""Layers of shared values or sub-vectors, rebuilt from their sizes; their tensors are stored like any other."""

from __future__ import annotations

from torch import nn

from tersetorch.nn import CodebookLinear, ProductLinear, ResidualLinear
from tersetorch.storage.errors import refuse
from tersetorch.storage.registry import Config, Kind, add

KINDS = {f"tersetorch.{cls.__name__}": cls for cls in (CodebookLinear, ProductLinear, ResidualLinear)}


def check_layer(module: nn.Module) -> None:
    """Refuses a layer whose tensors, taken from a file, are no weight.

    Raises:
        TerseFileError: a tensor has another dtype, or a code names no entry.
    """
    if isinstance(module, ProductLinear | CodebookLinear):
        weight = module.product_weight if isinstance(module, ProductLinear) else module.codebook_weight
        try:
            weight.validate()
        except (TypeError, ValueError) as error:
            refuse(f"hold the weight of a {type(module).__name__}", error)


def _config(layer: ProductLinear | CodebookLinear) -> Config:
    return layer.sizes


for _name, _cls in KINDS.items():
    add(Kind(_name, _cls, _config, _cls.of_sizes))
