"""What one operation or one access takes, in 45 nm CMOS at 0.9 V."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

_HOROWITZ = "Horowitz, Computing's energy problem (ISSCC 2014), figure 1.1.9"
_HAN = "Han et al., Learning both weights and connections (2015), figure 1 (from Horowitz)"
_EIE = "Han et al., EIE (2016), figure 10: 16-bit fixed point multiplies at a fifth of 32-bit"


@dataclass(frozen=True)
class Coefficient:
    """The energy of one operation, or of moving one bit.

    Attributes:
        picojoules: of an operation; of a 32-bit word where it is an access.
        source: where the figure is from, or from which figures it was inferred, and how.
        inferred: whether no source states it.
    """

    picojoules: float
    source: str
    inferred: bool = False


# Operations by what they do and on what; accesses, per word of 32 bits, by where.
COEFFICIENTS: Mapping[str, Coefficient] = MappingProxyType(
    {
        "add int8": Coefficient(0.03, _HOROWITZ),
        "add int16": Coefficient(0.05, _HOROWITZ),
        "add int32": Coefficient(0.1, _HAN),
        "add int64": Coefficient(0.2, "twice add int32: a carry chain twice as long", inferred=True),
        "add float16": Coefficient(0.4, _HOROWITZ),
        "add bfloat16": Coefficient(0.4, "add float16: the same width", inferred=True),
        "add float32": Coefficient(0.9, _HAN),
        "add float64": Coefficient(1.8, "twice add float32", inferred=True),
        "multiply int8": Coefficient(0.2, _HOROWITZ),
        "multiply int16": Coefficient(0.62, f"multiply int32 / 5; {_EIE}", inferred=True),
        "multiply int32": Coefficient(3.1, _HAN),
        "multiply float16": Coefficient(1.1, _HOROWITZ),
        "multiply bfloat16": Coefficient(
            1.1, "multiply float16: no more, with 8 bits of fraction for 11", inferred=True
        ),
        "multiply float32": Coefficient(3.7, _HAN),
        "multiply float64": Coefficient(14.8, "four times multiply float32: twice the bits a side", inferred=True),
        "compare and count 1 bit": Coefficient(
            0.00375,
            "add int8 / 8: counting n bits takes about n full adders, beside which a gate is little",
            inferred=True,
        ),
        "register": Coefficient(1.0, _HAN),
        "sram": Coefficient(5.0, _HAN),
        "dram": Coefficient(640.0, _HAN),
    }
)
ACCESSES = ("register", "sram", "dram")
