"""Fixed point <IL,FL>: which numbers a weight, an activation or a gradient may have."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import Tensor, nn

from tersetorch.ops import check_fixed, fixed_round_inference


@dataclass(frozen=True)
class FixedFormat:
    """The numbers k * 2^-FL for whole k in [-2^(IL-1+FL), 2^(IL-1+FL) - 1]; written "<IL,FL>".

    Attributes:
        integer_bits: IL, at least 1: it counts the sign.
        fraction_bits: FL, at least 0; IL + FL is from 2 to 24.

    Source:
        Gupta et al., Deep Learning with Limited Numerical Precision (2015), section 3.
    """

    integer_bits: int
    fraction_bits: int

    def __post_init__(self) -> None:
        check_fixed("FixedFormat", self.integer_bits, self.fraction_bits)

    @property
    def bits(self) -> int:
        """Bits of a number, IL + FL."""
        return self.integer_bits + self.fraction_bits

    @property
    def step(self) -> float:
        """The distance of neighbours, 2^-FL."""
        return 2.0**-self.fraction_bits

    @property
    def low(self) -> float:
        """The least number."""
        return -(2.0 ** (self.integer_bits - 1))

    @property
    def high(self) -> float:
        """The largest number."""
        return -self.low - self.step

    def nearest(self, x: Tensor) -> Tensor:
        """The number next to each of x, float32 or bfloat16, ties up; saturated and without gradients."""
        return fixed_round_inference(x, self.integer_bits, self.fraction_bits)

    def __str__(self) -> str:
        return f"<{self.integer_bits},{self.fraction_bits}>"


def as_fixed(where: str, name: str, value: str | FixedFormat) -> FixedFormat:
    """The format that value names, such as "<2,14>".

    Raises:
        TypeError: value is neither a string nor a FixedFormat.
        ValueError: there is no such format.
    """
    if isinstance(value, FixedFormat):
        return value
    if not isinstance(value, str):
        raise TypeError(f"{where}: {name} must be a format such as '<2,14>', got {value!r}; pass a string")
    found = re.fullmatch(r"\s*<\s*(\d{1,4})\s*,\s*(\d{1,4})\s*>\s*", value)
    if found is None:
        raise ValueError(f"{where}: {name} must be a format such as '<2,14>', got {value!r}; write '<IL,FL>'")
    integer_bits, fraction_bits = int(found[1]), int(found[2])
    check_fixed(f"{where}: {name}", integer_bits, fraction_bits)
    return FixedFormat(integer_bits, fraction_bits)


# Where a layer keeps its formats; files leave such notes out.
_NOTE = "_tersetorch_fixed_formats"


@dataclass(frozen=True)
class FixedFormats:
    """The formats of a layer's weight, of its input and of its output."""

    weight: FixedFormat
    input: FixedFormat
    output: FixedFormat


def note_formats(module: nn.Module, formats: FixedFormats) -> None:
    """Leaves formats at a layer, for FixedPointLinear.from_dense and its like; a deep copy has them too."""
    setattr(module, _NOTE, formats)


def noted_formats(module: nn.Module) -> FixedFormats | None:
    """The formats that were left at a layer last."""
    found = getattr(module, _NOTE, None)
    return found if isinstance(found, FixedFormats) else None
