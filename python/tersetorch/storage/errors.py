"""The one error of a file that cannot be read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from typing import NoReturn

FIX = "write it again with tt.save, or copy it again from where it came"


class TerseFileError(ValueError):
    """A .terse file is truncated, damaged, too large, of another version, or no .terse file at all."""


def refuse(rule: str, came: object, fix: str = FIX) -> NoReturn:
    """Raises TerseFileError for what is being read; `reading` puts the function and the path in front."""
    raise TerseFileError(f"must {rule}, got {came}; {fix}")


@contextmanager
def reading(where: str, path: str | PathLike[str]) -> Iterator[None]:
    """Names the function and the file in every refusal raised inside."""
    try:
        yield
    except TerseFileError as error:
        raise TerseFileError(f"{where}: {path} {error}") from error
    except RecursionError as error:
        raise TerseFileError(f"{where}: {path} must nest less deeply than Python can follow; {FIX}") from error
