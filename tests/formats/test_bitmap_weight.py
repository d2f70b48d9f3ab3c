import dataclasses

import pytest
import torch

from tersetorch.formats import (
    BitmapCodebookWeight,
    BitmapColumnsWeight,
    BitmapInt8Weight,
    BitmapWeight,
    CsrWeight,
    SparseCodebookWeight,
)

SHAPES = [(0, 0), (0, 5), (5, 0), (1, 1), (37, 53), (9, 64), (9, 65), (30, 400)]


def random(rows, columns, density=0.3, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    kept = torch.rand(rows, columns, generator=g) < density
    return torch.where(kept, torch.randn(rows, columns, generator=g), 0.0).to(dtype)


def shared(rows, columns, entries=15):
    table = torch.linspace(-1, 1, entries + 1)[1:]
    codes = torch.randint(entries, (rows, columns), generator=torch.Generator().manual_seed(1))
    return torch.where(random(rows, columns) != 0, table[codes], 0.0)


def words(columns):
    return -(-columns // 64)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_values_come_back_exactly(shape, dtype, density):
    dense = random(*shape, density, dtype=dtype)
    weight = BitmapWeight.from_dense(dense)
    weight.validate()
    assert torch.equal(weight.to_dense(), dense) and weight.to_dense().dtype == dtype
    assert weight.shape == shape and weight.nnz == int((dense != 0).sum())
    assert weight.nbytes == 8 * shape[0] * words(shape[1]) + 4 * (shape[0] + 1) + dtype.itemsize * weight.nnz
    rows = CsrWeight.from_dense(dense)
    same = BitmapWeight.from_csr(rows)
    assert same.values is rows.values and same.row_offsets is rows.row_offsets
    assert torch.equal(same.bitmap, weight.bitmap) and torch.equal(same.values, weight.values)
    assert torch.equal(weight.col_indices, rows.col_indices)
    assert torch.equal(BitmapWeight.from_csr(rows.narrowed()).bitmap, weight.bitmap)


def test_zeros_are_left_out_and_nan_is_kept():
    weight = BitmapWeight.from_dense(torch.tensor([[0.0, -0.0, float("nan"), float("inf"), 1e-45]]))
    assert weight.nnz == 3 and int(weight.bitmap) == 0b11100
    weight.validate()


def test_strided_weights_are_packed():
    dense = random(40, 130)
    assert torch.equal(BitmapWeight.from_dense(dense.T).to_dense(), dense.T)
    assert torch.equal(BitmapWeight.from_dense(dense[:, ::2]).to_dense(), dense[:, ::2])


@pytest.mark.parametrize("shape", SHAPES)
def test_codes_are_found_exactly(shape):
    dense = shared(*shape)
    weight = BitmapCodebookWeight.from_dense(dense)
    weight.validate()
    assert torch.equal(weight.to_dense(), dense)
    assert weight.nbytes == 8 * shape[0] * words(shape[1]) + 4 * (shape[0] + 1) + weight.nnz + weight.codebook.nbytes
    rows = SparseCodebookWeight.from_dense(dense)
    same = BitmapCodebookWeight.from_csr(rows)
    assert same.codes is rows.codes and same.codebook is rows.codebook


@pytest.mark.parametrize("shape", SHAPES)
def test_rounding_keeps_to_half_a_step_of_its_row(shape):
    dense = random(*shape)
    for weight in (BitmapInt8Weight.from_dense(dense), BitmapInt8Weight.from_csr(CsrWeight.from_dense(dense))):
        weight.validate()
        steps = weight.scales[:, None]
        assert bool(((weight.to_dense() - dense).abs() <= steps * 0.5001).all())
        assert torch.equal(weight.bitmap, BitmapWeight.from_dense(dense).bitmap)
        if dense.numel():
            torch.testing.assert_close(weight.scales, dense.abs().amax(1) / 127)
        assert weight.nbytes == 8 * shape[0] * words(shape[1]) + 4 * (2 * shape[0] + 1) + weight.nnz


def test_rounding_takes_rows_of_nothing_and_of_very_little():
    weight = BitmapInt8Weight.from_dense(torch.tensor([[0.0, 0.0], [1e-45, 0.0], [-3e38, 1e30]]))
    weight.validate()
    assert weight.values.tolist() == [0, -127, 0] and weight.scales.tolist()[:2] == [0.0, 0.0]
    with pytest.raises(ValueError, match="BitmapInt8Weight: weight must be finite to be rounded"):
        BitmapInt8Weight.from_dense(torch.tensor([[float("inf"), 1.0]]))


@pytest.mark.parametrize("kind", [BitmapWeight, BitmapCodebookWeight, BitmapInt8Weight])
def test_rejects_other_weights(kind):
    with pytest.raises(TypeError, match=r"weight must be float32 or bfloat16, got torch.float64"):
        kind.from_dense(torch.zeros(2, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"weight must be \[rows, columns\], got shape \(2,\)"):
        kind.from_dense(torch.zeros(2))


GOOD = {
    BitmapWeight: BitmapWeight.from_dense(random(6, 70)),
    BitmapCodebookWeight: BitmapCodebookWeight.from_dense(shared(6, 70)),
    BitmapInt8Weight: BitmapInt8Weight.from_dense(random(6, 70)),
}


def flipped(bitmap):
    other = bitmap.clone()
    other[3, 0] ^= 1
    return other


def past(bitmap):
    """A bit moved from the row's columns to behind them."""
    other = bitmap.clone()
    word = int(other[2, 0])
    other[2, 0] = word & (word - 1)
    other[2, 1] |= 1 << 40
    return other


@pytest.mark.parametrize("kind", GOOD)
@pytest.mark.parametrize(
    "change,error,match",
    [
        ({"columns": 71.0}, TypeError, "columns must be an int, got 71.0"),
        ({"columns": 200}, ValueError, r"bitmap must be \[6, 4\] for 200 columns, got shape \(6, 2\)"),
        ({"bitmap": lambda w: w.bitmap.int()}, TypeError, r"bitmap must be torch\.int64, got torch\.int32"),
        ({"bitmap": lambda w: w.bitmap.tolist()}, TypeError, "bitmap must be a tensor, got list"),
        ({"bitmap": lambda w: w.bitmap[0]}, ValueError, r"bitmap must be 2-D, got shape \(2,\)"),
        ({"row_offsets": lambda w: w.row_offsets.long()}, TypeError, r"row_offsets must be torch\.int32"),
        ({"bitmap": lambda w: flipped(w.bitmap)}, ValueError, "bitmap must have a bit for each value of its row"),
        ({"bitmap": lambda w: past(w.bitmap)}, ValueError, "bitmap must have a bit .* none past the last column"),
        (
            {"row_offsets": lambda w: w.row_offsets.flip(0)},
            ValueError,
            r"(values|codes) must be \[0\] as row_offsets count",
        ),
        ({"values": lambda w: w.values[1:]}, ValueError, r"values must be \[\d+\] as row_offsets count"),
        ({"codes": lambda w: w.codes[1:]}, ValueError, r"codes must be \[\d+\] as row_offsets count"),
        ({"codes": lambda w: w.codes * 0}, ValueError, r"codes must lie in \[1, 16\), got values from 0 to 0"),
        ({"scales": lambda w: w.scales[1:]}, ValueError, r"scales must be \[6\], got shape \(5,\)"),
        ({"scales": lambda w: w.scales.double()}, TypeError, r"scales must be torch\.float32"),
        ({"values": lambda w: w.values.double()}, TypeError, "values must be .*, got torch.float64"),
        ({"values": lambda w: torch.full_like(w.values, -128)}, ValueError, r"values must lie in \[-127, 127\]"),
    ],
)
def test_validate_refuses(kind, change, error, match):
    good = GOOD[kind]
    name, value = next(iter(change.items()))
    if name not in {field.name for field in dataclasses.fields(kind)}:
        pytest.skip("the format has no such field")
    if "-127" in match and kind is not BitmapInt8Weight:
        pytest.skip("for 8-bit values")
    good.validate()
    bad = dataclasses.replace(good, **{name: value(good) if callable(value) else value})
    with pytest.raises(error, match=f"{kind.__name__}: {match}"):
        bad.validate()


@pytest.mark.parametrize("shape", SHAPES)
def test_columns_come_back_exactly(shape):
    for dense, rows in (
        (random(*shape), CsrWeight.from_dense(random(*shape))),
        (random(*shape, dtype=torch.bfloat16), CsrWeight.from_dense(random(*shape, dtype=torch.bfloat16)).narrowed()),
    ):
        weight, same = BitmapColumnsWeight.from_dense(dense), BitmapColumnsWeight.from_csr(rows)
        for one in (weight, same):
            one.validate()
            assert torch.equal(one.to_dense(), dense) and one.shape == shape and one.nnz == rows.nnz
        assert torch.equal(weight.values, same.values) and torch.equal(weight.bitmap, same.bitmap)
        bits = 8 * shape[1] * words(shape[0]) + 4 * (shape[1] + 1)
        assert weight.nbytes == bits + dense.dtype.itemsize * weight.nnz
    dense = shared(*shape)
    rows = SparseCodebookWeight.from_dense(dense)
    weight = BitmapColumnsWeight.from_csr(rows)
    weight.validate()
    assert torch.equal(weight.to_dense(), dense) and weight.codebook is rows.codebook
    if weight.nnz:
        with pytest.raises(ValueError, match="BitmapColumnsWeight: transposed BitmapCodebookWeight: codes must"):
            dataclasses.replace(weight, values=weight.values * 0).validate()
