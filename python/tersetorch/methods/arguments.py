"""Checks that the room's functions share."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import nn


def check_model(where: str, model: object) -> None:
    """Refuses what is no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{where}: model must be a torch.nn.Module, got {type(model).__name__}; pass a network")


def check_choice(where: str, name: str, value: object, choices: Iterable[str]) -> None:
    """Refuses what is none of choices."""
    choices = tuple(choices)
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{where}: {name} must be one of {', '.join(choices)}, got {value!r}; pass one of these")


def check_int(where: str, name: str, value: object, least: int, most: int | None = None) -> None:
    """Refuses what is no int in [least, most]."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{where}: {name} must be an int, got {value!r}; pass a whole number")
    if value < least or (most is not None and value > most):
        limits = f"at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{where}: {name} must be {limits}, got {value}; pass a number in that range")


def check_number(where: str, name: str, value: object, least: float, below: float) -> None:
    """Refuses what is no number in [least, below)."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{where}: {name} must be a number, got {value!r}; pass a float")
    if not least <= value < below:  # NaN fails too
        limits = f"finite and at least {least}" if below == math.inf else f"in [{least}, {below})"
        raise ValueError(f"{where}: {name} must be {limits}, got {value}; pass a number in that range")
