"""The floats that ops take, and what they say of other dtypes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tersetorch.ops._autocast import enabled_for

FLOATS = (torch.float32, torch.bfloat16)
_WITH_HALF = (*FLOATS, torch.float16)


def floats_beside(x: Any) -> tuple[torch.dtype, ...]:
    """The floats that activations and biases where x lies may be: on a CUDA device float16 too."""
    return _WITH_HALF if isinstance(x, Tensor) and x.device.type == "cuda" else FLOATS


def floats_of(x: Any) -> tuple[torch.dtype, ...]:
    """The floats that x may be: those, and under autocast float16 everywhere, since it is computed in float32."""
    return _WITH_HALF if enabled_for(x) else floats_beside(x)


def computable(x: Tensor) -> Tensor:
    """x, or in float32 where it is float16 only because of autocast, and is not computed with where it lies."""
    return x.float() if x.dtype == torch.float16 and x.dtype not in floats_beside(x) and enabled_for(x) else x


def either(dtypes: Sequence[torch.dtype], *more: str) -> str:
    """The names of dtypes, and more, as alternatives."""
    *others, last = (*(str(dtype).removeprefix("torch.") for dtype in dtypes), *more)
    return f"{', '.join(others)} or {last}" if others else last


def refusal(op: str, name: str, tensor: Tensor, dtypes: Sequence[torch.dtype], fix: str = "convert it") -> TypeError:
    """The error of an argument of another dtype than these."""
    # On a CUDA device it would have been taken.
    if name in ("x", "input", "bias") and tensor.dtype == torch.float16 and torch.bfloat16 in dtypes:
        fix = f"{fix}, or move it to a CUDA device, which takes float16"
    return TypeError(f"{op}: {name} must be {either(dtypes)}, got {tensor.dtype}; {fix}")
