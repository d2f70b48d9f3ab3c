"""Our products, each a row of the benches' tables: one op with one format in one mode."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from tersetorch.formats import BlockedCodebookWeight, BlockedWeight, CsrWeight, SparseCodebookWeight
from tersetorch.ops import blocked_matmul_inference, csr_matmul_inference

from .cases import Case
from .implementations import Implementation, Packed


def _csr(case: Case, weight: Tensor, batch: int, threads: int) -> Packed:
    w = CsrWeight.from_dense(weight)
    return Packed(lambda x: lambda: csr_matmul_inference(x, w.row_offsets, w.col_indices, w.values), w.nbytes)


def _csr_codebook(case: Case, weight: Tensor, batch: int, threads: int) -> Packed:
    w = SparseCodebookWeight.from_dense(weight)
    codebook = w.codebook[0]
    return Packed(
        lambda x: lambda: csr_matmul_inference(x, w.row_offsets, w.col_indices, w.codes, None, codebook), w.nbytes
    )


def _blocked(case: Case, weight: Tensor, batch: int, threads: int) -> Packed:
    w = BlockedWeight.from_dense(weight, samples=batch)
    sizes: Any = {"out_features": w.rows, "column_block": w.column_block}
    tensors = (w.block_offsets, w.segments, w.indices, w.values)
    return Packed(lambda x: lambda: blocked_matmul_inference(x, *tensors, **sizes), w.nbytes)


def _blocked_codebook(case: Case, weight: Tensor, batch: int, threads: int) -> Packed:
    w = BlockedCodebookWeight.from_dense(weight, samples=batch)
    sizes: Any = {"out_features": w.rows, "column_block": w.column_block}
    tensors = (w.block_offsets, w.segments, w.indices, w.codes, None, w.codebook[0])
    return Packed(lambda x: lambda: blocked_matmul_inference(x, *tensors, **sizes), w.nbytes)


MANY = (4, math.inf)

LINEAR = (
    Implementation("tersetorch csr", "ours", "float32", _csr),
    Implementation("tersetorch csr codebook", "ours", "float32", _csr_codebook),
    Implementation("tersetorch blocked", "ours", "float32", _blocked, follows_batch=True, batches=MANY),
    Implementation(
        "tersetorch blocked codebook", "ours", "float32", _blocked_codebook, follows_batch=True, batches=MANY
    ),
)
CONV: tuple[Implementation, ...] = ()
OURS = {"linear": LINEAR, "conv": CONV}
