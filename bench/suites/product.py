"""Product-quantised layers beside dense ones, and beside the scan of the library of that trade."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tersetorch.formats import ProductWeight
from tersetorch.nn import ProductLinear

from ..cases import CASES, Linear
from ..coded_peers import DENSE, FEW
from ..implementations import Implementation, LeftOut, Packed
from ..layers import Layers, Row, same
from ..options import Options
from ..peers import PEERS
from ..rates import Rates

# Seconds for each row of a group.
SECONDS, QUICK_SECONDS = 0.1, 0.06
# Columns of a segment, entries of its codebook, and whether all segments share one.
SETTINGS = ((2, 16, False), (4, 16, False), (4, 256, False), (8, 256, False), (8, 256, True))


@dataclass(frozen=True)
class Group:
    """What is timed side by side: one layer in one product-quantised form, one batch."""

    case: Linear
    batch: int
    width: int
    entries: int
    shared: bool = False

    @property
    def pattern(self) -> str:
        """The form in words, which records keep as their pattern."""
        return f"{self.width} columns, {self.entries} entries" + ", shared" * self.shared

    @property
    def label(self) -> str:
        """One line for a person."""
        return f"{self.case.name}, batch {self.batch}, {self.pattern}"


def groups(options: Options) -> list[Group]:
    """The groups that the options ask for; those of one layer follow each other."""
    batches: dict[str, tuple[int, ...]] = {"alexnet fc7": (1,)}
    if not options.quick:
        batches = {"alexnet fc6": (1, 8), "alexnet fc7": (1, 64), "transformer ffn up": (1, 8, 64, 256)}
    chosen = [
        Group(case, batch, *setting)
        for name, usual in batches.items()
        if isinstance(case := CASES[name], Linear)
        for setting in SETTINGS
        for batch in options.batches or usual
    ]
    return [group for group in chosen if options.takes_case(group.case.name)]


class Product:
    """Measures groups. Every result is compared with float64 before it is timed."""

    def __init__(self, options: Options, rates: Rates) -> None:
        self._options = options
        self._layers = Layers("product", options, rates)

    def measure(self, group: Group) -> tuple[list[dict[str, Any]], list[LeftOut]]:
        """The records of a group, and what was left out."""
        seconds = QUICK_SECONDS if self._options.quick else SECONDS
        return self._layers.measure(group.case, group.batch, _rows(group), group.label, seconds)


def _rows(group: Group) -> Iterator[Row]:
    case = group.case
    weight = weight_of(group)
    dense = weight.to_dense()
    # The multiply-adds of the tables and the additions of the lookups.
    operations = group.batch * (2.0 * case.in_features * weight.entries + case.out_features * weight.tables)
    for one in PEERS["linear"]:
        if one.name.startswith(DENSE) and one.mode != "bfloat16":  # ours have no such mode
            yield Row(one, dense, (group.pattern,))
    peers_here = peers(weight) if group.shared else peers(weight)[:1]
    for one in _ours(weight):
        yield Row(one, dense, (group.pattern,), operations)
    for one in peers_here:
        yield Row(one, dense, (group.pattern,), operations, _greatest if "search" in one.name else same)


def _greatest(products: Tensor) -> Tensor:
    """Of each sample, which is all that a search returns."""
    return products.amax(1, keepdim=True)


def weight_of(group: Group) -> ProductWeight:
    """Random codes and entries, always the same for the same group."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = group.case.shape
    segments = -(-columns // group.width)
    codes = torch.randint(group.entries, (rows, segments), generator=generator, dtype=torch.uint8)
    books = 1 if group.shared else segments
    entries = torch.randn(1, books, group.width, group.entries, generator=generator) / columns**0.5
    return ProductWeight.from_codes(codes, entries, columns)


def _ours(weight: ProductWeight) -> Iterator[Implementation]:
    for name, mode in (("tersetorch product", "exact"), ("tersetorch product int8", "int8")):

        def pack(case: Any, dense: Tensor, batch: int, threads: int, mode: str = mode) -> Packed:
            layer = ProductLinear(weight, mode=mode).eval()
            return Packed(lambda x: lambda: layer(x), weight.nbytes)

        yield Implementation(name, "ours", "float32" if mode == "exact" else "int8", pack)


def peers(weight: ProductWeight | None = None) -> tuple[Implementation, ...]:
    """What multiplies by such a weight elsewhere; without one they can only say whether they are there."""

    def searched(case: Any, dense: Tensor, batch: int, threads: int) -> Packed:
        assert weight is not None
        return _faiss(weight, threads)

    def multiplied(case: Any, dense: Tensor, batch: int, threads: int) -> Packed:
        assert weight is not None
        return _aqlm(weight, threads)

    return (
        Implementation("faiss IndexPQ search", "coded", "float32", searched, needs=("faiss",), batches=FEW),
        # Its threads would add to the same sums.
        Implementation(
            "AQLM by numba", "coded", "float32", multiplied, needs=("aqlm", "numba"), threads=1, batches=FEW
        ),
    )


def _faiss(weight: ProductWeight, threads: int) -> Packed:
    """For each sample the row of the largest inner product, by tables as ours.

    faiss's fast scan of 4-bit codes is not timed: of random codes its products were within 0.5 % of the largest with
    256 segments, but off by more than twenty times the largest with 1024 and 2304, which these layers have.
    """
    import faiss

    faiss.omp_set_num_threads(threads)
    book = weight.codebooks[0].expand(weight.segments, -1, -1)
    bits = max(1, (weight.entries - 1).bit_length())
    width = weight.segments * book.shape[1]
    index = faiss.IndexPQ(width, weight.segments, bits, faiss.METRIC_INNER_PRODUCT)
    centres = book.transpose(1, 2).contiguous().numpy().ravel()
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


def _aqlm(weight: ProductWeight, threads: int) -> Packed:
    import numba
    from aqlm.inference_kernels.numba_kernel import numba_gemm_lut

    numba.set_num_threads(threads)
    codebook = weight.codebooks.transpose(2, 3).contiguous().view(1, 256, 1, 8)
    codes = weight.row_codes.t().contiguous().view(torch.int8)[..., None]
    scales = torch.ones(weight.rows, 1, 1, 1)
    nbytes = codes.nbytes + codebook.nbytes + scales.nbytes
    return Packed(lambda x: lambda: numba_gemm_lut(x, codes, codebook, scales, None), nbytes)
