import pytest
import scipy.sparse
import torch

from tersetorch.ops import csr_pack


def sparse(rows, columns, density, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    kept = torch.rand(rows, columns, generator=g) < density
    return torch.where(kept, torch.randn(rows, columns, generator=g), 0.0).to(dtype)


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0), (1, 1), (1, 17), (300, 1), (37, 53), (513, 1009)])
@pytest.mark.parametrize("density", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_scipy(shape, density, dtype):
    dense = sparse(*shape, density, dtype)
    row_offsets, col_indices, values = csr_pack(dense)
    other = scipy.sparse.csr_array(dense.float().numpy())
    assert (row_offsets.dtype, col_indices.dtype, values.dtype) == (torch.int32, torch.int32, dtype)
    assert row_offsets.tolist() == other.indptr.tolist()
    assert col_indices.tolist() == other.indices.tolist()
    assert values.float().tolist() == other.data.tolist()


def test_zeros_of_both_signs_are_left_out_and_nan_is_kept():
    for dtype in (torch.float32, torch.bfloat16):
        dense = torch.tensor([[0.0, -0.0, torch.nan, -torch.inf], [-0.0, 1e-30, -1e-30, 0.0]]).to(dtype)
        row_offsets, col_indices, values = csr_pack(dense)
        assert row_offsets.tolist() == [0, 2, 4] and col_indices.tolist() == [2, 3, 1, 2]
        assert values[0].isnan() and values[2] > 0 > values[3]


def test_takes_strides_and_unaligned_memory():
    dense = sparse(20, 30, 0.3)
    for view in (dense.T, dense[::2, 1::3]):
        assert torch.equal(csr_pack(view)[2], csr_pack(view.contiguous())[2])
    moved = torch.frombuffer(bytearray(b"?" + dense.numpy().tobytes()), dtype=torch.float32, offset=1).view(20, 30)
    assert all(torch.equal(a, b) for a, b in zip(csr_pack(moved), csr_pack(dense), strict=True))


def test_registration_is_sound():
    torch.library.opcheck(torch.ops.tersetorch.csr_pack.default, (sparse(20, 30, 0.3),))


@pytest.mark.parametrize(
    "dense,error,match",
    [
        ([[1.0]], TypeError, "dense must be a tensor, got list"),
        (torch.zeros(2, 2).double(), TypeError, r"dense must be float32 or bfloat16, got torch\.float64"),
        (torch.zeros(2), ValueError, r"dense must be \[out, in\], got shape \(2,\)"),
    ],
)
def test_rejects(dense, error, match):
    with pytest.raises(error, match=f"csr_pack: {match}"):
        csr_pack(dense)
