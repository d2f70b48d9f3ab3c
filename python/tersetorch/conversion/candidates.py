"""The table of layers that may stand in for a dense one: a new format that computes is one more row."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tersetorch.nn import SparseCodebookLinear, SparseLinear

MAX_DISTINCT = 255
# Non-zeros looked at first: a weight that nobody shared is recognised without sorting all of it.
SAMPLE = 65536


@dataclass(frozen=True)
class Candidate:
    """One way to run a layer.

    Attributes:
        name: the format's name in plans and reports.
        alias: what plan= calls it for a whole model.
        source: the layer it replaces; exactly this class, since a subclass may compute something else.
        layer: the class it builds.
        max_density: above this share of non-zeros the format is larger than the dense weight, and is not measured.
        applies: why the format cannot hold a layer's weight, or None when it can.
        build: the new layer, computing what the given one computes.
        layout: what the new layer computes from, as its pack() takes it.
        options: of pack(), for a number of samples multiplied at once, or for None, a number nobody told.
        min_samples, max_samples: with fewer or more at once another candidate is always faster, and this one is not
            measured.
    """

    name: str
    alias: str
    source: type[nn.Module]
    layer: type[nn.Module]
    max_density: float
    applies: Callable[[nn.Module], str | None]
    build: Callable[[Any], nn.Module]
    layout: str = "csr"
    options: Callable[[int | None], dict[str, Any]] = lambda samples: {}
    min_samples: int = 0
    max_samples: int | None = None

    def fits(self, samples: int) -> str | None:
        """Why it is not measured with so many samples, or None when it is."""
        if samples < self.min_samples:
            return f"made for {self.min_samples} samples or more, and there are {samples}"
        if self.max_samples is not None and samples > self.max_samples:
            return f"made for {self.max_samples} samples or fewer, and there are {samples}"
        return None


def weight_of(module: nn.Module) -> Tensor:
    """The dense weight of a layer."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def density(weight: Tensor) -> float:
    """Share of non-zeros in weight, in [0, 1]; 0 for an empty one."""
    return int(torch.count_nonzero(weight)) / max(1, weight.numel())


def distinct_values(weight: Tensor) -> int | None:
    """Number of distinct non-zero values of weight where it is at most 255, otherwise None."""
    stored = weight[weight != 0]
    if torch.unique(stored[:SAMPLE]).numel() > MAX_DISTINCT:
        return None
    count = torch.unique(stored).numel()
    return count if count <= MAX_DISTINCT else None


def _always(module: nn.Module) -> str | None:
    return None


def _has_few_values(module: nn.Module) -> str | None:
    if distinct_values(weight_of(module)) is None:
        return f"more than {MAX_DISTINCT} distinct non-zero values"
    return None


def _for_samples(samples: int | None) -> dict[str, Any]:
    return {} if samples is None else {"samples": max(1, samples)}


# Below these densities a format is smaller than the dense weight: an int32 column and a float32 value against one
# float32, an int32 column and an 8-bit code, and the same with 16-bit columns.
CANDIDATES: dict[str, Candidate] = {
    candidate.name: candidate
    for candidate in (
        Candidate("csr", "sparse", nn.Linear, SparseLinear, 0.5, _always, SparseLinear.from_dense),
        Candidate(
            "sparse_codebook",
            "codebook",
            nn.Linear,
            SparseCodebookLinear,
            0.8,
            _has_few_values,
            SparseCodebookLinear.from_dense,
        ),
        Candidate(
            "blocked",
            "blocked",
            nn.Linear,
            SparseLinear,
            0.66,
            _always,
            SparseLinear.from_dense,
            layout="blocked",
            options=_for_samples,
            min_samples=8,
        ),
        Candidate(
            "blocked_codebook",
            "blocked_codebook",
            nn.Linear,
            SparseCodebookLinear,
            1.0,
            _has_few_values,
            SparseCodebookLinear.from_dense,
            layout="blocked",
            options=_for_samples,
            min_samples=8,
        ),
    )
}
