"""Which weights go together: each alone, N of every M input channels, or whole blocks."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tersetorch.methods.selection import Target


@dataclass(frozen=True)
class GroupPattern:
    """Of every `group` consecutive input channels, dimension 1 of the weight, `kept` stay: "2:4" is (2, 4)."""

    kept: int
    group: int


@dataclass(frozen=True)
class BlockPattern:
    """Blocks of rows x columns of the weight as a matrix [out, rest] go together: "4x1" is (4, 1).

    Blocks at the lower and right edges hold what is left of the matrix.
    """

    rows: int
    columns: int


Pattern = GroupPattern | BlockPattern | None


def parse(where: str, pattern: str | None) -> Pattern:
    """The pattern that None, "N:M" or "RxC" names.

    Raises:
        TypeError: pattern is no str.
        ValueError: it names no pattern.
    """
    if pattern is None:
        return None
    if not isinstance(pattern, str):
        raise TypeError(
            f"{where}: pattern must be a str or None, got {type(pattern).__name__}; pass for example '2:4' or '4x1'"
        )
    found = re.fullmatch(r"([0-9]{1,9})([:x])([0-9]{1,9})", pattern)
    if found is not None:
        first, second = int(found[1]), int(found[3])
        if found[2] == ":" and 0 < first < second:
            return GroupPattern(first, second)
        if found[2] == "x" and first > 0 and second > 0:
            return BlockPattern(first, second)
    raise ValueError(
        f"{where}: pattern must be 'N:M' with 0 < N < M or 'RxC' with positive sides, got {pattern!r}; pass for "
        "example '2:4' or '4x1'"
    )


def blocks(where: str, pattern: str | None) -> Pattern:
    """As parse, for methods that raise the sparsity in steps: N:M, which says the sparsity itself, is refused."""
    form = parse(where, pattern)
    if isinstance(form, GroupPattern):
        raise ValueError(
            f"{where}: pattern must be None or 'RxC' where sparsity rises, got {pattern!r}; use prune.magnitude for N:M"
        )
    return form


def check_weights(where: str, pattern: Pattern, targets: Sequence[Target]) -> None:
    """Refuses weights whose input channels do not divide into groups."""
    for target in targets:
        weight = target.weight
        if isinstance(pattern, GroupPattern) and weight.shape[1] % pattern.group:
            raise ValueError(
                f"{where}: pattern {pattern.kept}:{pattern.group} must divide the input channels, got "
                f"{weight.shape[1]} of {target.name!r}; pass ignore=[{target.name!r}]"
            )


def keep(score: Tensor, alive: Tensor, sparsity: float, pattern: Pattern = None) -> Tensor:
    """What to keep of one weight: bool mask of score's shape.

    Without a pattern all but round(sparsity * n) of the n entries, of greatest score; with blocks, as many whole
    blocks of least mean score go as fit into that number; with N:M, the N of greatest score stay in each group and
    sparsity is not looked at. Entries that are not alive go first; of equal ones the first in the tensor's order.

    Args:
        score: not negative, of the weight's shape.
        alive: bool, what no mask prunes yet.
        sparsity: part of the entries to go, in [0, 1).
        pattern: what parse gave.
    """
    return keep_together([score], [alive], sparsity, pattern)[0]


def keep_together(
    scores: Sequence[Tensor], alive: Sequence[Tensor], sparsity: float, pattern: Pattern = None
) -> list[Tensor]:
    """As keep, with the entries or blocks of all weights ranked together; N:M ranks inside its groups in any case."""
    if isinstance(pattern, GroupPattern):
        return [_keep_in_groups(score, each, pattern) for score, each in zip(scores, alive, strict=True)]
    wide = torch.float64 if any(score.dtype == torch.float64 for score in scores) else torch.float32
    device = scores[0].device
    pruned = round(sparsity * sum(score.numel() for score in scores))
    # Below every score of an entry that is alive.
    ranked = [score.to(wide).where(each, -1) for score, each in zip(scores, alive, strict=True)]
    if pattern is None:
        kept = _keep_largest(torch.cat([score.flatten().to(device) for score in ranked]), pruned)
        parts = kept.split([score.numel() for score in scores])
        return [part.view(score.shape).to(score.device) for part, score in zip(parts, scores, strict=True)]
    means, sizes = zip(*[_blocks(score, pattern) for score in ranked], strict=True)
    flat = torch.cat([mean.flatten().to(device) for mean in means])
    order = flat.argsort(dim=0, stable=True)
    fits = torch.cat([size.flatten().to(device) for size in sizes])[order].cumsum(0) <= pruned
    kept = torch.ones_like(flat, dtype=torch.bool)
    kept[order[fits]] = False
    parts = kept.split([mean.numel() for mean in means])
    return [
        _expand(part.view(mean.shape).to(score.device), pattern, score)
        for part, mean, score in zip(parts, means, scores, strict=True)
    ]


def _keep_largest(score: Tensor, pruned: int) -> Tensor:
    """All but the `pruned` entries of least score, of equal ones the first."""
    if pruned == 0:
        return torch.ones_like(score, dtype=torch.bool)
    limit = score.kthvalue(pruned).values
    kept = score > limit
    ties = (score == limit).nonzero().flatten()
    kept[ties[pruned - int((score < limit).sum()) :]] = True
    return kept


def _keep_in_groups(score: Tensor, alive: Tensor, pattern: GroupPattern) -> Tensor:
    inner = score.where(alive, -1).movedim(1, -1)
    grouped = inner.unflatten(-1, (inner.shape[-1] // pattern.group, pattern.group))
    # Stable and ascending: of equal entries the first goes.
    order = grouped.argsort(dim=-1, stable=True)[..., pattern.group - pattern.kept :]
    kept = torch.zeros_like(grouped, dtype=torch.bool).scatter_(-1, order, True)
    return kept.flatten(-2).movedim(-1, 1).contiguous()


def _blocks(score: Tensor, pattern: BlockPattern) -> tuple[Tensor, Tensor]:
    """The mean score of each block and its number of entries; a block of which nothing is alive has mean -1."""
    matrix = score.flatten(1)
    rows, columns = (
        torch.arange(size, device=score.device) // side
        for size, side in zip(matrix.shape, (pattern.rows, pattern.columns), strict=True)
    )
    shape = [math.ceil(size / side) for size, side in zip(matrix.shape, (pattern.rows, pattern.columns), strict=True)]
    block = (rows[:, None] * shape[1] + columns).flatten()
    count = shape[0] * shape[1]
    sizes = torch.bincount(block, minlength=count)
    dead = torch.bincount(block, weights=(matrix < 0).flatten().double(), minlength=count)
    total = torch.bincount(block, weights=matrix.clamp(min=0).flatten().double(), minlength=count)
    mean = torch.where(dead == sizes, -1, total / sizes.clamp(min=1))
    return mean.view(shape), sizes.view(shape)


def _expand(kept: Tensor, pattern: BlockPattern, score: Tensor) -> Tensor:
    whole = kept.repeat_interleave(pattern.rows, 0).repeat_interleave(pattern.columns, 1)
    rows, columns = score.flatten(1).shape
    return whole[:rows, :columns].reshape(score.shape)
