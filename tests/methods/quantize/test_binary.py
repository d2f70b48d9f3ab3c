import pytest
import torch

from tersetorch.methods.quantize import binary


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_signs_with_the_scale_of_least_error(dtype):
    weight = torch.randn(6, 3, 2, 2, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[0, 0, 0, 0] = 0
    signs = binary(weight, "none")
    assert signs.dtype == dtype and set(signs.unique().tolist()) == {-1.0, 1.0}
    assert signs[0, 0, 0, 0] == 1 and torch.equal(signs[weight != 0], weight[weight != 0].sign())
    for scale, dims in (("tensor", (0, 1, 2, 3)), ("row", (1, 2, 3))):
        found = binary(weight, scale)
        best = (weight * signs).double().sum(dims, keepdim=True) / signs.double().square().sum(dims, keepdim=True)
        torch.testing.assert_close(
            found.double(), signs.double() * best, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=0
        )
    assert torch.equal(binary(weight), binary(weight, "tensor"))


@pytest.mark.parametrize(
    ("weight", "scale", "error", "message"),
    [
        (torch.ones(2, 2), "column", ValueError, "scale must be one of none, tensor, row, got 'column'"),
        (torch.ones(2), "row", ValueError, "weight must have two or more dimensions, got 1"),
        (torch.ones(2, 2).int(), "row", TypeError, "weight must be a floating-point tensor, got torch.int32"),
        ([[1.0]], "row", TypeError, "weight must be a floating-point tensor, got list"),
        (torch.full((2, 2), float("inf")), "row", ValueError, "weight must be finite, got NaN or infinity"),
    ],
)
def test_bad_arguments_are_refused(weight, scale, error, message):
    with pytest.raises(error, match=f"quantize.binary: {message}"):
        binary(weight, scale)
