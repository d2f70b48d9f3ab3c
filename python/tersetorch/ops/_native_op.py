"""The ops themselves, for layers that call one again and again."""

from collections.abc import Callable
from typing import Any

import torch


def native_op(name: str) -> Callable[..., Any]:
    """torch.ops.tersetorch.<name>, which takes its arguments by position as csrc/torch/library.cpp lists them.

    The function of this package with that name does the same; this one saves some tenths of a microsecond a call.
    """
    op: Callable[..., Any] = getattr(torch.ops.tersetorch, name).default
    return op
