"""Product-quantised layers beside dense ones, and beside the scan of the library of that trade."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tersetorch import _native
from tersetorch.formats import ProductWeight
from tersetorch.nn import ProductLinear

from ..cases import CASES, Linear
from ..implementations import Implementation, LeftOut, Packed, max_error_of, refusal
from ..options import Options
from ..peers import PEERS
from ..rates import Rates
from ..timing import interleave

SECONDS, QUICK_SECONDS = 0.2, 0.08
# Columns of a segment and entries of its codebook.
SETTINGS = ((2, 16), (4, 16), (4, 256), (8, 256))


@dataclass(frozen=True)
class Group:
    """What is timed side by side: one layer in one product-quantised form, one batch."""

    case: Linear
    batch: int
    width: int
    entries: int

    @property
    def pattern(self) -> str:
        """The form in words, which records keep as their pattern."""
        return f"{self.width} columns, {self.entries} entries"

    @property
    def label(self) -> str:
        """One line for a person."""
        return f"{self.case.name}, batch {self.batch}, {self.pattern}"


def groups(options: Options) -> list[Group]:
    """The groups that the options ask for; those of one layer follow each other."""
    names = ("alexnet fc6", "alexnet fc7", "transformer ffn up")
    chosen = [
        Group(case, batch, *setting)
        for name in (names[1:2] if options.quick else names)
        if isinstance(case := CASES[name], Linear)
        for setting in SETTINGS
        for batch in options.batches or ((1,) if options.quick else (1, 8, 64, 256))
    ]
    return [group for group in chosen if options.takes_case(group.case.name)]


class Product:
    """Measures groups. Every result is compared with float64 before it is timed.

    limit_ms is the least time that the multiply-adds of the tables and the additions of the lookups, or the bytes of
    codes, codebooks, samples and result, allow at the rates measured in the same run.
    """

    def __init__(self, options: Options, rates: Rates) -> None:
        self._options = options
        self._rates = rates

    def measure(self, group: Group) -> tuple[list[dict[str, Any]], list[LeftOut]]:
        """The records of a group, and what was left out."""
        with torch.inference_mode():
            return self._measure(group)

    def _measure(self, group: Group) -> tuple[list[dict[str, Any]], list[LeftOut]]:
        case, batch, threads = group.case, group.batch, self._options.threads
        weight = weight_of(group)
        dense = weight.to_dense()
        x = case.samples(batch)
        want = case.reference(x, dense)
        calls: dict[str, Callable[[], Any]] = {}
        kept: dict[str, tuple[Implementation, Packed, float, float]] = {}
        left_out = []
        peers = [row for row in PEERS["linear"] if row.family == "dense"]
        for row in (*peers, *_ours(weight), _faiss(weight)):
            ours = row.family == "ours"
            if not self._options.takes(row.name, ours) or row.missing(batch, threads):
                continue
            try:
                start = time.perf_counter()
                packed = row.pack(case, dense, batch, threads)
                pack_ms = 1e3 * (time.perf_counter() - start)
                call = packed.bind(x)
                result = row.result(call())
            except Exception as problem:  # whatever a library raises where this CPU lacks something
                if ours:
                    raise
                left_out.append(LeftOut(row.name, group.label, str(problem).partition("\n")[0]))
                continue
            # A search returns each sample's largest product only.
            error = max_error_of(result, want.amax(1, keepdim=True) if result.shape == (batch, 1) else want)
            wrong = refusal(error, row.mode)
            if wrong:
                left_out.append(LeftOut(row.name, group.label, wrong, wrong=True))
                continue
            calls[row.name], kept[row.name] = call, (row, packed, pack_ms, error)
        if not calls:
            return [], left_out
        times = interleave(calls, len(calls) * (QUICK_SECONDS if self._options.quick else SECONDS))
        return [self._record(group, weight, x, times[name], *kept[name]) for name in calls], left_out

    def _record(
        self,
        group: Group,
        weight: ProductWeight,
        x: Tensor,
        times: dict[str, float],
        row: Implementation,
        packed: Packed,
        pack_ms: float,
        error: float,
    ) -> dict[str, Any]:
        case, batch = group.case, group.batch
        operations = 2 * case.multiplies(batch, 1.0)
        if row.family != "dense":
            operations = batch * (2.0 * case.in_features * weight.entries + case.out_features * weight.tables)
        moved = packed.nbytes + 4 * (x.numel() + batch * case.out_features)
        level = _native.cpu_active() if row.family == "ours" else _native.cpu_detected()
        limit_ms, bound = self._rates.limit_ms(operations, moved, row.mode, level, cold=False)
        return {
            "suite": "product",
            "case": case.name,
            "kind": case.kind,
            "shape": list(case.shape),
            "density": 1.0,
            "pattern": group.pattern,
            "batch": batch,
            "active": 1.0,
            "cache": "warm",
            "threads": self._options.threads,
            "isa": _native.cpu_active(),
            "implementation": row.name,
            "family": row.family,
            "mode": row.mode,
            "pack_ms": pack_ms,
            "weight_bytes": packed.nbytes,
            "bytes": moved,
            "ops": round(operations),
            "limit_ms": limit_ms,
            "limit": bound,
            "fraction_of_limit": limit_ms / times["p30_ms"],
            "max_error": error,
            **times,
        }


def weight_of(group: Group) -> ProductWeight:
    """Random codes and entries, always the same for the same group."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = group.case.shape
    segments = -(-columns // group.width)
    codes = torch.randint(group.entries, (rows, segments), generator=generator, dtype=torch.uint8)
    entries = torch.randn(1, segments, group.width, group.entries, generator=generator) / columns**0.5
    return ProductWeight.from_codes(codes, entries, columns)


def _ours(weight: ProductWeight) -> Iterator[Implementation]:
    for name, mode in (("tersetorch product", "exact"), ("tersetorch product int8", "int8")):

        def pack(case: Any, dense: Tensor, batch: int, threads: int, mode: str = mode) -> Packed:
            layer = ProductLinear(weight, mode=mode).eval()
            return Packed(lambda x: lambda: layer(x), weight.nbytes)

        yield Implementation(name, "ours", "float32" if mode == "exact" else "int8", pack)


def _faiss(weight: ProductWeight) -> Implementation:
    """For each sample the row of the largest inner product, by tables as ours.

    faiss's fast scan of 4-bit codes sums in 16 bits, which so many segments overflow.
    """

    def pack(case: Any, dense: Tensor, batch: int, threads: int) -> Packed:
        import faiss

        faiss.omp_set_num_threads(threads)
        bits = max(1, (weight.entries - 1).bit_length())
        width = weight.segments * weight.codebooks.shape[2]
        index = faiss.IndexPQ(width, weight.segments, bits, faiss.METRIC_INNER_PRODUCT)
        centres = weight.codebooks[0].transpose(1, 2).contiguous().numpy().ravel()
        faiss.copy_array_to_vector(centres, index.pq.centroids)
        codes = weight.row_codes.numpy()
        if bits == 4:
            codes = codes[:, 0::2] | codes[:, 1::2] << 4
        faiss.copy_array_to_vector(np.ascontiguousarray(codes).ravel(), index.codes)
        index.ntotal = weight.rows
        index.is_trained = True

        def bind(x: Tensor) -> Callable[[], Any]:
            samples = x.numpy()
            return lambda: index.search(samples, 1)[0]

        return Packed(bind, codes.nbytes + centres.nbytes)

    return Implementation("faiss IndexPQ search", "sparse", "float32", pack, needs=("faiss",))
