"""What product and residual quantisation share: checks of their form, and the metric that calibration data gives."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.nn import functional

from tersetorch.formats.vector_codes import VectorCodes as VectorCodes
from tersetorch.formats.vector_codes import decode as decode

MAX_ENTRIES = 256
# Added to the diagonal of second moments, in parts of its mean: an input that never varied must not weigh nothing.
DAMPING = 1e-2
# Of the members of a mean entry, so that least squares have one solution: codebooks may move against each other.
LEAST_RIDGE = 1e-4


@torch.no_grad()
def nearest_codebooks(weight: Tensor, codes: Tensor, codebooks: Tensor) -> Tensor:
    """The codebooks that bring the decoded weight nearest to weight [rows, columns] in squared error, with these codes.

    Means of an entry's sub-vectors, or with several stages least squares; entries without members stay as they are.
    """
    stages, books, width, entries = codebooks.shape
    (rows, columns), segments = weight.shape, codes.shape[1] // stages
    whole = functional.pad(weight.double(), (0, segments * width - columns)).view(rows, segments, width)
    places = codes.long().view(rows, stages, segments) + entries * torch.arange(stages, device=codes.device)[:, None]
    wide = codebooks.double()
    found = []
    for book in range(books):
        mine = slice(None) if books == 1 else slice(book, book + 1)
        parts = whole[:, mine].flatten(0, 1)
        at = places[:, :, mine].transpose(1, 2).flatten(0, 1)
        present = wide[:, book].transpose(1, 2).flatten(0, 1)
        # From the entries as they are, so that what agrees already stays to the bit.
        left = parts - present[at].sum(1)
        members = left.new_zeros(len(parts), stages * entries).scatter_(1, at, 1.0)
        if stages == 1:
            change = members.T @ left / members.sum(0).clamp(min=1)[:, None]
        else:
            normal = members.T @ members
            normal.diagonal().add_(LEAST_RIDGE * len(parts) / entries)
            change = torch.linalg.solve(normal, members.T @ left)
        found.append((present + change).view(stages, entries, width).transpose(1, 2))
    return torch.stack(found, 1).to(codebooks.dtype)


def codes_problem(codes: Tensor, codebooks: Tensor, rows: int, columns: int) -> str | None:
    """Why codes and codebooks are not those of a weight [rows, columns], or None."""
    stages, books, width, entries = codebooks.shape
    if not all(codebooks.shape) or entries > MAX_ENTRIES or books not in (1, -(-columns // width)):
        return (
            f"codebook must be [stages, segments, width, entries] with 1 to {MAX_ENTRIES} entries and 1 segment or "
            f"those of {columns} columns, got {tuple(codebooks.shape)}"
        )
    shape = (rows, stages * -(-columns // width))
    if codes.dtype != torch.uint8 or codes.shape != shape:
        return f"codes must be uint8 {shape}, got {codes.dtype} {tuple(codes.shape)}"
    if codes.numel() and int(codes.max()) >= entries:
        return f"codes must lie in [0, {entries}), got {int(codes.max())}"
    return None


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


def metric(where: str, moments: Tensor) -> Tensor:
    """L [..., n, n] with L L^T = moments, damped: the distance of v L from 0 is that of x . v in mean square.

    Raises:
        ValueError: there is none, as for what is no sum of products.
    """
    damped = moments.double()
    diagonal = damped.diagonal(dim1=-2, dim2=-1)
    least = diagonal.mean(-1, keepdim=True) * DAMPING
    added = torch.where(least > 0, least, 1.0)
    root, failed = torch.linalg.cholesky_ex(damped + torch.diag_embed(added.expand_as(diagonal)))
    if bool(failed.any()):
        raise ValueError(
            f"{where}: moments must be a sum of products x x^T, got a matrix with a negative eigenvalue; "
            "pass the inputs' second moments"
        )
    return cast(Tensor, root)
