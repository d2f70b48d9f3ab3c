"""A weight's values shared within the weight, its rows or its blocks of columns: codes and a codebook."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from tersetorch.methods.quantize.kmeans_1d import Floats, Init, cluster

Per: TypeAlias = Literal["tensor", "row"] | int


def share_values(
    weight: Tensor,
    kept: Tensor,
    entries: int,
    per: Per = "tensor",
    *,
    init: Init = "exact",
    iterations: int = 1000,
    seed: int = 0,
    importance: Tensor | None = None,
    bfloat16: bool = False,
    advance: Callable[[], object] = lambda: None,
) -> tuple[Tensor, Tensor]:
    """Codes, uint8 of weight's shape, and a codebook [groups, entries found], float64 for float64 and else float32.

    Each group is clustered on its own. Where anything is not kept, entry 0 is 0 in every group and codes what is not;
    the others rise. A group that needs fewer entries than another repeats its last one.

    Args:
        weight: finite, as a matrix [rows, columns]: its other dimensions count as columns.
        kept: bool of its shape.
        entries: at most so many in a group, 0 counted; 1 to 256, and one more where 1 leaves only 0.
        per: what has a codebook: "tensor", "row", or so many columns, the last block being what is left.
        init: as cluster takes it, and the next two.
        iterations: of each group.
        seed: group g draws with seed + g.
        importance: not negative, of weight's shape or one that expands to it: what each squared error counts; None for
            1 each.
        bfloat16: whether entries are numbers of bfloat16.
        advance: called after each group.
    """
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    slices = _slices(weight.shape, per)
    matrix = weight.shape[0], weight.shape[1:].numel()
    values, alive = (tensor.detach().to("cpu").reshape(matrix) for tensor in (weight.to(wide), kept))
    zero = int(not bool(alive.all()) or not weight.numel())
    counts = None if importance is None else importance.to("cpu", torch.float64).reshape(len(importance), matrix[1])
    codes = np.zeros(values.shape, np.uint8)

    def of_group(group: int) -> Floats:
        place = slices[group]
        chosen = alive[place].numpy()
        members = values[place].numpy()[chosen]
        if not members.size:
            return np.zeros(0)
        found = cluster(
            members,
            max(1, entries - zero),
            init,
            iterations=iterations,
            seed=seed + group,
            weights=None if counts is None else _positive(counts.expand(values.shape)[place].numpy()[chosen]),
            rounding=to_bfloat16 if bfloat16 else None,
        )
        codes[place][chosen] = found.codes(members) + np.uint8(zero)
        return found.centroids

    centroids = []
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for each in pool.map(of_group, range(len(slices))):
            centroids.append(each)
            advance()
    codebook = np.zeros((len(slices), zero + max(len(each) for each in centroids)))
    for row, each in zip(codebook, centroids, strict=True):
        row[zero:] = each[np.minimum(np.arange(len(row) - zero), len(each) - 1)] if len(each) else 0
    laid = torch.from_numpy(codes).to(weight.device).view(weight.shape)
    # In weight's own order of dimensions in memory.
    return torch.zeros_like(weight, dtype=torch.uint8).copy_(laid), torch.from_numpy(codebook).to(weight.device, wide)


def count_groups(shape: torch.Size, per: Per) -> int:
    """How many codebooks a weight of that shape has."""
    return len(_slices(shape, per))


def _slices(shape: torch.Size, per: Per) -> list[tuple[slice, slice]]:
    """Where each group lies in the matrix."""
    rows, columns = shape[0], shape[1:].numel()
    everything = slice(None)
    if per == "tensor" or not rows * columns:
        return [(everything, everything)]
    if per == "row":
        return [(slice(row, row + 1), everything) for row in range(rows)]
    return [(everything, slice(start, start + per)) for start in range(0, columns, per)]


def to_bfloat16(numbers: Floats) -> Floats:
    """Rounded to the nearest finite bfloat16, ties to even."""
    largest = torch.finfo(torch.bfloat16).max
    rounded: Floats = torch.from_numpy(numbers).clamp(-largest, largest).to(torch.float32).bfloat16().double().numpy()
    return rounded


def _positive(counts: Floats) -> Floats:
    """The same, but that what counts nothing counts a millionth of the mean: it still wants a value near its own."""
    mean = counts.mean()
    return np.maximum(counts, mean * 1e-6) if mean > 0 else np.ones_like(counts)
