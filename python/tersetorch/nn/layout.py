"""The layouts that a sparse linear layer can compute from, beside the one it trains and is stored in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tersetorch import ops
from tersetorch.formats import BlockedCodebookWeight, BlockedWeight, CsrWeight, SparseCodebookWeight

PREFIX = "packed_"


@dataclass(frozen=True)
class Layout:
    """One way to lay a weight out for its product.

    Attributes:
        formats: the packed format of each format that a layer trains.
        options: what of a packed weight must be known to pack another one alike, besides the format: field names.
        multiply: (layer, x) -> y, from the buffers packed_*, without gradients and without checks in Python.
    """

    formats: Mapping[type[Any], type[Any]]
    options: tuple[str, ...]
    multiply: Callable[[Any, Tensor], Tensor]


def _multiply_blocks(layer: Any, x: Tensor) -> Tensor:
    # Straight from the dictionaries: nn.Module looks an attribute up for a third of a microsecond.
    buffers, parameters = layer._buffers, layer._parameters
    codes = buffers.get("packed_codes")
    values, codebook = (buffers["packed_values"], None) if codes is None else (codes, parameters["codebook"])
    return ops.blocked_matmul_inference(
        x,
        buffers["packed_block_offsets"],
        buffers["packed_segments"],
        buffers["packed_indices"],
        values,
        parameters["bias"],
        codebook,
        out_features=layer.out_features,
        column_block=layer._options["column_block"],
    )


LAYOUTS: dict[str, Layout] = {
    "blocked": Layout(
        {CsrWeight: BlockedWeight, SparseCodebookWeight: BlockedCodebookWeight}, ("column_block",), _multiply_blocks
    ),
}
