"""The rows of linear layers and of embeddings: how ours and torch's hold a weight on the GPU, and the call timed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from tersetorch import ops

from ..cases import Conv, Linear
from . import convolutions, fixed_point
from .problems import Problem
from .row import Row, fresh, mode_of

_QUIET = r"Sparse CSR tensor support|Sparse invariant checks"
INT4_GROUP = 128
# torch's tensor-core product of int8 takes no fewer samples.
INT8_SAMPLES = 17


def rows(problem: Problem) -> Iterator[Row]:
    """All rows for a problem, its weight on the GPU already."""
    if isinstance(problem.case, Conv):
        yield from convolutions.rows(problem, problem.case)
        return
    if not isinstance(problem.case, Linear):
        yield from fixed_point.rounding(problem) if problem.family == "rounding" else _embedding(problem)
        return
    dense = 2 * problem.case.multiplies(len(problem.x), 1.0)
    yield from _dense(problem, dense)
    if problem.family == "codebook":
        yield from _codebook(problem, dense)
    elif problem.family == "product":
        yield from _product(problem)
    elif problem.family == "xnor":
        yield from _xnor(problem)
    elif problem.family == "fixed":
        yield from fixed_point.products(problem, dense)
    else:
        yield from _sparse(problem, dense * problem.density)


def _dense(problem: Problem, operations: float) -> Iterator[Row]:
    x, weight = problem.x, problem.dense
    for mode, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        samples, converted = x.to(dtype), weight.to(dtype)

        def bind(samples: Tensor = samples, converted: Tensor = converted) -> Callable[[], Tensor]:
            (own,) = fresh(converted)
            return lambda: functional.linear(samples, own)

        yield Row(f"F.linear {mode}", "dense", mode_of(mode), converted.nbytes, bind, operations)
    if len(x) >= INT8_SAMPLES and weight.shape[1] % 8 == 0 and weight.shape[0] % 8 == 0:
        quantized, numbers = _random_int8(x), _random_int8(weight)

        def bind_int8() -> Callable[[], Tensor]:
            (own,) = fresh(numbers)
            return lambda: torch._int_mm(quantized, own.T)

        yield Row("int8 product, x given", "dense", "int8", weight.numel(), bind_int8, operations, checked=False)
    if problem.family == "codebook" and problem.entries == 16 and weight.shape[1] % 1024 == 0:
        yield _int4(problem, operations)


def _int4(problem: Problem, operations: float) -> Row:
    """The 4-bit product of torch, in groups of 128 columns; the even steps of the codebook are its weights too."""
    x, codes = problem.x.bfloat16(), problem.codes
    entries = problem.codebook[0]
    of_group = torch.stack([entries[1] - entries[0], entries[8]]).bfloat16()  # a step, and what code 8 stands for
    grid = of_group.expand(codes.shape[1] // INT4_GROUP, len(codes), 2)

    def bind() -> Callable[[], Tensor]:
        own = torch._convert_weight_to_int4pack((codes[:, ::2] << 4 | codes[:, 1::2]).contiguous(), 8)
        own_grid = grid.contiguous()
        return lambda: torch._weight_int4pack_mm(x, own, INT4_GROUP, own_grid)

    nbytes = codes.numel() // 2 + 2 * grid.numel()
    return Row("int4 product, groups of 128", "dense", "bfloat16", nbytes, bind, operations)


def _codebook(problem: Problem, operations: float) -> Iterator[Row]:
    packed = ops.codebook_pack(problem.codes.cpu(), entries=problem.entries).to(problem.x.device)
    for mode, dtype in (("exact", torch.float32), ("bfloat16", torch.bfloat16), ("int8", torch.bfloat16)):
        x, codebook = problem.x.to(dtype), problem.codebook

        def bind(x: Tensor = x, mode: str = mode, codebook: Tensor = codebook) -> Callable[[], Tensor]:
            (own,) = fresh(packed)
            return lambda: ops.codebook_matmul_inference(x, own, codebook, None, 0, mode)

        yield Row(f"tersetorch codebook {mode}", "ours", mode_of(mode), packed.nbytes, bind, operations)


def _product(problem: Problem) -> Iterator[Row]:
    x, codes, codebooks = problem.x, problem.codes, problem.codebook
    out_features, segments = problem.dense.shape[0], codebooks.shape[1]
    tables = 2.0 * x.numel() * problem.entries + len(x) * out_features * segments
    operations = min(tables, 2.0 * len(x) * problem.dense.numel())
    for mode in ("exact", "int8"):

        def bind(mode: str = mode) -> Callable[[], Tensor]:
            own, entries = fresh(codes, codebooks)
            return lambda: ops.product_matmul_inference(x, own, entries, None, out_features, mode)

        yield Row(
            f"tersetorch product {mode}", "ours", mode_of(mode), codes.nbytes + codebooks.nbytes, bind, operations
        )


def _xnor(problem: Problem) -> Iterator[Row]:
    """Limited by bytes: what torch offers has no product of bits to compare with."""
    packed = ops.xnor_pack(ops.sign_pack(problem.dense))
    out_features, in_features = problem.dense.shape
    scale = torch.ones(out_features, device=packed.device)
    thresholds = torch.zeros(out_features, dtype=torch.int32, device=packed.device)
    for name, x, extra in (
        ("tersetorch xnor", problem.x, {"scale": scale}),
        ("tersetorch xnor bfloat16", problem.x.bfloat16(), {"scale": scale}),
        ("tersetorch xnor, packed x", ops.sign_pack(problem.x), {"scale": scale}),
        ("tersetorch xnor, packed x, signs out", ops.sign_pack(problem.x), {"thresholds": thresholds}),
    ):

        def bind(x: Tensor = x, extra: dict[str, Tensor] = extra) -> Callable[[], Tensor]:
            (own,) = fresh(packed)
            return lambda: ops.xnor_matmul(x, own, in_features=in_features, out_features=out_features, **extra)

        yield Row(name, "ours", "float32", packed.nbytes, bind, 0.0, checked="scale" in extra)
    pixels = (problem.x > 0).to(torch.uint8) + 127  # twice a pixel less 255 is x again

    def bind_numbers() -> Callable[[], Tensor]:
        (own,) = fresh(packed)
        return lambda: ops.sign_matmul_inference(problem.x, own, out_features, scale, None)

    def bind_pixels() -> Callable[[], Tensor]:
        (own,) = fresh(packed)
        return lambda: ops.bitplane_matmul(
            pixels, own, in_features=in_features, out_features=out_features, step=2, zero=255, scale=scale
        )

    yield Row("tersetorch signs by float32", "ours", "float32", packed.nbytes, bind_numbers, 0.0)
    moved = pixels.nbytes + 4 * len(pixels) * out_features
    yield Row("tersetorch signs by 8-bit pixels", "ours", "float32", packed.nbytes, bind_pixels, 0.0, moved=moved)


def _embedding(problem: Problem) -> Iterator[Row]:
    """A call reads the rows that are looked up, no others."""
    indices, weight, codebook = problem.x, problem.dense, problem.codebook
    packed = ops.codebook_pack(problem.codes.cpu(), entries=problem.entries).to(indices.device)
    for mode, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        converted = weight.to(dtype)
        moved = indices.nbytes + len(indices) * weight.shape[1] * dtype.itemsize

        def bind(converted: Tensor = converted) -> Callable[[], Tensor]:
            (own,) = fresh(converted)
            return lambda: functional.embedding(indices, own)

        def bind_ours(dtype: torch.dtype = dtype) -> Callable[[], Tensor]:
            (own,) = fresh(packed)
            columns = weight.shape[1]
            return lambda: ops.codebook_embedding_inference(indices, own, codebook, columns=columns, dtype=dtype)

        nbytes = len(indices) * weight.shape[1] * dtype.itemsize
        yield Row(f"F.embedding {mode}", "dense", mode_of(mode), nbytes, bind, 0.0, moved=moved)
        nbytes = len(indices) * packed.shape[1] + codebook.nbytes
        yield Row(f"tersetorch embedding {mode}", "ours", mode_of(mode), nbytes, bind_ours, 0.0, moved=moved)


def _sparse(problem: Problem, operations: float) -> Iterator[Row]:
    weight, device = problem.dense.cpu(), problem.x.device
    csr, bitmap = ops.csr_pack(weight), ops.bitmap_pack(weight)
    for mode, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        x = problem.x.to(dtype)
        rows_, columns, values = (part.to(device) for part in (*csr[:2], csr[2].to(dtype)))
        bits, offsets, in_order = (part.to(device) for part in (*bitmap[:2], bitmap[2].to(dtype)))

        def bind_csr(x: Tensor = x, parts: tuple[Tensor, ...] = (rows_, columns, values)) -> Callable[[], Tensor]:
            offsets, columns, values = fresh(*parts)
            return lambda: ops.csr_matmul_inference(x, offsets, columns, values)

        def bind_bitmap(x: Tensor = x, parts: tuple[Tensor, ...] = (bits, offsets, in_order)) -> Callable[[], Tensor]:
            bits, offsets, values = fresh(*parts)
            return lambda: ops.bitmap_matmul_inference(x, bits, offsets, values)

        def bind_cusparse(x: Tensor = x, parts: tuple[Tensor, ...] = (rows_, columns, values)) -> Callable[[], Tensor]:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", _QUIET)
                offsets, columns, values = fresh(*parts)
                own = torch.sparse_csr_tensor(offsets, columns, values, size=weight.shape)
            by_feature = x.T.contiguous()  # the order that its neighbours of that kind would hand over
            return lambda: (own @ by_feature).T

        nbytes = rows_.nbytes + columns.nbytes + values.nbytes
        yield Row(f"tersetorch csr {mode}", "ours", mode_of(mode), nbytes, bind_csr, operations)
        yield Row(f"cuSPARSE csr {mode}", "sparse", mode_of(mode), nbytes, bind_cusparse, operations)
        nbytes = bits.nbytes + offsets.nbytes + in_order.nbytes
        yield Row(f"tersetorch bitmap {mode}", "ours", mode_of(mode), nbytes, bind_bitmap, operations)
    scales = weight.abs().amax(1).clamp(min=1e-30) / 127
    row_of_value = torch.repeat_interleave(torch.arange(len(weight)), bitmap[1].diff().long())
    quantized = (bitmap[2] / scales[row_of_value]).round().clamp(-127, 127).to(torch.int8)
    parts = [part.to(device) for part in (*bitmap[:2], quantized, scales)]

    def bind_int8() -> Callable[[], Tensor]:
        bits, offsets, values, of_row = fresh(*parts)
        return lambda: ops.bitmap_matmul_inference(problem.x, bits, offsets, values, None, None, of_row, "int8")

    nbytes = sum(part.nbytes for part in parts)
    yield Row("tersetorch bitmap int8", "ours", "int8", nbytes, bind_int8, operations)


def _random_int8(like: Tensor) -> Tensor:
    generator = torch.Generator(like.device).manual_seed(2)
    return torch.randint(-127, 128, like.shape, dtype=torch.int8, device=like.device, generator=generator)
