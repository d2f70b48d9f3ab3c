"""ExactOBS: each row of a layer loses its weights one by one, the others making up for each optimally."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from tersetorch.methods.prune.least_squares import restricted
from tersetorch.methods.prune.obs_ranks import ALONE, Ranks
from tersetorch.methods.prune.patterns import BlockPattern, GroupPattern, Pattern

# Bytes of inverse Hessians that are worked on at a time: about a cache, since every deletion goes over all of them.
BATCH_BYTES = 1 << 24


def exact_obs(
    weights: Tensor,
    hessian: Tensor,
    inverse: Tensor,
    sparsity: float,
    pattern: Pattern,
    tick: Callable[[float], None],
    ranks: Ranks = ALONE,
) -> tuple[Tensor, Tensor]:
    """Greedy deletion, with H^-1 brought up to date after each, in each row w alone.

        p = argmin w_p^2 / [H^-1]_pp,   w -= w_p / [H^-1]_pp H^-1 e_p,   H^-1 -= H^-1 e_p e_p^T H^-1 / [H^-1]_pp.

    Without a pattern each row is followed to its end, and the cheapest deletions of all rows are done, a row's in its
    order, until round(sparsity * n) weights are zero. With N:M, a weight whose group has M - N deletions is passed
    over. With blocks B of R x C, R rows share their deletions and a block costs tr(W_B ([H^-1]_BB)^-1 W_B^T) over its
    number of weights. Weights that are zero go first and stay zero. What is left of a row is then the exact minimum for
    its zeros, which is what the updates add up to.

    Args:
        weights: [groups, rows, n].
        hessian: [groups, n, n], positive definite.
        inverse: of hessian.
        sparsity: part of all weights; not looked at with N:M.
        pattern: what parse gave; groups of M are consecutive columns; R divides the rows where there are more groups.
        tick: is told the part that is done.
        ranks: share out the rows, some at a time; all have the same arguments, and get the same bits as one would.

    Returns:
        The new weights and bool what is kept, both [groups, rows, n].

    Source:
        Frantar, Singh, Alistarh, Optimal Brain Compression (2022), algorithms 1 and 2. Where we differ: blocks may
        span rows, and the final weights are solved for instead of followed, which needs no trace of weights.
    """
    groups, rows, n = weights.shape
    height, width = (pattern.rows, pattern.columns) if isinstance(pattern, BlockPattern) else (1, 1)
    spare_rows, spare = -rows % height, -n % width
    padded = functional.pad(weights, (0, spare, 0, spare_rows)).reshape(-1, height, n + spare)
    real = functional.pad(torch.ones_like(weights), (0, spare, 0, spare_rows)).reshape(-1, height, n + spare)
    sizes = real.unflatten(-1, (-1, width)).sum((1, 3))  # [units, blocks], weights in each block
    if spare:
        inverse = torch.stack([torch.block_diag(each, torch.eye(spare).to(each)) for each in inverse])
    units, blocks = sizes.shape
    group_of = torch.arange(units, device=weights.device) // (units // groups)
    batch = max(1, BATCH_BYTES // (inverse[0].numel() * inverse.element_size()))
    order = torch.zeros(units, blocks, dtype=torch.int64, device=weights.device)
    loss = weights.new_zeros(units, blocks)
    for start in range(0, units, batch):
        if not ranks.own(start // batch):
            continue
        some = slice(start, min(units, start + batch))

        def report(part: float, done: int = start, size: int = some.stop - start) -> None:
            tick((done + part * size) / units)

        traced = _Trace.start(padded[some], inverse[group_of[some]], sizes[some], width, pattern)
        order[some], loss[some] = traced.run(report)
    ranks.merge(order, loss)
    if isinstance(pattern, GroupPattern):
        taken = loss.isfinite()
    else:
        # A row's later deletions can be cheaper than its earlier ones, but never come before them.
        ranked = loss.cummax(1).values.flatten().argsort(stable=True)
        size = sizes.gather(1, order).flatten()[ranked]
        taken = torch.zeros_like(loss, dtype=torch.bool)
        taken.view(-1)[ranked[size.cumsum(0) <= round(sparsity * weights.numel())]] = True
    # Added up, since what a row never came to has no place of its own in its order.
    gone = torch.zeros_like(order).scatter_add_(1, order, taken.to(order)) > 0
    keep = ~gone[:, None, :, None].expand(units, height, blocks, width).reshape(groups, -1, n + spare)
    keep = keep[:, :rows, :n] & (weights != 0)
    return restricted(weights, keep, hessian, ranks), keep


@dataclass
class _Trace:
    """Deletions of some units (rows, or R rows with common deletions), in step.

    Attributes:
        weights: [units, R, columns]; columns of blocks that are long gone are taken out.
        inverse: [units, columns, columns].
        sizes: [units, blocks], weights in a block.
        width: columns of a block.
        names: [units, blocks], which block of the matrix each one is.
        zero: bool [units, blocks]: it is zero from the start.
        gone: bool [units, blocks].
        limit: deletions that a group of blocks takes, or None.
        group: [units, blocks], the group of each block.
        taken: [units, groups], deletions in each group.
    """

    weights: Tensor
    inverse: Tensor
    sizes: Tensor
    width: int
    names: Tensor
    zero: Tensor
    gone: Tensor
    limit: int | None
    group: Tensor
    taken: Tensor

    @classmethod
    def start(cls, weights: Tensor, inverse: Tensor, sizes: Tensor, width: int, pattern: Pattern) -> _Trace:
        """Nothing is deleted yet."""
        units, blocks = sizes.shape
        names = torch.arange(blocks, device=weights.device).repeat(units, 1)
        zero = (weights.unflatten(-1, (blocks, width)) == 0).all(-1).all(1)
        group = names // (pattern.group if isinstance(pattern, GroupPattern) else blocks)
        return cls(
            weights=weights.clone(),
            inverse=inverse.clone(),
            sizes=sizes,
            width=width,
            names=names,
            zero=zero,
            gone=torch.zeros_like(zero),
            limit=pattern.group - pattern.kept if isinstance(pattern, GroupPattern) else None,
            group=group,
            taken=names.new_zeros(units, int(group.max()) + 1),
        )

    def run(self, tick: Callable[[float], None]) -> tuple[Tensor, Tensor]:
        """The blocks in the order of their deletion and what each costs, infinity for what stays, [units, blocks]."""
        units, blocks = self.names.shape
        order = self.names.clone()
        loss = torch.full((units, blocks), torch.inf, dtype=self.weights.dtype, device=self.weights.device)
        everywhere = True
        for step in range(blocks):
            cost = self._costs()
            at = cost.argmin(1, keepdim=True)
            least = cost.gather(1, at)
            going = least < torch.inf
            if not bool(going.any()):
                break
            everywhere = everywhere and bool(going.all())
            order[:, step : step + 1] = self.names.gather(1, at)
            loss[:, step : step + 1] = least
            self._delete(at.squeeze(1), going.squeeze(1))
            if everywhere and int(self.gone[0].sum()) * 4 >= self.gone.shape[1] and step + 1 < blocks:
                self._compact()
            if step % 16 == 0:
                tick((step + 1) / blocks)
        return order, loss

    def _costs(self) -> Tensor:
        units, blocks = self.gone.shape
        if self.width == 1:
            cost = self.weights.square().sum(1) / self.inverse.diagonal(dim1=1, dim2=2)
        else:
            inner = self.inverse.view(units, blocks, self.width, blocks, self.width).diagonal(dim1=1, dim2=3)
            own = inner.permute(0, 3, 1, 2) + torch.diag_embed(
                self.gone[..., None].expand(-1, -1, self.width).to(inner)
            )
            w = self.weights.unflatten(-1, (blocks, self.width)).permute(0, 2, 3, 1)
            cost = (w * torch.linalg.solve(own, w)).sum((2, 3))
        cost = torch.where(self.zero, -1, cost / self.sizes)
        closed = self.gone
        if self.limit is not None:
            closed = closed | (~self.zero & (self.taken.gather(1, self.group) >= self.limit))
        return torch.where(closed, torch.inf, cost)

    def _delete(self, at: Tensor, going: Tensor) -> None:
        units, blocks = self.gone.shape
        every = torch.arange(units, device=at.device)
        lines = self.inverse.view(units, blocks, self.width, -1)[every, at]  # [units, width, columns]
        own = lines.unflatten(-1, (blocks, self.width))[every, :, at]  # [units, width, width]
        scaled = lines / own if self.width == 1 else torch.linalg.solve(own, lines)
        scaled = torch.where(going[:, None, None], scaled, 0)
        removed = self.weights.unflatten(-1, (blocks, self.width))[every, :, at]  # [units, R, width]
        self.weights.baddbmm_(removed, scaled, alpha=-1)
        self.inverse.baddbmm_(lines.mT, scaled, alpha=-1)
        self.gone[every, at] |= going
        if self.limit is not None:
            self.taken.scatter_add_(1, self.group[every, at][:, None], going[:, None].to(self.taken))

    def _compact(self) -> None:
        """Takes out what is gone, which is equally much in every unit."""
        units = len(self.gone)
        left = (~self.gone).nonzero()[:, 1].view(units, -1)
        columns = (left[..., None] * self.width + torch.arange(self.width, device=left.device)).flatten(1)
        height, size = self.weights.shape[1], columns.shape[1]
        self.weights = self.weights.gather(2, columns[:, None].expand(units, height, size))
        lines = self.inverse.gather(1, columns[..., None].expand(units, size, self.inverse.shape[2]))
        self.inverse = lines.gather(2, columns[:, None].expand(units, size, size))
        self.sizes, self.names, self.zero, self.gone, self.group = (
            each.gather(1, left) for each in (self.sizes, self.names, self.zero, self.gone, self.group)
        )
