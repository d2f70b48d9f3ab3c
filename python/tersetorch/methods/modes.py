"""Runs models as they serve, and leaves them as they were."""

from __future__ import annotations

from collections.abc import Iterator, Set
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switches model to evaluation, and attention's fast paths off: they read weights instead of calling layers."""
    training = {module: module.training for module in model.modules()}
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    model.eval()
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, flag in training.items():
            module.training = flag


def switch_off_fast_paths(model: nn.Module, replacements: Set[nn.Module]) -> None:
    """Has encoder layers that hold one of replacements call their layers: fast paths read weights instead."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder | nn.TransformerEncoderLayer) and any(
            inner in replacements for inner in module.modules()
        ):
            if isinstance(module, nn.TransformerEncoder):
                module.use_nested_tensor = module.enable_nested_tensor = False
            else:
                module.activation_relu_or_gelu = 0
