"""Figures and names as a person reads them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tersetorch.storage.errors import printable

MOST_LETTERS = 28


def nbytes(count: int) -> str:
    """Such as "29.2 kB"."""
    if count < 1000:
        return f"{count} bytes"
    value, unit = (count / 1000, "kB") if count < 10**6 else (count / 10**6, "MB")
    return f"{value:.3g} {unit}" if value < 1000 else f"{value:,.0f} {unit}"


def time(milliseconds: float) -> str:
    """Such as "1.52 s"."""
    return _scaled(milliseconds, (("us", 1e-3), ("ms", 1), ("s", 1000)))


def joules(picojoules: float) -> str:
    """Such as "9.42 mJ"."""
    return _scaled(picojoules, (("nJ", 1e3), ("uJ", 1e6), ("mJ", 1e9), ("J", 1e12)))


def ratio(before: float, after: float) -> str:
    """Such as "12x smaller" without the word; "-" where there is nothing to divide by."""
    return f"{before / after:.3g}x" if after and math.isfinite(before / after) else "-"


def short(name: str) -> str:
    """A name for a picture: a long one without its middle."""
    name = printable(name)
    return name if len(name) <= MOST_LETTERS else f"{name[:12]}...{name[-13:]}"


def _scaled(number: float, units: Sequence[tuple[str, float]]) -> str:
    """Three digits in the largest unit of which there is at least one, or in the first: never 9.42e+03."""
    unit, size = next(((unit, size) for unit, size in reversed(units) if number >= 0.9995 * size), units[0])
    return f"{number / size:.3g} {unit}"
