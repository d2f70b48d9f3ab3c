"""The layouts that a sparse layer can compute from, beside the one it trains and is stored in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tersetorch.formats import (
    BitmapCodebookWeight,
    BitmapColumnsWeight,
    BitmapInt8Weight,
    BitmapWeight,
    BlockedBFloat16Weight,
    BlockedCodebookWeight,
    BlockedInt8Weight,
    BlockedWeight,
    CsrWeight,
    SparseCodebookWeight,
)

PREFIX = "packed_"


@dataclass(frozen=True)
class Layout:
    """One way to lay a weight out for its product.

    Attributes:
        pack: (layer, **options) -> the packed weight, a dataclass; a field that is the layer's own tensor has its name.
        op: the op that takes x and then the arguments, without gradients and without checks in Python.
        arguments: (layer) -> what op takes after x: tensors of the layer, its buffers packed_* and sizes.
        options: what of a packed weight must be known to pack another one alike: names of its fields.
        on_cpu: whether op runs on the CPU only; elsewhere a layer computes from its rows.
    """

    pack: Callable[..., Any]
    op: str
    arguments: Callable[[Any], tuple[Any, ...]]
    options: tuple[str, ...] = ()
    on_cpu: bool = False


# Tensors come straight from the dictionaries: nn.Module looks an attribute up for a third of a microsecond. What a
# packed weight has in common with the rows is the layer's own: values stand in its parameters, codes in its buffers.


def _narrow(layer: Any) -> tuple[Any, ...]:
    buffers, parameters = layer._buffers, layer._parameters
    codes = buffers.get("codes")
    values, codebook = (parameters["values"], None) if codes is None else (codes, parameters["codebook"])
    return buffers["row_offsets"], buffers["packed_col_indices"], values, parameters["bias"], codebook, layer.relu


def _bitmap(layer: Any) -> tuple[Any, ...]:
    buffers, parameters = layer._buffers, layer._parameters
    codes = buffers.get("codes")
    values, codebook = (parameters["values"], None) if codes is None else (codes, parameters["codebook"])
    bias, relu = parameters["bias"], layer.relu
    return buffers["packed_bitmap"], buffers["row_offsets"], values, bias, codebook, None, "exact", relu


def _bitmap_int8(layer: Any) -> tuple[Any, ...]:
    buffers = layer._buffers
    return (
        buffers["packed_bitmap"],
        buffers["row_offsets"],
        buffers["packed_values"],
        layer._parameters["bias"],
        None,
        buffers["packed_scales"],
        "int8",
        layer.relu,
    )


def _columns(layer: Any) -> tuple[Any, ...]:
    buffers, parameters = layer._buffers, layer._parameters
    return (
        buffers["packed_bitmap"],
        buffers["packed_column_offsets"],
        buffers["packed_values"],
        parameters["bias"],
        parameters["codebook"] if "codes" in buffers else None,
        layer.out_features,
        layer.relu,
    )


def _blocks(layer: Any) -> tuple[Any, ...]:
    buffers, parameters = layer._buffers, layer._parameters
    codes = buffers.get("packed_codes")
    values, codebook = (buffers["packed_values"], None) if codes is None else (codes, parameters["codebook"])
    return *_positions(layer), values, parameters["bias"], codebook, *_rest(layer)


def _blocks_int8(layer: Any) -> tuple[Any, ...]:
    buffers = layer._buffers
    numbers = buffers["packed_values"], buffers["packed_scales"], buffers["packed_row_sums"]
    return *_positions(layer), *numbers, layer._parameters["bias"], *_rest(layer)


def _blocks_bfloat16(layer: Any) -> tuple[Any, ...]:
    return *_positions(layer), layer._buffers["packed_values"], layer._parameters["bias"], *_rest(layer)


def _positions(layer: Any) -> tuple[Tensor, ...]:
    buffers = layer._buffers
    return buffers["packed_block_offsets"], buffers["packed_segments"], buffers["packed_indices"]


def _rest(layer: Any) -> tuple[int, int, bool]:
    return layer.out_features, layer._options["column_block"], layer.relu


def _by_format(packs: Mapping[type[Any], Callable[..., Any]]) -> Callable[..., Any]:
    """What lays a layer out whose format is one of those."""
    return lambda layer, **options: packs[layer.format](layer.sparse_weight, **options)


LAYOUTS: dict[str, Layout] = {
    "csr16": Layout(
        _by_format({CsrWeight: CsrWeight.narrowed, SparseCodebookWeight: SparseCodebookWeight.narrowed}),
        "csr_matmul_inference",
        _narrow,
    ),
    "bitmap": Layout(
        _by_format({CsrWeight: BitmapWeight.from_csr, SparseCodebookWeight: BitmapCodebookWeight.from_csr}),
        "bitmap_matmul_inference",
        _bitmap,
    ),
    "bitmap_int8": Layout(
        _by_format({CsrWeight: BitmapInt8Weight.from_csr, SparseCodebookWeight: BitmapInt8Weight.from_csr}),
        "bitmap_matmul_inference",
        _bitmap_int8,
    ),
    "bitmap_columns": Layout(
        _by_format({CsrWeight: BitmapColumnsWeight.from_csr, SparseCodebookWeight: BitmapColumnsWeight.from_csr}),
        "bitmap_columns_matmul_inference",
        _columns,
    ),
    "blocked": Layout(
        _by_format({CsrWeight: BlockedWeight.from_csr, SparseCodebookWeight: BlockedCodebookWeight.from_csr}),
        "blocked_matmul_inference",
        _blocks,
        ("column_block",),
    ),
    "blocked_int8": Layout(
        _by_format({CsrWeight: BlockedInt8Weight.from_csr, SparseCodebookWeight: BlockedInt8Weight.from_csr}),
        "blocked_int8_matmul_inference",
        _blocks_int8,
        ("column_block",),
    ),
    "blocked_bfloat16": Layout(
        _by_format({CsrWeight: BlockedBFloat16Weight.from_csr, SparseCodebookWeight: BlockedBFloat16Weight.from_csr}),
        "blocked_bfloat16_matmul_inference",
        _blocks_bfloat16,
        ("column_block",),
    ),
}
