"""SignWeight: exact, one bit a weight, refused where it is no weight of signs."""

import pytest
import torch

from tersetorch.formats import SignWeight


@pytest.mark.parametrize("rows,channels,taps", [(1, 1, 1), (5, 64, 1), (7, 70, 9), (3, 1, 65), (0, 5, 2), (4, 0, 1)])
@pytest.mark.parametrize("scaled", [False, True])
def test_is_exact(rows, channels, taps, scaled):
    generator = torch.Generator().manual_seed(0)
    signs = torch.randn(rows, channels * taps, generator=generator).sign()
    dense = signs * torch.rand(rows, 1, generator=generator) if scaled else signs
    weight = SignWeight.from_dense(dense, taps)
    weight.validate()
    assert torch.equal(weight.to_dense(), dense) and torch.equal(weight.negative(), signs < 0)
    again = SignWeight.from_signs(weight.negative(), taps, weight.scale)
    assert torch.equal(again.bits, weight.bits) and again.channels == channels
    assert weight.shape == dense.shape and weight.nnz == dense.numel()
    assert (weight.scale is not None) == (scaled and dense.numel() > 0)
    assert weight.nbytes == rows * taps * -(-channels // 64) * 8 + (4 * rows if weight.scale is not None else 0)


def test_a_bit_of_1_is_minus():
    for weight in (SignWeight.from_dense(torch.tensor([[2.0, -2.0, 2.0]])), SignWeight(torch.tensor([[[0b010]]]), 3)):
        assert weight.bits.item() == 0b010 and weight.negative().tolist() == [[False, True, False]]
        assert weight.to_dense().sign().tolist() == [[1, -1, 1]]


def test_bfloat16_and_zeros():
    dense = torch.tensor([[0.3, -0.3], [0.0, -0.0]]).bfloat16()
    assert torch.equal(SignWeight.from_dense(dense).to_dense(), dense.float())


def test_refuses_other_weights():
    for dense, message in (
        (torch.tensor([[1.0, -1.0], [1.0, 0.5]]), "got more than that in row 1"),
        (torch.tensor([[1.0, float("nan")]]), "got more than that in row 0"),
        (torch.full((2, 2), float("inf")), "got NaN or infinity"),
        (torch.full((2, 2), float("nan")), "got more than that in row 0"),
    ):
        with pytest.raises(ValueError, match=message):
            SignWeight.from_dense(dense)
    with pytest.raises(ValueError, match="taps must divide 3 columns, got 2"):
        SignWeight.from_dense(torch.ones(2, 3), 2)
    with pytest.raises(TypeError, match="weight must be float32 or bfloat16"):
        SignWeight.from_dense(torch.ones(2, 3).double())
    with pytest.raises(TypeError, match=r"negative must be bool \[rows, columns\]"):
        SignWeight.from_signs(torch.ones(2, 3))


def test_refuses_damaged_fields():
    bits = torch.zeros(2, 1, 1, dtype=torch.int64)
    for error, message, weight in (
        (TypeError, "bits must be int64", SignWeight(bits.int(), 3)),
        (ValueError, r"bits must be \[rows, taps, 2\] for 65 channels", SignWeight(bits, 65)),
        (ValueError, "bits past the last channel must be 0", SignWeight(bits + 8, 3)),
        (ValueError, "bits past the last channel must be 0", SignWeight(bits - 1, 63)),
        (TypeError, "channels must be an int", SignWeight(bits, 3.0)),
        (TypeError, "scale must be float32", SignWeight(bits, 3, torch.ones(2).double())),
        (ValueError, r"scale must be \[2\]", SignWeight(bits, 3, torch.ones(3))),
    ):
        with pytest.raises(error, match=message):
            weight.validate()


@pytest.mark.parametrize("channels", [1, 63, 64, 65, 128])
def test_rows_turn_round(channels):
    weight = SignWeight.from_dense(torch.where(torch.randn(5, 3 * channels) >= 0, 1.0, -1.0), 3)
    rows = torch.tensor([True, False, True, True, False])
    turned = weight.turned(rows)
    turned.validate()
    assert torch.equal(turned.to_dense(), torch.where(rows[:, None], -1.0, 1.0) * weight.to_dense())
