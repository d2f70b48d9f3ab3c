"""Packing of weights that lie on any device."""

from collections.abc import Callable
from typing import Any

from torch import Tensor


def pack_on_cpu(op: Callable[..., Any], first: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """The tensors that op returns, on the device of first; it happens once, so op runs on the CPU."""
    packed = op(first.cpu(), *(argument.cpu() if isinstance(argument, Tensor) else argument for argument in rest))
    return tuple(t.to(first.device) for t in (packed if isinstance(packed, tuple) else (packed,)))
