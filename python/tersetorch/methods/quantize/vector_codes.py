"""What product and residual quantisation share: their form, its checks, and the metric that calibration data gives."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MAX_ENTRIES = 256
# Added to the diagonal of second moments, in parts of its mean: an input that never varied must not weigh nothing.
DAMPING = 1e-2


class VectorCodes(NamedTuple):
    """W[r, s * width + j] = sum over stages t of codebooks[t, s, j, codes[r, t * segments + s]].

    Product quantisation has one stage, residual quantisation one segment as wide as W. With codebooks of one segment
    for several of codes, all segments share it. Columns past the last of W are padding.

    Attributes:
        codes: uint8 [rows, stages * segments].
        codebooks: float32 [stages, segments or 1, width, entries], entries <= 256.
    """

    codes: Tensor
    codebooks: Tensor


def decode(codes: Tensor, codebooks: Tensor, columns: int) -> Tensor:
    """The weight [rows, columns] that codes and codebooks stand for, as VectorCodes says; differentiable in codebooks.

    Args:
        codes: uint8 [rows, stages * segments], segments the number of widths that columns take, rounded up.
        codebooks: float [stages, segments or 1, width, entries].
        columns: of the weight.
    """
    stages, books, width, _ = codebooks.shape
    segments = -(-columns // width)
    places = codes.T.reshape(stages, segments, 1, -1).long()
    source = codebooks.expand(-1, segments, -1, -1) if books != segments else codebooks
    columns_of = source.gather(3, places.expand(-1, -1, width, -1)).sum(0)  # [segments, width, rows]
    return columns_of.reshape(segments * width, -1)[:columns].T.contiguous()


def check_weight(where: str, weight: object, entries: object) -> None:
    """Refuses what is no finite matrix, and more entries than it has rows.

    Raises:
        TypeError, ValueError: with the sentence.
    """
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        got = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"{where}: weight must be a float tensor, got {got}; pass a layer's weight")
    if weight.dim() != 2 or not weight.numel():
        raise ValueError(
            f"{where}: weight must be [rows, columns] with at least one of each, got shape {tuple(weight.shape)}; "
            "reshape it"
        )
    if not bool(weight.isfinite().all()):
        raise ValueError(f"{where}: weight must be finite, got NaN or infinity; repair the training")
    check_entries(where, entries, weight.shape[0])


def check_entries(where: str, entries: object, rows: int) -> None:
    """Refuses a number of entries that uint8 codes, or the rows of a weight, do not allow."""
    if not isinstance(entries, int) or isinstance(entries, bool):
        raise TypeError(f"{where}: entries must be an int, got {entries!r}; pass a whole number")
    if not 1 <= entries <= MAX_ENTRIES:
        raise ValueError(
            f"{where}: entries must be from 1 to {MAX_ENTRIES}, got {entries}; pass a number in that range"
        )
    if entries > rows:
        raise ValueError(f"{where}: entries must be at most the {rows} rows that share them, got {entries}; pass fewer")


def check_moments(where: str, moments: object, columns: int) -> None:
    """Refuses what is no square of so many columns."""
    if moments is None:
        return
    if not isinstance(moments, Tensor) or moments.shape != (columns, columns):
        got = tuple(moments.shape) if isinstance(moments, Tensor) else type(moments).__name__
        raise ValueError(
            f"{where}: moments must be [{columns}, {columns}], the inputs' second moments, got {got}; "
            "pass those of the same layer, or None"
        )
    if not bool(moments.isfinite().all()):
        raise ValueError(f"{where}: moments must be finite, got NaN or infinity; look at the calibration data")


def metric(moments: Tensor) -> Tensor:
    """L [..., n, n] with L L^T = moments, damped: the distance of v L from 0 is that of x . v in mean square."""
    damped = moments.double()
    diagonal = damped.diagonal(dim1=-2, dim2=-1)
    least = diagonal.mean(-1, keepdim=True) * DAMPING
    added = torch.where(least > 0, least, 1.0)
    root: Tensor = torch.linalg.cholesky(damped + torch.diag_embed(added.expand_as(diagonal)))
    return root
