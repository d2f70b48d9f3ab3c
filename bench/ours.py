"""Our layers, each a row of the benches' tables: what it trains, and what it computes from."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tersetorch.nn import SparseCodebookConv2d, SparseCodebookLinear, SparseConv2d, SparseLinear

from .cases import Case, Conv
from .implementations import Implementation, Mode, Packed


def _linear(
    layout: str, *, codebook: bool = False, mode: Mode = "float32", batches: tuple[int, float] = (1, math.inf)
) -> Implementation:
    name = f"tersetorch {layout.replace('_', ' ')}" + " codebook" * codebook
    blocked = layout.startswith("blocked")
    pack = _packer(SparseCodebookLinear if codebook else SparseLinear, layout, blocked)
    return Implementation(name, "ours", mode, pack, follows_batch=blocked, batches=batches)


def _packer(kind: Any, layout: str, follows_batch: bool) -> Callable[[Case, Tensor, int, int], Packed]:
    def pack(case: Case, weight: Tensor, batch: int, threads: int) -> Packed:
        layer = kind(kind.format.from_dense(weight)).eval()
        layer.pack(layout, **({"samples": batch} if follows_batch else {}))
        used = layer.sparse_weight if layout == "csr" else layer.packed_weight
        return Packed(lambda x: lambda: layer(x), used.nbytes)

    return pack


def _convolution(
    layout: str = "direct", *, codebook: bool = False, channels_last: bool = False, bfloat16: bool = False
) -> Implementation:
    """bfloat16: whether images and outputs are; the layout says what is multiplied."""
    kind: Any = SparseCodebookConv2d if codebook else SparseConv2d

    def pack(case: Case, weight: Tensor, batch: int, threads: int) -> Packed:
        assert isinstance(case, Conv)
        sizes: dict[str, Any] = {"stride": case.stride, "padding": case.padding, "groups": case.groups}
        layer = kind(kind.format.from_dense(weight.flatten(1)), kernel_size=weight.shape[2:], **sizes)
        layer.pack(layout).eval()
        order = torch.channels_last if channels_last else torch.contiguous_format

        def bind(x: Tensor) -> Callable[[], Tensor]:
            # Its neighbours would hand it over in this order and dtype.
            ordered = (x.bfloat16() if bfloat16 else x).contiguous(memory_format=order)
            return lambda: layer(ordered)

        return Packed(bind, sum(buffer.nbytes for name, buffer in layer.named_buffers() if name.startswith("packed_")))

    mode: Mode = "int8" if layout == "direct_int8" else "bfloat16" if bfloat16 else "float32"
    title = {"direct": "conv", "direct_int8": "conv int8", "direct_bfloat16": "conv pairs"}[layout]
    images = " bfloat16" * bfloat16 + " channels_last" * channels_last
    return Implementation(f"tersetorch {title}" + " codebook" * codebook + images, "ours", mode, pack)


# Beyond these batches another of ours is always faster; convert measures within the same bounds.
FEW, ALONE, MANY = (1, 8), (1, 2), (4, math.inf)

LINEAR = (
    _linear("csr"),
    _linear("csr", codebook=True),
    _linear("csr16", batches=(1, 16)),
    _linear("csr16", codebook=True, batches=(1, 16)),
    _linear("bitmap", batches=FEW),
    _linear("bitmap", codebook=True, batches=FEW),
    _linear("bitmap_columns", codebook=True, batches=ALONE),
    _linear("bitmap_int8", mode="int8", batches=FEW),
    _linear("blocked", batches=MANY),
    _linear("blocked", codebook=True, batches=MANY),
    _linear("blocked_int8", mode="int8", batches=MANY),
    _linear("blocked_bfloat16", mode="bfloat16", batches=MANY),
)
CONV = (
    _convolution(),
    _convolution(codebook=True),
    _convolution(channels_last=True),
    _convolution(channels_last=True, bfloat16=True),
    _convolution("direct_int8"),
    _convolution("direct_int8", channels_last=True),
    _convolution("direct_bfloat16", channels_last=True, bfloat16=True),
)
OURS = {"linear": LINEAR, "conv": CONV}
