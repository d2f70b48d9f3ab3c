"""What runs a function outside of what torch.compile makes; importing it imports the compiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


@torch.compiler.disable(reason="fixed_point counts the random bits of training in Python")
def uncompiled(call: Callable[..., Any], *arguments: Any) -> Any:
    """call(*arguments)."""
    return call(*arguments)
