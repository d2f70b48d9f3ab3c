"""The rule that every product has under autocast."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_library = torch.library.Library("tersetorch", "IMPL")


def compute_in_float32(name: str) -> None:
    """Under autocast the op takes its first argument as float32, and its result is cast to the autocast dtype.

    Weights, codebook and bias keep their dtypes.
    """
    _library.impl(name, _rule(getattr(torch.ops.tersetorch, name).default), "AutocastCPU")


def _rule(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(x: Tensor, *rest: Any) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            y = op(x.float(), *rest)
        return y.to(torch.get_autocast_dtype("cpu"))

    return run
