"""Finds the sub-vectors that the rows of a weight share, from its numbers alone, as bit patterns."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

MAX_ENTRIES = 256
# Segments that tell whether a width is worth looking at the others.
SAMPLE = 4
# Parts that are sorted at a time.
CHUNK = 1 << 21
# Of a codebook's bytes, what no coder of floats goes below by much.
LEAST_OF_CODEBOOKS = 0.7
_ODD = 0x9E3779B97F4A7C15 - (1 << 64)


class Parts(NamedTuple):
    """W[r, s * width + j] = codebooks[s or 0, j, codes[r, s]]; columns past the last of W are padding.

    Attributes:
        codes: uint8 [rows, segments].
        codebooks: bit patterns [segments or 1, width, entries], entries <= 256, of rising first numbers; those of
            segments with fewer than the longest repeat one.
    """

    codes: Tensor
    codebooks: Tensor


class Width(NamedTuple):
    """What a few segments tell of parts of so many columns.

    Attributes:
        least: about the bytes that codes and codebooks take at least, entropy-coded.
        width: columns of a part.
        entries: that a segment has.
        numbers: in all codebooks.
    """

    least: float
    width: int
    entries: int
    numbers: float


def widths(bits: Tensor) -> list[Width]:
    """Widths of parts, 2 and more, that bits [rows, columns] may have, those of the fewest bytes first.

    The number of distinct beginnings of rows stands still within a part and rises with the next one; where the first
    columns are all the same a part's width divides what they and it take. A few segments tell the number of entries.
    """
    rows, columns = bits.shape
    found: set[int] = set()
    keys = bits.new_zeros(rows, dtype=torch.int64)
    before = 0
    for column in range(columns):
        keys = _mixed(keys, bits[:, column])
        count = keys.unique().numel()
        if count > before:
            found.add(column)
        if count > MAX_ENTRIES or count == rows:
            break
        before = count
    else:
        found.add(columns)
    found |= {width for rise in found for width in range(2, rise // 2 + 1) if not rise % width}
    estimates = (_estimate(bits, width) for width in found if width > 1)
    return sorted(estimate for estimate in estimates if estimate is not None)


def find_parts(bits: Tensor, width: int) -> Parts | None:
    """The parts of bits [rows, columns], int8 to int64, of this width; None where a segment has more than 256.

    One codebook for all segments where it and its codes take fewer bits than one for each.
    """
    rows, columns = bits.shape
    segments = -(-columns // width)
    parts = pad(bits.T, (0, 0, 0, segments * width - columns)).contiguous().view(segments, width, rows)
    step = max(1, CHUNK // rows)
    found = []
    for start in range(0, segments, step):
        chunk = _chunk_parts(parts[start : start + step])
        if chunk is None:
            return None
        found.append(chunk)
    entries = max(books.shape[2] for _, books in found)
    books = torch.cat([torch.cat([b, b[..., -1:].expand(-1, -1, entries - b.shape[2])], 2) for _, b in found])
    codes = torch.cat([codes for codes, _ in found])
    shared = _shared(codes, books.transpose(1, 2), columns - (segments - 1) * width)
    return Parts(codes.T.contiguous(), books) if shared is None else shared


def _chunk_parts(parts: Tensor) -> tuple[Tensor, Tensor] | None:
    """Codes [segments, rows] and codebooks [segments, width, entries] of parts [segments, width, rows]."""
    keys, order = _keys(parts, 1).sort(1)
    new = torch.ones_like(keys, dtype=torch.bool)
    torch.ne(keys[:, 1:], keys[:, :-1], out=new[:, 1:])
    rank = new.cumsum(1).sub_(1)
    entries = int(rank[:, -1].max()) + 1
    if entries > MAX_ENTRIES:
        return None

    def of_columns(places: Tensor) -> Tensor:
        return places[:, None].expand(-1, parts.shape[1], -1)

    # The row in which each entry stands first; the last one's for those that are missing.
    books = parts.gather(2, of_columns(order[:, -1:].repeat(1, entries).scatter_(1, rank, order)))
    rising = _ordered(books[:, 0]).argsort(dim=1, stable=True)
    books = books.gather(2, of_columns(rising))
    codes = torch.empty_like(order).scatter_(1, order, _inverse(rising).gather(1, rank))
    # Two parts may, once in 2**64, have the same key.
    same = torch.equal(books.gather(2, of_columns(codes)), parts)
    return (codes.to(torch.uint8), books) if same else None


def _shared(codes: Tensor, books: Tensor, rest: int) -> Parts | None:
    """One codebook for codes [segments, rows] and codebooks [segments, entries, width], where that is smaller.

    The last segment has `rest` columns that are no padding.
    """
    segments, entries, width = books.shape
    whole = segments - (rest < width)
    distinct, place = _keys(books[:whole], 2).unique(return_inverse=True)
    count = distinct.numel()
    if whole < 2 or count > MAX_ENTRIES:
        return None
    member = place.new_zeros(count).scatter_(0, place.flatten(), torch.arange(place.numel(), device=place.device))
    book = books.reshape(-1, width)[member]
    rising = _ordered(book[:, 0]).argsort(stable=True)
    book, place = book[rising], _inverse(rising)[place]
    if not torch.equal(book[place], books[:whole]):
        return None
    if whole < segments:
        # What the padding hides may be any entry that begins so.
        same = (books[-1, :, None, :rest] == book[:, :rest]).all(-1)
        lacking = books[-1][~same.any(1)]
        last = same.int().argmax(1)
        last[~same.any(1)] = count + torch.arange(len(lacking), device=last.device)
        book, place, count = torch.cat([book, lacking]), torch.cat([place, last[None]]), count + len(lacking)
        if count > MAX_ENTRIES:
            return None
    item = 8 * books.element_size() * width
    if count * item + codes.numel() * _bits(count) >= segments * entries * item + codes.numel() * _bits(entries):
        return None
    shared = place.to(torch.uint8).gather(1, codes.long())
    return Parts(shared.T.contiguous(), book.T.contiguous()[None])


def _estimate(bits: Tensor, width: int) -> Width | None:
    """As if all segments were like a few of them; None if one of these has too many parts, or nothing is saved."""
    rows, columns = bits.shape
    segments = -(-columns // width)
    chosen = sorted({segments * place // SAMPLE for place in range(SAMPLE)})
    keys = [_keys(bits[:, segment * width : (segment + 1) * width], 1) for segment in chosen]
    counts = [key.unique(return_counts=True)[1] for key in keys]
    most = max(map(len, counts))
    if most > MAX_ENTRIES:
        return None
    numbers, bits_of_a_code = (sum(map(of, counts)) / len(chosen) for of in (len, _entropy))
    numbers *= segments * width
    together = torch.cat(keys).unique(return_counts=True)[1]
    if len(together) <= MAX_ENTRIES and 2 * len(together) <= sum(map(len, counts)):
        numbers, bits_of_a_code = len(together) * width, _entropy(together)
    size = bits.element_size()
    if numbers + rows * segments / size >= bits.numel():
        return None
    least = LEAST_OF_CODEBOOKS * numbers * size + rows * segments * bits_of_a_code / 8
    return Width(least, width, most, numbers)


def _keys(parts: Tensor, dim: int) -> Tensor:
    """A number for each of parts, which lie along dim, int64: the same for the same."""
    columns = parts.unbind(dim)
    keys = torch.zeros_like(columns[0], dtype=torch.int64)
    for column in columns:
        keys = _mixed(keys, column)
    return keys


def _mixed(keys: Tensor, column: Tensor) -> Tensor:
    keys = keys.add(column).mul_(_ODD)
    return keys.bitwise_xor_(keys >> 29)


def _ordered(bits: Tensor) -> Tensor:
    """Whole numbers in the order of the numbers whose bits they are."""
    return bits ^ ((bits >> (8 * bits.element_size() - 1)) & torch.iinfo(bits.dtype).max)


def _inverse(order: Tensor) -> Tensor:
    """Where each of the things that order, a permutation along the last dimension, names has gone."""
    places = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


def _entropy(counts: Tensor) -> float:
    """Bits of a code of which so many were seen; the second term is what few samples hide (Miller 1955)."""
    total = counts.sum()
    shares = counts / total
    return float((len(counts) - 1) / (2 * math.log(2) * total) - (shares * shares.log2()).sum())


def _bits(entries: int) -> int:
    return max(1, (entries - 1).bit_length())
