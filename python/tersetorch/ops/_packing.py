"""Packing of weights that lie on any device."""

from collections.abc import Callable
from typing import Any

from torch import Tensor


def pack_on_cpu(op: Callable[..., Any], first: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """The tensors that op returns, on the device of first; it happens once, so op runs on the CPU, but for meta."""
    if first.is_meta:
        packed = op(first, *rest)
        return packed if isinstance(packed, tuple) else (packed,)
    packed = op(first.cpu(), *(argument.cpu() if isinstance(argument, Tensor) else argument for argument in rest))
    return tuple(t.to(first.device) for t in (packed if isinstance(packed, tuple) else (packed,)))
