"""How much of each layer is left."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from tersetorch.methods.selection import Patterns, select


@dataclass(frozen=True)
class LayerDensity:
    """The connections of one layer.

    Attributes:
        kept: weights that are not zero.
        total: all weights.
    """

    kept: int
    total: int

    @property
    def density(self) -> float:
        """The part that is kept; 1 for a layer without weights."""
        return self.kept / self.total if self.total else 1.0


def density(
    model: nn.Module, *, targets: Patterns | None = None, ignore: Patterns | None = None
) -> dict[str, LayerDensity]:
    """Counts the weights that are not zero, by layer in the model's order; for live and finalized models alike.

    Args:
        model: any nn.Module with plain weights; it is not changed.
        targets: as in prune.magnitude.
        ignore: as in prune.magnitude.

    Raises:
        TypeError, ValueError: as prune.magnitude.
    """
    return {
        target.name: LayerDensity(int(target.weight.count_nonzero()), target.weight.numel())
        for target in select("prune.density", model, targets, ignore, frozen=True)
    }
