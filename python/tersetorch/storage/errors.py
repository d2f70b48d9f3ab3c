"""The one error of a file that cannot be read."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from typing import NoReturn

FIX = "write it again with tt.save, or copy it again from where it came"


class TerseFileError(ValueError):
    """A .terse file is truncated, damaged, too large, of another version, or no .terse file at all."""


def printable(text: str) -> str:
    """text, with what would move a terminal's cursor, hide or turn round other characters written as its number."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def refuse(rule: str, came: object, fix: str = FIX) -> NoReturn:
    """Raises TerseFileError for what is being read; `reading` puts the function and the path in front."""
    raise TerseFileError(printable(f"must {rule}, got {came}; {fix}"))


class Budget:
    """Bytes that a file may make a reader allocate, of which some are taken already."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self._taken = 0

    def take(self, nbytes: int) -> None:
        """Takes bytes, or refuses the file if it has taken more than the limit."""
        self._taken += nbytes
        if self._taken > self.limit:
            refuse(f"decode to at most {self.limit} bytes", self._taken, "pass max_bytes= if you trust the file")


UNBOUNDED = Budget(math.inf)


@contextmanager
def reading(where: str, path: str | PathLike[str]) -> Iterator[None]:
    """Names the function and the file in every refusal raised inside."""
    try:
        yield
    except TerseFileError as error:
        raise TerseFileError(f"{where}: {path} {error}") from error
    except RecursionError as error:
        raise TerseFileError(f"{where}: {path} must nest less deeply than Python can follow; {FIX}") from error
