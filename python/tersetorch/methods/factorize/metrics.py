"""How far an approximation of a filter bank is from it: in numbers, in numbers that count more or less, in outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tersetorch.methods.factorize.weighted import solve_symmetric


class Metric(Protocol):
    """A squared distance of banks [B, F, C, S], float64: of B blocks, F filters of C channels and S taps.

    Every method answers for each block alone. A rank-one bank is given by its vectors f [B, F], c [B, C] and s [B, S].
    """

    def squared(self, bank: Tensor) -> Tensor:
        """The squared length of bank, [B]."""

    def best_filters(self, bank: Tensor, c: Tensor, s: Tensor) -> Tensor:
        """The f for which f c s is nearest to bank."""

    def best_channels(self, bank: Tensor, f: Tensor, s: Tensor) -> Tensor:
        """The c for which f c s is nearest to bank."""

    def best_taps(self, bank: Tensor, f: Tensor, c: Tensor) -> Tensor:
        """The s for which f c s is nearest to bank."""

    def best_colour(self, bank: Tensor, taps: Tensor) -> Tensor:
        """The c [C] for which taps[f] c, taps [F, S], are nearest to the filters of bank [1, F, C, S]."""

    def of_filters(self, members: Tensor) -> Metric:
        """The metric of some of the filters, a bool or index tensor, alone."""

    def mix(self, bank: Tensor, basis: Tensor) -> Tensor:
        """The coefficients [B, F, K] of basis [B, K, C, S] for which their sums are nearest to bank."""


@dataclass(frozen=True)
class Weighted:
    """sum weights E^2; weights [B, F, C, S], at least a bit above 0, or None for 1 each."""

    weights: Tensor | None = None

    def squared(self, bank: Tensor) -> Tensor:
        """As Metric says."""
        return (self._times(bank) * bank).sum((1, 2, 3))

    def best_filters(self, bank: Tensor, c: Tensor, s: Tensor) -> Tensor:
        """As Metric says."""
        return self._ratio("bfcs,bc,bs->bf", bank, c, s)

    def best_channels(self, bank: Tensor, f: Tensor, s: Tensor) -> Tensor:
        """As Metric says."""
        return self._ratio("bfcs,bf,bs->bc", bank, f, s)

    def best_taps(self, bank: Tensor, f: Tensor, c: Tensor) -> Tensor:
        """As Metric says."""
        return self._ratio("bfcs,bf,bc->bs", bank, f, c)

    def best_colour(self, bank: Tensor, taps: Tensor) -> Tensor:
        """As Metric says."""
        top = torch.einsum("bfcs,fs->c", self._times(bank), taps)
        squares = taps.square()
        below = squares.sum() if self.weights is None else torch.einsum("bfcs,fs->c", self.weights, squares)
        return top / below.clamp(min=torch.finfo(top.dtype).tiny)

    def of_filters(self, members: Tensor) -> Weighted:
        """As Metric says."""
        return self if self.weights is None else Weighted(self.weights[:, members])

    def mix(self, bank: Tensor, basis: Tensor) -> Tensor:
        """As Metric says."""
        wanted, basis = bank.flatten(2), basis.flatten(2)
        if self.weights is None:
            return solve_symmetric(basis @ basis.mT, basis @ wanted.mT).mT
        found = []
        for f, counted in enumerate(self.weights.flatten(2).unbind(1)):  # all filters at once take K times the memory
            scaled = counted[:, None] * basis
            found.append(solve_symmetric(scaled @ basis.mT, scaled @ wanted[:, f, :, None])[..., 0])
        return torch.stack(found, 1)

    def _times(self, bank: Tensor) -> Tensor:
        return bank if self.weights is None else self.weights * bank

    def _ratio(self, contraction: str, bank: Tensor, one: Tensor, other: Tensor) -> Tensor:
        top: Tensor = torch.einsum(contraction, self._times(bank), one, other)
        if self.weights is None:
            below = (one.square().sum(1) * other.square().sum(1))[:, None]
        else:
            below = torch.einsum(contraction, self.weights, one.square(), other.square())
        return top / below.clamp(min=torch.finfo(top.dtype).tiny)


@dataclass(frozen=True)
class Outputs:
    """The sum of e^T M e over the filters e [C S] of E, the mean square of their outputs; moments M [B, C, S, C, S]."""

    moments: Tensor

    def squared(self, bank: Tensor) -> Tensor:
        """As Metric says."""
        return (self._times(bank) * bank).sum((1, 2, 3))

    def best_filters(self, bank: Tensor, c: Tensor, s: Tensor) -> Tensor:
        """As Metric says."""
        pattern = (c[:, :, None] * s[:, None])[:, None]
        top: Tensor = torch.einsum("bfcs,bc,bs->bf", self._times(bank), c, s)
        return top / self.squared(pattern).clamp(min=torch.finfo(top.dtype).tiny)[:, None]

    def best_channels(self, bank: Tensor, f: Tensor, s: Tensor) -> Tensor:
        """As Metric says."""
        left = torch.einsum("bcsdt,bs,bt->bcd", self.moments, s, s) * f.square().sum(1)[:, None, None]
        right = torch.einsum("bfcs,bf,bs->bc", self._times(bank), f, s)
        return solve_symmetric(left, right[..., None])[..., 0]

    def best_taps(self, bank: Tensor, f: Tensor, c: Tensor) -> Tensor:
        """As Metric says."""
        left = torch.einsum("bcsdt,bc,bd->bst", self.moments, c, c) * f.square().sum(1)[:, None, None]
        right = torch.einsum("bfcs,bf,bc->bs", self._times(bank), f, c)
        return solve_symmetric(left, right[..., None])[..., 0]

    def best_colour(self, bank: Tensor, taps: Tensor) -> Tensor:
        """As Metric says."""
        left = torch.einsum("bcsdt,st->cd", self.moments, taps.T @ taps)
        right = torch.einsum("bfcs,fs->c", self._times(bank), taps)
        return solve_symmetric(left, right[:, None])[:, 0]

    def of_filters(self, members: Tensor) -> Outputs:
        """As Metric says."""
        return self

    def mix(self, bank: Tensor, basis: Tensor) -> Tensor:
        """As Metric says."""
        seen = self._times(basis).flatten(2)
        return solve_symmetric(seen @ basis.flatten(2).mT, seen @ bank.flatten(2).mT).mT

    def _times(self, bank: Tensor) -> Tensor:
        n = bank.shape[2:].numel()
        # A metric of one block serves for many.
        square = self.moments.reshape(-1, n, n)
        return (bank.flatten(2) @ square).view(bank.shape)
