"""The rows of fixed point: rounding beside torch's fake quantisation, and products of whole numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from tersetorch import ops

from ..suites.fixed import ROUNDED, SAMPLES, SUMS, WEIGHT
from .problems import Problem
from .row import Row, fresh

_FORMAT = (ROUNDED.integer_bits, ROUNDED.fraction_bits)
_SUMS: dict[str, Any] = {
    "sum_fraction_bits": SAMPLES.fraction_bits + WEIGHT.fraction_bits,
    "integer_bits": SUMS.integer_bits,
    "fraction_bits": SUMS.fraction_bits,
}


def products(problem: Problem, operations: float) -> Iterator[Row]:
    """Sums that are rounded to whole numbers too; x and weight are such already."""
    for dtype in (torch.int8, torch.int16):
        x, weight = (
            ops.fixed_round_whole(numbers, format.integer_bits, format.fraction_bits, dtype=dtype)
            for numbers, format in ((problem.x, SAMPLES), (problem.dense, WEIGHT))
        )

        def bind(x: Tensor = x, weight: Tensor = weight) -> Callable[[], Tensor]:
            (own,) = fresh(weight)
            packed = ops.fixed_pack(own)
            return lambda: ops.fixed_matmul(x, packed, rows=len(own), **_SUMS)

        moved = x.nbytes + 4 * len(x) * len(weight)
        name = f"tersetorch fixed int{8 * dtype.itemsize}"
        yield Row(name, "ours", "int8", weight.nbytes, bind, operations, step=SUMS.step, moved=moved)


def rounding(problem: Problem) -> Iterator[Row]:
    """A copy moves as many bytes."""
    x, ends = problem.x, (-(1 << 15), (1 << 15) - 1)

    def row(name: str, run: Callable[[], Tensor], ours: bool = True, step: float = 1.0, of_result: int = 4) -> Row:
        moved = (4 + of_result) * x.numel()
        family: Literal["ours", "dense"] = "ours" if ours else "dense"
        return Row(name, family, "float32", 0, lambda: run, 0.0, checked=name != "copy", step=step, moved=moved)

    yield row("copy", x.clone, ours=False)
    yield row("fake_quantize", lambda: torch.fake_quantize_per_tensor_affine(x, ROUNDED.step, 0, *ends), ours=False)
    yield row("tersetorch nearest", lambda: ops.fixed_round_inference(x, *_FORMAT))
    yield row("tersetorch stochastic", lambda: ops.fixed_round_inference(x, *_FORMAT, "stochastic", 1))
    yield row(
        "tersetorch stochastic, int16 out",
        lambda: ops.fixed_round_whole(x, *_FORMAT, "stochastic", 1),
        step=ROUNDED.step,
        of_result=2,
    )
