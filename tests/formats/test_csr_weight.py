from dataclasses import replace

import pytest
import scipy.sparse
import torch

from tersetorch.formats import CsrWeight


def sparse(rows, columns, density, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    kept = torch.rand(rows, columns, generator=g) < density
    return torch.where(kept, torch.randn(rows, columns, generator=g), 0.0).to(dtype)


SHAPES = [(0, 0), (0, 5), (5, 0), (1, 1), (1, 17), (17, 1), (37, 53), (100, 300)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_dense_and_back(shape, density, dtype):
    dense = sparse(*shape, density, dtype=dtype)
    weight = CsrWeight.from_dense(dense)
    weight.validate()
    assert torch.equal(weight.to_dense(), dense)
    assert weight.to_dense().dtype == dtype
    assert (weight.shape, weight.nnz) == (shape, int((dense != 0).sum()))
    assert weight.nbytes == 4 * (shape[0] + 1) + weight.nnz * (4 + dense.element_size())


def test_layout_is_the_one_of_scipy():
    dense = sparse(37, 53, 0.2)
    weight, other = CsrWeight.from_dense(dense), scipy.sparse.csr_array(dense.numpy())
    assert weight.row_offsets.tolist() == other.indptr.tolist()
    assert weight.col_indices.tolist() == other.indices.tolist()
    assert weight.values.tolist() == other.data.tolist()
    assert weight.rows.tolist() == other.nonzero()[0].tolist()


def test_negative_zero_is_left_out_and_nan_is_kept():
    weight = CsrWeight.from_dense(torch.tensor([[0.0, -0.0, torch.nan, torch.inf]]))
    assert weight.col_indices.tolist() == [2, 3]


def test_does_not_share_memory_or_history():
    dense = torch.nn.Parameter(sparse(3, 4, 1.0))
    weight = CsrWeight.from_dense(dense)
    assert not weight.values.requires_grad
    dense.data.zero_()
    assert weight.values.abs().min() > 0


@pytest.mark.parametrize(
    "dense,error,match",
    [
        ([[1.0]], TypeError, "weight must be a tensor, got list"),
        (torch.zeros(2, 2, dtype=torch.float64), TypeError, r"must be float32 or bfloat16, got torch\.float64"),
        (torch.zeros(2, 2, dtype=torch.int32), TypeError, r"got torch\.int32"),
        (torch.zeros(2), ValueError, r"must be \[rows, columns\], got shape \(2,\)"),
        (torch.zeros(2, 2, 2), ValueError, r"got shape \(2, 2, 2\)"),
    ],
)
def test_from_dense_rejects(dense, error, match):
    with pytest.raises(error, match=f"CsrWeight: .*{match}"):
        CsrWeight.from_dense(dense)


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


GOOD = {"row_offsets": ints(0, 2, 2, 3), "col_indices": ints(0, 3, 1), "values": torch.ones(3), "columns": 4}


def test_a_valid_weight_with_an_empty_row_passes():
    CsrWeight(**GOOD).validate()


@pytest.mark.parametrize(
    "bad,error,match",
    [
        ({"row_offsets": torch.tensor([0, 2, 2, 3])}, TypeError, r"row_offsets must be int32, got torch\.int64"),
        ({"row_offsets": ints(0, 2, 2, 3)[None]}, ValueError, "row_offsets must be 1-D"),
        ({"row_offsets": ints()}, ValueError, "must rise from 0 to the 3"),
        ({"row_offsets": ints(1, 2, 2, 3)}, ValueError, "must rise from 0 to the 3"),
        ({"row_offsets": ints(0, 2, 1, 3)}, ValueError, "must rise from 0 to the 3"),
        ({"row_offsets": ints(0, 2, 2, 4)}, ValueError, "must rise from 0 to the 3"),
        ({"col_indices": ints(0, 4, 1)}, ValueError, r"must lie in \[0, 4\), got values from 0 to 4"),
        ({"col_indices": ints(-1, 3, 1)}, ValueError, r"must lie in \[0, 4\), got values from -1"),
        ({"col_indices": ints(3, 3, 1)}, ValueError, "must rise strictly within a row"),
        ({"col_indices": ints(3, 0, 1)}, ValueError, "must rise strictly within a row"),
        ({"values": torch.ones(2)}, ValueError, r"values must be \[3\]"),
        ({"values": torch.ones(3).half()}, TypeError, "values must be float32 or bfloat16"),
        ({"columns": "a"}, TypeError, "columns must be an int, got 'a'"),
        ({"row_offsets": 1}, TypeError, "row_offsets must be a tensor, got int"),
        ({"values": [1.0]}, TypeError, "values must be a tensor, got list"),
        ({"columns": -1}, ValueError, "columns must be at least 0"),
    ],
)
def test_validate_rejects(bad, error, match):
    with pytest.raises(error, match=f"CsrWeight: .*{match}"):
        CsrWeight(**GOOD | bad).validate()


def test_narrow_indices_number_the_same_columns():
    dense = torch.where(torch.rand(7, 40000, generator=torch.Generator().manual_seed(0)) < 0.01, 2.0, 0.0)
    weight = CsrWeight.from_dense(dense)
    narrow = weight.narrowed()
    narrow.validate()
    assert narrow.col_indices.dtype == torch.int16 and int(narrow.col_indices.min()) < 0
    assert torch.equal(narrow.to_dense(), dense) and torch.equal(narrow.cols, weight.cols)
    assert narrow.nbytes == weight.nbytes - 2 * weight.nnz
    assert torch.equal(narrow.narrowed().col_indices, narrow.col_indices)
    with pytest.raises(ValueError, match="CsrWeight: columns must be at most 65536 for 16-bit indices, got 65537"):
        CsrWeight.from_dense(torch.zeros(1, 65537)).narrowed()


def test_a_weight_without_numbers_is_refused():
    weight = CsrWeight.from_dense(torch.eye(3))
    moved = {name: getattr(weight, name).to("meta") for name in ("row_offsets", "col_indices", "values")}
    for field, tensor in moved.items():
        with pytest.raises(ValueError, match=f"CsrWeight: {field} must have numbers, got a tensor on device meta"):
            replace(weight, **{field: tensor}).validate()
    with pytest.raises(ValueError, match="CsrWeight: weight must have numbers, got a tensor on device meta"):
        CsrWeight.from_dense(torch.eye(3, device="meta"))
