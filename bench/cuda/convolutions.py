"""The rows of convolutions: how ours and cuDNN hold a weight on the GPU, and the call that is timed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tersetorch import ops

from ..cases import Conv, Flat
from ..flat_peers import Chain
from .problems import Problem
from .row import Row, fresh, mode_of

_NCHW, _NHWC = (torch.contiguous_format, ""), (torch.channels_last, " channels_last")


def rows(problem: Problem, case: Conv) -> Iterator[Row]:
    """All rows for a problem, its weight on the GPU already."""
    if isinstance(case, Flat):
        yield from _flat(problem, case)
        return
    operations = 2 * case.multiplies(len(problem.x), 1.0)
    yield from _dense(problem.x, problem.dense, case, operations)
    if problem.family == "xnor_conv":
        yield from _xnor(problem, case)
    elif problem.family == "codebook_conv":
        yield from _codebook(problem, case, operations)
    else:
        yield from _sparse(problem, case, operations * problem.density)


def _sizes(case: Conv) -> dict[str, Any]:
    return {
        "kernel_size": [case.kernel] * 2,
        "stride": [case.stride] * 2,
        "padding": [case.padding] * 2,
        "dilation": [1, 1],
        "groups": case.groups,
    }


def _dense(x: Tensor, weight: Tensor, case: Conv, operations: float, name: str = "F.conv2d") -> Iterator[Row]:
    """Compared where it is the convolution asked for, and not one beside it."""
    for mode, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        for order, suffix in (_NCHW, _NHWC):
            samples = x.to(dtype).contiguous(memory_format=order)
            filters = weight.to(dtype).contiguous(memory_format=order)

            def bind(samples: Tensor = samples, filters: Tensor = filters) -> Callable[[], Tensor]:
                own = filters.clone(memory_format=torch.preserve_format)
                return lambda: functional.conv2d(samples, own, None, case.stride, case.padding, 1, case.groups)

            checked = name == "F.conv2d"
            yield Row(f"{name} {mode}{suffix}", "dense", mode_of(mode), filters.nbytes, bind, operations, checked)


def _sparse(problem: Problem, case: Conv, operations: float) -> Iterator[Row]:
    csr = [part.to(problem.x.device) for part in ops.csr_pack(problem.dense.cpu().flatten(1))]
    sizes = _sizes(case)
    for mode, dtype in (("exact", torch.float32), ("bfloat16", torch.bfloat16), ("int8", torch.float32)):
        x = problem.x.to(dtype)

        def bind(x: Tensor = x, mode: str = mode) -> Callable[[], Tensor]:
            offsets, columns, values = fresh(*csr)
            return lambda: ops.sparse_conv2d_inference(x, offsets, columns, values, None, None, **sizes, mode=mode)

        yield Row(f"tersetorch conv {mode}", "ours", mode_of(mode), sum(part.nbytes for part in csr), bind, operations)


def _codebook(problem: Problem, case: Conv, operations: float) -> Iterator[Row]:
    packed = ops.codebook_pack(problem.codes.cpu(), entries=problem.entries).to(problem.x.device)
    sizes, codebook = _sizes(case), problem.codebook
    for mode, dtype in (("exact", torch.float32), ("bfloat16", torch.bfloat16), ("int8", torch.bfloat16)):
        x = problem.x.to(dtype)

        def bind(x: Tensor = x, mode: str = mode) -> Callable[[], Tensor]:
            (own,) = fresh(packed)
            return lambda: ops.codebook_conv2d_inference(x, own, codebook, None, 0, **sizes, mode=mode)

        yield Row(f"tersetorch conv {mode}", "ours", mode_of(mode), packed.nbytes, bind, operations)


def _xnor(problem: Problem, case: Conv) -> Iterator[Row]:
    """Limited by bytes: what torch offers has no product of bits to compare with."""
    x = problem.x
    sizes: dict[str, Any] = {"in_channels": case.in_channels, "out_channels": case.out_channels, **_sizes(case)}
    packed = ops.xnor_conv2d_pack(ops.sign_pack_images(problem.dense), case.groups)
    scale = torch.ones(case.out_channels, device=x.device)
    thresholds = torch.zeros(case.out_channels, dtype=torch.int32, device=x.device)
    bits = ops.sign_pack_images(x)
    for name, images, extra in (
        ("tersetorch xnor", x, {"scale": scale}),
        ("tersetorch xnor bfloat16 channels_last", x.bfloat16().contiguous(memory_format=_NHWC[0]), {"scale": scale}),
        ("tersetorch xnor, packed x", bits, {"scale": scale}),
        ("tersetorch xnor, packed x, signs out", bits, {"thresholds": thresholds}),
    ):
        results = case.numbers_out(len(x)) * 4 if "scale" in extra else case.numbers_out(len(x)) // 8

        def bind(images: Tensor = images, extra: dict[str, Any] = extra) -> Callable[[], Tensor]:
            (own,) = fresh(packed)
            return lambda: ops.xnor_conv2d(images, own, **sizes, **extra)

        moved = images.nbytes + results
        yield Row(name, "ours", "float32", packed.nbytes, bind, 0.0, checked="scale" in extra, moved=moved)


def _flat(problem: Problem, case: Flat) -> Iterator[Row]:
    """Beside the chain of torch's, and beside the dense convolution that it stands in for."""
    x, weight = problem.x, problem.dense
    dense = torch.randn(case.shape, generator=torch.Generator().manual_seed(0)) / case.kernel
    multiplies = 2.0 * len(x) * dense.numel() * case.out_size**2
    yield from _dense(x, dense.to(x.device), case, multiplies, "one dense conv")
    operations = 2 * case.multiplies(len(x), 1.0)
    filters = [ops.FlatFilters(*stage) for stage in case.parts(weight)]
    packed = [ops.flat_conv2d_pack(of_stage) for of_stage in filters]
    sizes = [n for of_stage in filters for n in ops.flat_conv2d_sizes(of_stage, padding=case.padding)]
    for mode, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        for order, suffix in (_NCHW, _NHWC):
            samples = x.to(dtype).contiguous(memory_format=order)
            chain = Chain(case, weight).eval().to(dtype).to(memory_format=order)  # type: ignore[call-overload]

            def bind(samples: Tensor = samples, chain: Chain = chain) -> Callable[[], Tensor]:
                own = copy.deepcopy(chain)
                return lambda: own(samples)

            def bind_ours(samples: Tensor = samples) -> Callable[[], Tensor]:
                own = fresh(*packed)
                return lambda: ops.flat_conv2d_inference(samples, own, sizes)

            nbytes = weight.numel() * dtype.itemsize
            yield Row(f"chain {mode}{suffix}", "dense", mode_of(mode), nbytes, bind, operations)
            nbytes = sum(stage.nbytes for stage in packed)
            yield Row(f"tersetorch flat {mode}{suffix}", "ours", mode_of(mode), nbytes, bind_ours, operations)
