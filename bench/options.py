"""What a person asks a suite for."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase


@dataclass(frozen=True)
class Options:
    """Filters and effort; an empty filter takes all.

    Attributes:
        threads: of ours and of every peer.
        quick: fewer cases and samples: a look, not a measurement.
        full: every case with every density and batch, for hours.
        cases, peers, implementations: names or globs, of which one must match; peers filters what is not ours.
        densities, batches: numbers.
    """

    threads: int = 1
    quick: bool = False
    full: bool = False
    cases: tuple[str, ...] = ()
    densities: tuple[float, ...] = ()
    batches: tuple[int, ...] = ()
    implementations: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()

    def takes_case(self, name: str) -> bool:
        """Whether the case is asked for."""
        return _matches(name, self.cases)

    def takes(self, implementation: str, ours: bool) -> bool:
        """Whether the implementation is asked for."""
        return _matches(implementation, self.implementations) and (ours or _matches(implementation, self.peers))


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return not patterns or any(fnmatchcase(name.lower(), f"*{pattern.lower()}*") for pattern in patterns)
