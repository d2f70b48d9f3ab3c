import pytest
import torch

from tersetorch.formats import SparseCodebookWeight


def shared(rows, columns, entries, density, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    codebook = torch.randn(entries, generator=g).to(dtype)
    kept = torch.rand(rows, columns, generator=g) < density
    return torch.where(kept, codebook[torch.randint(entries, (rows, columns), generator=g)], 0.0)


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0), (1, 1), (37, 53), (300, 400)])
@pytest.mark.parametrize("entries", [1, 2, 31, 255])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_are_found_exactly(shape, entries, dtype):
    dense = shared(*shape, entries, 0.3, dtype=dtype)
    weight = SparseCodebookWeight.from_dense(dense)
    weight.validate()
    assert torch.equal(weight.to_dense(), dense.float())
    assert weight.codebook.shape == (1, dense[dense != 0].unique().numel() + 1)
    assert weight.codebook[0, 0] == 0 and bool((weight.codebook[0, 1:].diff() > 0).all())
    assert weight.nbytes == 4 * (shape[0] + 1) + 5 * weight.nnz + weight.codebook.nbytes


def test_nothing_stored_is_a_codebook_of_zero_alone():
    weight = SparseCodebookWeight.from_dense(torch.zeros(3, 4))
    weight.validate()
    assert weight.codebook.tolist() == [[0.0]] and torch.equal(weight.to_dense(), torch.zeros(3, 4))


def test_values_carry_the_gradient_of_the_codebook():
    dense = torch.tensor([[2.0, 0.0, 2.0], [0.0, -1.0, 0.0]])
    weight = SparseCodebookWeight.from_dense(dense)
    weight.codebook.requires_grad_()
    (weight.values * torch.tensor([1.0, 10.0, 100.0])).sum().backward()
    assert weight.codebook.grad.tolist() == [[0.0, 100.0, 11.0]]


def test_more_than_255_values_are_refused():
    with pytest.raises(ValueError, match=r"at most 255 distinct non-zero values, got 256; share it first"):
        SparseCodebookWeight.from_dense(torch.arange(257.0)[None])
    with pytest.raises(ValueError, match="at most 255 distinct non-zero values, got at least 65536"):
        SparseCodebookWeight.from_dense(torch.arange(1.0, 70001.0)[None])
    SparseCodebookWeight.from_dense(torch.arange(256.0)[None]).validate()


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


GOOD = {
    "row_offsets": ints(0, 2, 2, 3),
    "col_indices": ints(0, 3, 1),
    "codes": torch.tensor([1, 2, 1], dtype=torch.uint8),
    "codebook": torch.tensor([[0.0, 1.0, 2.0]]),
    "columns": 4,
}


@pytest.mark.parametrize(
    "bad,error,match",
    [
        ({"codes": torch.tensor([1, 2, 1])}, TypeError, r"codes must be uint8, got torch\.int64"),
        ({"codes": torch.tensor([1, 2], dtype=torch.uint8)}, ValueError, r"codes must be \[3\]"),
        ({"codes": torch.tensor([1, 0, 1], dtype=torch.uint8)}, ValueError, r"codes must lie in \[1, 3\)"),
        ({"codes": torch.tensor([1, 3, 1], dtype=torch.uint8)}, ValueError, r"codes must lie in \[1, 3\)"),
        ({"codebook": torch.tensor([[0.5, 1.0, 2.0]])}, ValueError, r"codebook\[0, 0\] must be 0, got 0\.5"),
        ({"codebook": torch.tensor([0.0, 1.0, 2.0])}, ValueError, r"codebook must be \[1, entries\]"),
        ({"codebook": torch.zeros(1, 257)}, ValueError, "entries <= 256"),
        ({"codebook": torch.zeros(1, 3).double()}, TypeError, "codebook must be float32"),
        ({"col_indices": ints(0, 4, 1)}, ValueError, r"col_indices must lie in \[0, 4\)"),
    ],
)
def test_validate_rejects(bad, error, match):
    SparseCodebookWeight(**GOOD).validate()
    with pytest.raises(error, match=f"SparseCodebookWeight: .*{match}"):
        SparseCodebookWeight(**GOOD | bad).validate()


def test_values_are_told_apart_by_their_bits():
    """More numbers than are looked at first, rare ones late, both signs, infinities and NaN."""
    levels = torch.tensor([-torch.inf, -2.0, -1e-40, 1e-40, 3.0, torch.inf, torch.nan])
    dense = levels[torch.arange(70_000) % 3].reshape(70, 1000)
    dense[-1, -4:] = levels[3:]
    weight = SparseCodebookWeight.from_dense(dense)
    weight.validate()
    assert weight.codebook.shape == (1, 8) and torch.equal(weight.codebook[0, 1:7], levels[:6])
    assert torch.equal(weight.to_dense().view(torch.int32), dense.view(torch.int32))


def test_narrow_indices_number_the_same_columns():
    dense = torch.where(torch.rand(7, 40000, generator=torch.Generator().manual_seed(0)) < 0.01, 2.0, 0.0)
    weight = SparseCodebookWeight.from_dense(dense)
    narrow = weight.narrowed()
    narrow.validate()
    assert narrow.col_indices.dtype == torch.int16 and int(narrow.col_indices.min()) < 0
    assert torch.equal(narrow.to_dense(), dense) and torch.equal(narrow.cols, weight.cols)
    assert narrow.nbytes == weight.nbytes - 2 * weight.nnz
    assert torch.equal(narrow.narrowed().col_indices, narrow.col_indices)
    with pytest.raises(
        ValueError, match="SparseCodebookWeight: columns must be at most 65536 for 16-bit indices, got 65537"
    ):
        SparseCodebookWeight.from_dense(torch.zeros(1, 65537)).narrowed()
