"""What is measured of a file's model for its page."""

from __future__ import annotations

from dataclasses import dataclass

from tersetorch.conversion import ConversionReport
from tersetorch.costs import LayerEnergy, ModelEnergy


@dataclass(frozen=True)
class Rates:
    """What the machine can do at most.

    Attributes:
        arithmetic: giga-operations a second by arithmetic ("float32", "int8"); a multiply and an add are two.
        reads: gigabytes a second by where the bytes are, such as {"memory": 12.0}, the slowest last.
        threads: that it was measured with.
    """

    arithmetic: dict[str, float]
    reads: dict[str, float]
    threads: int


@dataclass(frozen=True)
class Measurements:
    """Figures of one machine and one example.

    Attributes:
        inputs: shapes of the example that ran, in words.
        conversion: what tersetorch.convert measured of the file's model.
        energy_before: of the dense model.
        energy_after: of the model as it runs.
        rates: of the machine.
    """

    inputs: str
    conversion: ConversionReport
    energy_before: ModelEnergy
    energy_after: ModelEnergy
    rates: Rates


def operations(layer: LayerEnergy) -> int:
    """Of any kind: multiplications, additions, comparisons, counts of bits."""
    return sum(layer.operations.values())


def moved_bytes(layer: LayerEnergy) -> float:
    """Weights, inputs and outputs, each once."""
    return layer.bits.get("sram", 0) / 8
