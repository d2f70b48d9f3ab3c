"""Checks that the room's functions share."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from numbers import Integral, Real

from torch import Tensor, nn


def check_model(where: str, model: object) -> None:
    """Refuses what is no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{where}: model must be a torch.nn.Module, got {type(model).__name__}; pass a network")


def check_choice(where: str, name: str, value: object, choices: Iterable[str]) -> None:
    """Refuses what is none of choices."""
    choices = tuple(choices)
    if not isinstance(value, str) or value not in choices:
        came = f"{value!r}{did_you_mean(value, choices)}"
        raise ValueError(f"{where}: {name} must be one of {', '.join(choices)}, got {came}; pass one of these")


def did_you_mean(value: object, choices: Iterable[str]) -> str:
    """The words " (did you mean X?)" with the choice that is written most like value; none where none is."""
    plain = {_plain(choice): choice for choice in choices}
    near = difflib.get_close_matches(_plain(str(value)), plain, n=1)
    return f" (did you mean {plain[near[0]]}?)" if near else ""


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")


def check_int(where: str, name: str, value: object, least: int, most: int | None = None) -> None:
    """Refuses what is no int in [least, most]."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{where}: {name} must be an int, got {value!r}; pass a whole number")
    number = int(value)
    if number < least or (most is not None and number > most):
        limits = f"at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{where}: {name} must be {limits}, got {value}; pass a number in that range")


def check_flag(where: str, name: str, value: object) -> None:
    """Refuses what is no bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{where}: {name} must be True or False, got {value!r}; pass a bool")


def check_floating(where: str, name: str, value: object) -> None:
    """Refuses what is no floating-point tensor."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{where}: {name} must be a floating-point tensor, got {kind}; convert it")


def check_number(where: str, name: str, value: object, least: float, below: float, closed: bool = False) -> None:
    """Refuses what is no number in [least, below), or in [least, below] where closed; infinity it refuses always."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{where}: {name} must be a number, got {value!r}; pass a float")
    number = float(value)
    if not (least <= number < below or (closed and number == below)) or number == -math.inf:  # NaN fails too
        end = "]" if closed else ")"
        limits = f"in [{least}, {below}{end}"
        if below == math.inf:
            limits = "finite" if least == -math.inf else f"finite and at least {least}"
        raise ValueError(f"{where}: {name} must be {limits}, got {value}; pass a number in that range")
