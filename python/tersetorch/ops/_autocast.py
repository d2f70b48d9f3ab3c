"""The rule that every product has under autocast."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

DEVICES = ("cpu", "cuda")
_library = torch.library.Library("tersetorch", "IMPL")


def compute_in_float32(name: str) -> None:
    """Under autocast the op takes its first argument as float32, and its result is cast to the autocast dtype.

    Weights, codebook and bias keep their dtypes.
    """
    op = getattr(torch.ops.tersetorch, name).default
    for device in DEVICES:
        _library.impl(name, _rule(op, device), f"Autocast{device.upper()}")


def enabled_for(x: Any) -> bool:
    """Whether autocast is on where x lies."""
    return isinstance(x, Tensor) and x.device.type in DEVICES and torch.is_autocast_enabled(x.device.type)


def _rule(op: Callable[..., Tensor], device: str) -> Callable[..., Tensor]:
    def run(x: Tensor, *rest: Any) -> Tensor:
        with torch.autocast(device, enabled=False):
            y = op(x.float(), *rest)
        return y.to(torch.get_autocast_dtype(device))

    return run
