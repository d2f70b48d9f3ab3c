"""Codes of sub-vectors, what they stand for, and where a plain weight keeps those that its numbers do not tell."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

# Where a module keeps them: a note, which files, state dicts and forward passes do not see, and copies and pickles do.
_NOTE = "_tersetorch_vector_codes"


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

    Stages are added one after the other, in the codebooks' dtype: the same bits everywhere.

    Args:
        codes: uint8 [rows, stages * segments], segments the number of widths that columns take, rounded up.
        codebooks: [stages, segments or 1, width, entries].
        columns: of the weight.
    """
    stages, books, width, _ = codebooks.shape
    segments = -(-columns // width)
    places = codes.T.reshape(stages, segments, 1, -1).long()
    source = codebooks.expand(-1, segments, -1, -1) if books != segments else codebooks
    whole = source[0].gather(2, places[0].expand(-1, width, -1))  # [segments, width, rows]
    for stage in range(1, stages):
        whole = whole + source[stage].gather(2, places[stage].expand(-1, width, -1))
    return whole.reshape(segments * width, -1)[:columns].T.contiguous()


def note_codes(module: nn.Module, tensor: str, found: VectorCodes | None) -> None:
    """Keeps with module the codes of one of its weights, whose rows are sums that nobody can take apart; None: none."""
    notes = {name: codes for name, codes in vars(module).get(_NOTE, {}).items() if name != tensor}
    if found is not None:
        notes[tensor] = found
    vars(module).pop(_NOTE, None)
    if notes:
        vars(module)[_NOTE] = notes


@torch.no_grad()
def noted_codes(module: nn.Module, tensor: str) -> VectorCodes | None:
    """The codes that note_codes kept, where the weight still is what they stand for, to the bit; else None."""
    found: VectorCodes | None = vars(module).get(_NOTE, {}).get(tensor)
    weight = module._parameters.get(tensor)
    if found is None or weight is None or weight.is_meta or not weight.is_floating_point():
        return None
    dense = weight.detach().flatten(1)
    codes, codebooks = found
    stages, _, width, _ = codebooks.shape
    if codes.shape != (len(dense), stages * -(-dense.shape[1] // width)):
        return None
    decoded = decode(*found, dense.shape[1]).to(dense.device, dense.dtype)
    same = bool(decoded.isfinite().all()) and torch.equal(decoded, dense)
    # Zeros of either sign are equal numbers.
    return found if same and torch.equal(decoded.signbit(), dense.signbit()) else None
