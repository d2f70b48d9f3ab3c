"""ProductWeight: what it stands for, its size, and what it refuses."""

import dataclasses

import pytest
import torch

from tersetorch.formats import ProductWeight


def make(rows=70, columns=11, width=3, entries=10, stages=1):
    generator = torch.Generator().manual_seed(0)
    segments = -(-columns // width)
    codes = torch.randint(entries, (rows, stages * segments), generator=generator).to(torch.uint8)
    return codes, torch.randn(stages, segments, width, entries, generator=generator)


@pytest.mark.parametrize("entries", [10, 16, 17, 256])
@pytest.mark.parametrize("stages", [1, 3])
def test_codes_come_back_and_bytes_are_counted(entries, stages):
    codes, codebooks = make(entries=entries, stages=stages)
    weight = ProductWeight.from_codes(codes, codebooks, 11)
    weight.validate()
    assert torch.equal(weight.row_codes, codes)
    assert weight.shape == (70, 11) and weight.nnz == 770 and weight.tables == 4 * stages
    tables = 4 * stages if entries > 16 else -(-4 * stages // 8) * 4
    assert weight.nbytes == 128 * tables + 4 * codebooks.numel()
    assert weight.to_dense().shape == (70, 11)


def test_from_dense_is_exact():
    codes, codebooks = make()
    dense = ProductWeight.from_codes(codes, codebooks, 11).to_dense()
    found = ProductWeight.from_dense(dense, 3)
    assert torch.equal(found.to_dense(), dense) and found.entries == 10
    assert torch.equal(ProductWeight.from_dense(dense.bfloat16(), 3).to_dense(), dense.bfloat16().float())
    for shape in ((0, 5), (5, 0), (1, 1)):
        assert torch.equal(ProductWeight.from_dense(torch.ones(shape)).to_dense(), torch.ones(shape))


def test_bad_weights_are_refused():
    codes, codebooks = make()
    weight = ProductWeight.from_codes(codes, codebooks, 11)
    with pytest.raises(TypeError, match=r"codes must be uint8, got torch\.int64"):
        ProductWeight.from_codes(codes.long(), codebooks, 11)
    with pytest.raises(TypeError, match=r"codebooks must be float32, got torch\.float64"):
        ProductWeight.from_codes(codes, codebooks.double(), 11)
    with pytest.raises(ValueError, match=r"codes must be \[rows, 4\]"):
        ProductWeight.from_codes(codes[:, :3], codebooks, 11)
    with pytest.raises(ValueError, match="codebooks must have 1 segment or the 5 that 13 columns have, got 4"):
        ProductWeight.from_codes(codes, codebooks, 13)
    with pytest.raises(ValueError, match=r"codes must lie in \[0, 9\), got 9"):
        ProductWeight.from_codes(codes, codebooks[..., :9], 11)
    with pytest.raises(ValueError, match="codes must have 512 bytes"):
        dataclasses.replace(weight, codes=weight.codes[:1]).validate()
    with pytest.raises(ValueError, match="rows and columns must be at least 0"):
        dataclasses.replace(weight, rows=-1).validate()
    with pytest.raises(ValueError, match="sub_vector must be at least 1"):
        ProductWeight.from_dense(torch.ones(2, 2), 0)
