"""csr_matmul beside the dense and sparse products that a user could run instead."""

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tersetorch import _native
from tersetorch.ops import csr_matmul_inference

from ..timing import interleave

SHAPES = [(1024, 1024), (4096, 4096), (4096, 9216), (512, 4608)]
BATCHES = [1, 8, 64, 256]
DENSITY = 0.1
OTHER_DENSITIES = [0.03, 0.2]  # at 4096x4096 only
MAX_ERROR = 1e-4  # of the largest output
SECONDS, QUICK_SECONDS = 8.0, 1.5  # for all implementations of one case


def run(threads: int, quick: bool) -> list[dict[str, Any]]:
    """Times every case (quick: 1024x1024 and 4096x4096 at 90 % zeros) on that many threads.

    Every result is compared with a float64 product before it is timed. fraction_of_limit is the least time that an
    implementation's own arithmetic and its own bytes allow, over its time: arithmetic at the best rate of a large dense
    product, bytes at the best rate of summing a warm buffer as large as its weights, both measured in the same run
    (fma_gflops, read_gbytes_per_s).
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            fma_gflops = _fma_gflops()
            seconds = QUICK_SECONDS if quick else SECONDS
            return [r for case in _cases(quick) for r in _measure(*case, threads, fma_gflops, seconds)]
    finally:
        torch.set_num_threads(before)


def _cases(quick: bool) -> Iterator[tuple[int, int, float, int]]:
    shapes = SHAPES[:2] if quick else SHAPES
    for rows, columns in shapes:
        for batch in BATCHES:
            yield rows, columns, DENSITY, batch
    if not quick:
        for density in OTHER_DENSITIES:
            for batch in BATCHES:
                yield 4096, 4096, density, batch


def _measure(
    rows: int, columns: int, density: float, batch: int, threads: int, fma_gflops: float, seconds: float
) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    codebook = torch.randn(256, generator=generator)
    kept = torch.rand(rows, columns, generator=generator) < density
    codes = torch.randint(1, 256, (int(kept.sum()),), generator=generator, dtype=torch.uint8)
    values = codebook[codes.int()]
    dense = torch.zeros(rows, columns)
    dense[kept] = values
    row_offsets = torch.cat([torch.zeros(1, dtype=torch.int64), kept.sum(1).cumsum(0)]).int()
    col_indices = kept.nonzero()[:, 1].int()
    x = torch.randn(batch, columns, generator=generator)

    positions = row_offsets.nbytes + col_indices.nbytes
    candidates: dict[str, tuple[Callable[[], Tensor], int, int]] = {
        name: (call, dense.nbytes, dense.numel()) for name, call in _dense(x, dense)
    }
    csr_bytes = positions + values.nbytes
    for name, call in _sparse(x, row_offsets, col_indices, values, threads):
        candidates[name] = (call, csr_bytes, values.numel())
    candidates["tersetorch csr"] = (
        lambda: csr_matmul_inference(x, row_offsets, col_indices, values),
        csr_bytes,
        values.numel(),
    )
    candidates["tersetorch csr codebook"] = (
        lambda: csr_matmul_inference(x, row_offsets, col_indices, codes, None, codebook),
        positions + codes.nbytes + codebook.nbytes,
        values.numel(),
    )

    want = x.double() @ dense.double().T
    errors = {name: _error(call(), want, name) for name, (call, _, _) in candidates.items()}
    times = interleave({name: call for name, (call, _, _) in candidates.items()}, seconds)
    records = []
    for name, (_, weight_bytes, weights) in candidates.items():
        moved = weight_bytes + x.nbytes + 4 * batch * rows
        operations = 2 * batch * weights
        read_rate = _read_gbytes_per_s(weight_bytes)
        limit_ms = 1e-6 * max(operations / fma_gflops, moved / read_rate)
        records.append(
            {
                "suite": "csr_matmul",
                "case": "linear",
                "shape": [rows, columns],
                "density": density,
                "batch": batch,
                "threads": threads,
                "isa": _native.cpu_active(),
                "implementation": name,
                "bytes": weight_bytes,
                "ops": operations,
                "fma_gflops": fma_gflops,
                "read_gbytes_per_s": read_rate,
                "fraction_of_limit": limit_ms / times[name]["p30_ms"],
                "max_error": errors[name],
                **times[name],
            }
        )
    return records


def _dense(x: Tensor, dense: Tensor) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    yield "torch F.linear fp32", lambda: functional.linear(x, dense)
    if torch.backends.mkldnn.is_available():
        packed = torch.ops.mkldnn._reorder_linear_weight(dense, x.shape[0])
        yield (
            "torch mkldnn packed fp32",
            lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], ""),
        )


def _sparse(
    x: Tensor, row_offsets: Tensor, col_indices: Tensor, values: Tensor, threads: int
) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    shape = (row_offsets.numel() - 1, x.shape[1])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        weight = torch.sparse_csr_tensor(row_offsets, col_indices, values, shape, check_invariants=True)
    yield "torch sparse csr", lambda: (weight @ x.T).T
    try:
        from scipy.sparse import csr_array
    except ImportError:
        return
    if threads == 1:  # scipy has no threads
        array = csr_array((values.numpy(), col_indices.numpy(), row_offsets.numpy()), shape=shape)
        yield "scipy csr", lambda: torch.from_numpy(array @ x.numpy().T).T


def _error(got: Tensor, want: Tensor, name: str) -> float:
    error = ((got - want).abs().max() / want.abs().max()).item()
    if not error <= MAX_ERROR:
        raise RuntimeError(f"bench csr_matmul: {name} must be within {MAX_ERROR} of float64, got {error}")
    return error


def _fma_gflops() -> float:
    a = torch.randn(1024, 1024)
    return 2e-6 * 1024**3 / interleave({"product": lambda: a @ a}, 1.0)["product"]["min_ms"]


def _read_gbytes_per_s(size: int) -> float:
    buffer = torch.ones(math.ceil(size / 4))
    return 1e-6 * buffer.nbytes / interleave({"read": buffer.sum}, 0.2)["read"]["min_ms"]
