"""What save, load and inspect check and copy in the same way."""

from __future__ import annotations

import copy
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn


def path_of(where: str, path: str | PathLike[str]) -> Path:
    """The path that the caller gave.

    Raises:
        TypeError: path is neither a string nor a path.
    """
    if not isinstance(path, str | PathLike):
        raise TypeError(f"{where}: path must be a string or a path, got {type(path).__name__}; pass the file's name")
    return Path(path)


def copy_of(where: str, model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """copy.deepcopy.

    Raises:
        ValueError: a member of model cannot be copied.
    """
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:  # whatever the member raises
        raise ValueError(
            f"{where}: model must be copyable with copy.deepcopy, got {type(error).__name__}: {error}; "
            "pass a new instance, or drop what it keeps from a forward pass"
        ) from error
