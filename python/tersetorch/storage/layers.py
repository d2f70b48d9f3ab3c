"""Our own layers as entries: their format as it is, positions, codebook order and all, never made dense."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tersetorch.formats import CsrWeight, SparseCodebookWeight
from tersetorch.nn import (
    SparseCodebookConv1d,
    SparseCodebookConv2d,
    SparseCodebookLinear,
    SparseConv1d,
    SparseConv2d,
    SparseLinear,
)
from tersetorch.storage import streams, tensors
from tersetorch.storage.entry import Entry
from tersetorch.storage.errors import UNBOUNDED, Budget, TerseFileError, refuse
from tersetorch.storage.streams import Array, Stream

Layer = SparseLinear | SparseCodebookLinear | SparseConv2d | SparseCodebookConv2d | SparseConv1d | SparseCodebookConv1d
Linear = (SparseLinear, SparseCodebookLinear)
LAYERS: dict[str, type[Layer]] = {
    f"tersetorch.{cls.__name__}": cls
    for cls in (
        SparseLinear,
        SparseCodebookLinear,
        SparseConv2d,
        SparseCodebookConv2d,
        SparseConv1d,
        SparseCodebookConv1d,
    )
}
KINDS = {cls: kind for kind, cls in LAYERS.items()}
_NUMPY_CODEBOOK = np.dtype(np.uint32)


def encode_layer(name: str, layer: Layer, in_context: bool = True) -> tuple[Entry, list[Stream]]:
    """The sparse weight of a layer in the smaller of row and column order; with or without coders with contexts.

    Raises:
        ValueError: the layer's tensors are not a valid sparse weight, or have no data.
    """
    weight = layer.sparse_weight
    for field in (*layer.buffer_fields, layer.parameter_field):
        tensors.check_plain(f"{name}.{field}", getattr(layer, field))
    try:
        weight.validate()
    except (TypeError, ValueError) as error:
        raise ValueError(f"save: {name} must hold a valid sparse weight, got one refused as '{error}'") from error
    rows, columns = weight.shape
    row_of = weight.rows.cpu().numpy()
    column_of = weight.cols.cpu().numpy()
    by_columns = column_of * rows + row_of
    down = np.argsort(by_columns, kind="stable")
    entry = Entry(
        (rows, columns),
        torch.float32 if isinstance(weight, SparseCodebookWeight) else weight.values.dtype,
        "sparse-codebook",
        row_of.size,
        trains=getattr(layer, layer.parameter_field).requires_grad,
        compressed=True,
        kernel=() if isinstance(layer, Linear) else dense_shape(layer)[2:],
    )
    by_rows = row_of * columns + column_of
    positions, coding, down_columns = min(
        (
            (by_rows, streams.best_position_coding(by_rows, rows * columns, entry.grid if in_context else None), False),
            (by_columns[down], streams.best_position_coding(by_columns[down], rows * columns), True),
        ),
        key=lambda choice: choice[1].nbytes,
    )
    order = down if down_columns else None
    entries, encoded = _encode_values(weight, entry, order, by_rows, in_context and not down_columns)
    form = "sparse-codebook" if len(encoded) == 2 else "sparse"
    entry = replace(entry, form=form, entries=entries, down_columns=down_columns)
    encoded = [streams.encode_positions("positions", positions, rows * columns, coding), *encoded]
    return entry.with_streams(encoded), encoded


def config_of(layer: Layer) -> dict[str, Any]:
    """What a layer is besides its tensors: any ReLU, its layout and the layout's options, and a convolution's sizes."""
    more: dict[str, Any] = {"relu": True} if layer.relu else {}
    if layer.layout != layer.plain_layout:
        more |= {"layout": layer.layout, **layer.layout_options}
    if isinstance(layer, Linear):
        return more
    one = (1,) * layer.dims
    usual = {"stride": one, "padding": (0,) * layer.dims, "dilation": one, "groups": 1, "padding_mode": "zeros"}
    sizes = {name: getattr(layer, name) for name in usual}
    changed = {name: sizes[name] for name in usual if sizes[name] != usual[name]}
    return {"kernel_size": layer.kernel_size, **changed, **more}


def make_layer(
    kind: str,
    weight: Any,
    bias: Tensor | None,
    config: dict[str, Any],
    training: bool,
    budget: Budget = UNBOUNDED,
) -> Layer:
    """The layer of a kind with a sparse weight and what config_of says of it; its layout is taken from budget.

    Raises:
        TerseFileError: weight or config are none of that layer, or its layout needs more than budget has.
    """
    cls: Any = LAYERS[kind]
    try:
        options = dict(config)
        layout, relu = options.pop("layout", cls.plain_layout), options.pop("relu", False)
        if not isinstance(layout, str) or (cls in Linear and any(type(n) is not int for n in options.values())):
            refuse("name a layout and whole numbers for its options", str(config)[:60])
        if cls in Linear:
            budget.take(_linear_bytes(weight, layout, **options))
            packed: Layer = cls(weight, bias, relu=relu).train(training).pack(layout, **options)
            return packed
        layer: Layer = cls(weight, bias, relu=relu, **options)
        budget.take(_convolution_bytes(layer))
        layer = layer.train(training)
        return layer if layout == cls.plain_layout else layer.pack(layout)
    except (MemoryError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, TerseFileError):
            raise
        refuse(f"hold the weight and the settings of a {kind}", error)


def _linear_bytes(weight: Any, layout: str, column_block: int = 128, **others: Any) -> int:
    """About how much a layout of a linear layer takes; a block that was not named has at least 128 columns."""
    rows, columns, stored = int(weight.shape[0]), int(weight.shape[1]), int(weight.nnz)
    if layout == "bitmap_columns":
        return 8 * (columns * -(-rows // 64) + 3 * columns + 2 * stored)
    if layout.startswith("bitmap"):
        return 8 * (rows * -(-columns // 64) + stored)
    if layout.startswith("blocked"):
        return 8 * (rows * -(-columns // max(1, column_block)) + 2 * stored)
    return 4 * stored


def _convolution_bytes(layer: Any) -> int:
    """About how much the layout of a convolution takes, of blocks of channels or of words of 4 of them."""
    blocks: int = -(-layer.in_channels // layer._channel_block)
    return 8 * (4 * int(layer.out_channels) * blocks + 2 * int(layer.sparse_weight.nnz))


def dense_shape(layer: Layer) -> tuple[int, ...]:
    """The shape of a layer's dense weight."""
    if isinstance(layer, Linear):
        return layer.out_features, layer.in_features
    return layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size


def _encode_values(
    weight: CsrWeight | SparseCodebookWeight,
    entry: Entry,
    order: Array | None,
    positions: NDArray[np.int64],
    in_context: bool,
) -> tuple[int, list[Stream]]:
    """Entries of the codebook (0 for none), and the streams of the values, in this order or as they are."""
    if isinstance(weight, SparseCodebookWeight):
        codes: Array = weight.codes.cpu().numpy()
        codebook = tensors.patterns(weight.codebook)
        counts = np.bincount(codes, minlength=codebook.size)
        context = tensors.context_of(entry, codebook, positions) if in_context else None
        coding = streams.best_code_coding(counts, lambda: codes, context)
        return codebook.size, [
            streams.value_stream("codebook", codebook),
            streams.encode_codes(codes if order is None else codes[order], codebook.size, coding),
        ]
    values = tensors.patterns(weight.values)
    table = tensors.count_patterns(values)
    if order is not None:
        values = values[order]
    coded = tensors.value_coding(values, table, entry if in_context else None, positions)
    return tensors.value_streams(values, table, coded)


def decode_layer(
    kind: str,
    entry: Entry,
    data: list[bytes],
    bias: Tensor | None,
    config: dict[str, Any],
    training: bool,
    budget: Budget = UNBOUNDED,
) -> Layer:
    """The layer of a kind in LAYERS; bias is used, not copied. config is what config_of says.

    Raises:
        TerseFileError: the entry or its streams are no weight of that layer.
    """
    codebooks = issubclass(LAYERS[kind].format, SparseCodebookWeight)
    rows, columns = entry.shape
    positions = tensors.positions_of(entry, data)
    values: Array
    if codebooks:
        if entry.form != "sparse-codebook" or entry.dtype is not torch.float32:
            refuse(f"hold a float32 codebook and codes for a {kind}", f"{entry.form} of {entry.dtype}")
        codebook, values = tensors.codebook_and_codes(entry, data, _NUMPY_CODEBOOK, positions)
    else:
        values = tensors.values_of(entry, data, np.dtype(f"u{entry.dtype.itemsize}"), positions)
    if entry.down_columns and rows:
        positions = positions % rows * columns + positions // rows
        order = np.argsort(positions, kind="stable")
        positions, values = positions[order], values[order]
    starts = np.arange(rows + 1)
    starts *= columns
    row_offsets = np.searchsorted(positions, starts).astype(np.int32)
    positions %= max(1, columns)
    pattern: dict[str, Any] = {
        "row_offsets": tensors.from_patterns(row_offsets, torch.int32),
        "col_indices": tensors.from_patterns(positions.astype(np.int32), torch.int32),
        "columns": columns,
    }
    weight: Any
    if codebooks:
        table = tensors.from_patterns(codebook, torch.float32)[None]
        codes = tensors.from_patterns(values.astype(np.uint8), torch.uint8)
        weight = SparseCodebookWeight(codes=codes, codebook=table, **pattern)
    else:
        weight = CsrWeight(values=tensors.from_patterns(values, entry.dtype), **pattern)
    del positions, values  # a layout takes memory of its own
    layer = make_layer(kind, weight, bias, config, training, budget)
    getattr(layer, layer.parameter_field).requires_grad_(entry.trains)
    return layer
