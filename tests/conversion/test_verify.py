import math

import pytest
import torch
from torch import nn

from tersetorch.conversion.verify import compare, output_difference, rounding_bound


class Shifted(nn.Module):
    def __init__(self, layer, shift):
        super().__init__()
        self.layer, self.shift = layer, shift

    def forward(self, x):
        return self.layer(x) + self.shift


@pytest.fixture
def layer(sparse_linear):
    return sparse_linear(50, 20, density=0.5)


@pytest.mark.parametrize("shape", [(50,), (7, 50), (2, 3, 50)])
def test_bound_is_the_formula(layer, shape, generator):
    x = torch.randn(shape, generator=generator)
    y = layer(x)
    magnitude = x.double().abs() @ layer.weight.double().abs().t() + layer.bias.double().abs()
    eps = torch.finfo(torch.float32).eps
    expected = 8 * math.sqrt(51) * eps * magnitude + 2 * eps * y.double().abs()
    torch.testing.assert_close(rounding_bound(layer, x, y).double(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inputs", [1, 17, 4099])
def test_another_order_of_summation_is_within_the_bound(sparse_linear, inputs, dtype, generator):
    layer = sparse_linear(inputs, 20, density=1).to(dtype)

    class Backwards(nn.Module):
        def forward(self, x):
            y = x.float().flip(-1) @ layer.weight.float().flip(-1).t() + layer.bias.float()
            return y.to(x.dtype)

    x = torch.randn(9, inputs, generator=generator).to(dtype)
    assert compare(layer, Backwards(), x, None).refusal is None


def test_a_wrong_result_is_refused(layer, generator):
    x = torch.randn(9, 50, generator=generator)
    largest, refusal = compare(layer, Shifted(layer, 1e-3), x, None)
    assert largest == pytest.approx(1e-3, rel=1e-2)
    assert "more than the allowed error" in refusal


@pytest.mark.parametrize(("shift", "allowed"), [(0.0, True), (0.009, True), (0.011, False)])
def test_max_error_is_a_share_of_the_largest_output(layer, shift, allowed, generator):
    x = torch.randn(9, 50, generator=generator)
    largest = float(layer(x).detach().abs().max())
    assert (compare(layer, Shifted(layer, shift * largest), x, 0.01).refusal is None) is allowed


def test_max_error_zero_wants_the_same_bits(layer, generator):
    x = torch.randn(9, 50, generator=generator)
    assert compare(layer, layer, x, 0.0).refusal is None
    assert compare(layer, Shifted(layer, 1e-6), x, 0.0).refusal is not None


def test_other_shapes_and_dtypes_are_refused(layer, generator):
    x = torch.randn(9, 50, generator=generator)
    assert "returns torch.float32 (9, 50)" in compare(layer, nn.Identity(), x, None).refusal


def test_nan_and_infinity_must_agree(layer, generator):
    x = torch.randn(9, 50, generator=generator)
    x[0, 0] = math.inf

    class Finite(nn.Module):
        def forward(self, x):
            return layer(x).nan_to_num()

    assert compare(layer, layer, x, None).refusal is None
    assert "holds NaN or infinity" in compare(layer, Finite(), x, None).refusal
    x[:] = math.nan
    assert compare(layer, layer, x, None) == (0.0, None)


def test_output_difference_walks_nested_outputs():
    a = {"logits": torch.tensor([1.0, math.nan, math.inf]), "state": (torch.tensor(2.0), "text", torch.tensor(1))}
    b = {"logits": torch.tensor([1.5, math.nan, math.inf]), "state": (torch.tensor(1.0), "text", torch.tensor(7))}
    assert output_difference(a, a) == 0
    assert output_difference(a, b) == 1


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ("text", "text", None),
        (torch.zeros(2), torch.zeros(3), None),
        (torch.zeros(0), torch.zeros(0), 0),
        (torch.zeros(1), torch.tensor([math.nan]), math.inf),
    ],
)
def test_output_difference_at_the_edges(a, b, expected):
    assert output_difference(a, b) == expected
