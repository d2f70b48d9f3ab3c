"""A row of the tables: an implementation and the call that is timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ..implementations import Mode

# The call on one copy of the weight; x is the same for all.
Bind = Callable[[], Callable[[], Tensor]]


@dataclass(frozen=True)
class Row:
    """One row of a table for one problem.

    Attributes:
        name: what records call it.
        family: ours, or what kind of a peer.
        mode: the arithmetic, which also says how large an error may be.
        nbytes: bytes of the weight that a call reads.
        bind: makes the call, on a copy of the weight of its own.
        operations: multiply-adds it cannot do without, two each.
        checked: whether the result is compared; not where a call does a part of the work, or something else.
        step: what a 1 in the result stands for.
        moved: bytes of samples and results; None for those of float tensors of the mode.
    """

    name: str
    family: Literal["ours", "dense", "sparse"]
    mode: Mode
    nbytes: int
    bind: Bind
    operations: float
    checked: bool = True
    step: float = 1.0
    moved: int | None = None


def mode_of(name: str) -> Mode:
    """The arithmetic that an op's mode or a dtype's name stands for."""
    names: dict[str, Mode] = {"exact": "float32", "float32": "float32", "bfloat16": "bfloat16", "int8": "int8"}
    return names[name]


def fresh(*tensors: Tensor) -> list[Tensor]:
    """Copies of their own."""
    return [tensor.clone() for tensor in tensors]
