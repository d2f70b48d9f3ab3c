"""Sub-vectors found again from numbers alone: widths, one codebook or one a segment, bit patterns, and none."""

import pytest
import torch

from tersetorch.formats.shared_parts import find_parts, widths
from tersetorch.formats.vector_codes import decode


def parts(rows, columns, width, entries, shared=False, dtype=torch.float32):
    """A weight whose rows take one of so many parts in each segment."""
    g = torch.Generator().manual_seed(0)
    segments = -(-columns // width)
    books = torch.randn(1, 1 if shared else segments, width, entries, generator=g).to(dtype)
    codes = torch.randint(entries, (rows, segments), generator=g)
    codes[:entries] = torch.arange(entries)[:rows, None]  # each is used
    return decode(codes.to(torch.uint8), books, columns)


def bits_of(weight):
    return weight.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()])


def check(weight, found):
    assert torch.equal(decode(found.codes, found.codebooks[None], weight.shape[1]), bits_of(weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    ("rows", "columns", "width", "entries"),
    [(520, 64, 4, 256), (300, 77, 5, 16), (128, 96, 8, 3), (200, 60, 13, 20), (97, 30, 30, 9), (1000, 7, 2, 31)],
)
def test_the_width_that_a_weight_was_made_with_is_the_first(rows, columns, width, entries, shared, dtype):
    weight = parts(rows, columns, width, entries, shared and width < columns, dtype)
    assert widths(bits_of(weight))[0].width == width
    found = find_parts(bits_of(weight), width)
    segments = -(-columns // width)
    check(weight, found)
    assert found.codes.shape == (rows, segments)
    one = shared and width < columns
    assert found.codebooks.shape[:2] == (1 if one else segments, width)
    # bfloat16 may make two entries one.
    assert found.codebooks.shape[2] == entries or (dtype is torch.bfloat16 and found.codebooks.shape[2] <= entries)
    first = found.codebooks.view(dtype)[:, 0]
    assert torch.equal(first, first.sort().values)


@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(0, 5),
        torch.zeros(5, 0),
        torch.ones(1, 1),
        torch.randn(300, 64, generator=torch.Generator().manual_seed(0)),
        torch.randn(40, 64, generator=torch.Generator().manual_seed(0)),
        torch.arange(600.0).view(300, 2),
        parts(400, 20, 4, 256)[:, :1],
    ],
    ids=["no rows", "no columns", "one", "random", "random, few rows", "rising", "one column"],
)
def test_nothing_shared_has_no_widths(weight):
    assert widths(bits_of(weight)) == []


def test_more_than_256_parts_are_none():
    weight = parts(2000, 40, 4, 256)
    weight[0, 36:] = torch.arange(4.0)  # in the last segment only
    assert find_parts(bits_of(weight), 4) is None
    check(weight[1:], find_parts(bits_of(weight[1:]), 4))


def test_columns_that_are_all_the_same_do_not_hide_the_width():
    weight = parts(600, 64, 4, 100)
    weight[:, :28] = 0
    assert widths(bits_of(weight))[0].width == 4
    check(weight, find_parts(bits_of(weight), 4))


def test_numbers_are_told_apart_by_their_bits():
    weight = parts(60, 12, 3, 5)
    weight[:, :3] = 0.0
    weight[7, :3], weight[9, 1], weight[11] = -0.0, float("nan"), float("inf")
    found = find_parts(bits_of(weight), 3)
    check(weight, found)
    assert found.codebooks[0].T.unique(dim=0).shape[0] == 4


def test_codes_of_segments_that_share_nothing_stay_narrow():
    # 4 entries each, 80 in all: 2 bits a code with 20 codebooks, 7 with one.
    assert find_parts(bits_of(parts(2000, 40, 2, 4)), 2).codebooks.shape == (20, 2, 4)
    # With as few rows one would not pay for either.
    assert find_parts(bits_of(parts(2000, 40, 2, 4, shared=True)), 2).codebooks.shape == (1, 2, 4)
