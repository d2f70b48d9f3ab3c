"""fixed_formats: what it chooses, and the import of a float model by it."""

import pytest
import torch
from torch import nn

import tersetorch as tt
from tersetorch.formats.fixed_format import noted_formats
from tersetorch.methods.quantize import fixed_formats
from tersetorch.nn import FixedPointConv2d, FixedPointLinear


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.Flatten(), nn.Linear(288, 5)
    )


def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 3, 8, 8, generator=generator) for _ in range(3)]


def test_the_finest_format_that_holds_all():
    layer = nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.3, 1.5, -0.2], [0.1, 0.1, 0.1]]))
    found = fixed_formats(layer, [torch.tensor([[5.0, 0.0, 1.0]]), torch.tensor([[-8.0, 0.0, 1.0]])], 8, choose="max")
    (formats,) = found.values()
    assert [str(f) for f in (formats.weight, formats.input, formats.output)] == ["<2,6>", "<4,4>", "<3,5>"]
    assert noted_formats(layer) == formats


def test_the_least_error_gives_outliers_up():
    layer = nn.Linear(1000, 1)
    x = torch.rand(50, 1000, generator=torch.Generator().manual_seed(0))
    x[0, 0] = 4.5
    (largest,), (least,) = (fixed_formats(layer, [x], 8, choose=how).values() for how in ("max", "mse"))
    assert (str(largest.input), str(least.input)) == ("<4,4>", "<3,5>")


def test_large_images_are_looked_at_all_over():
    # Every 28th pixel of so many images is the first of its row.
    images = torch.zeros(2340, 1, 28, 28)
    images[..., 1:] = 2.5
    (formats,) = fixed_formats(nn.Conv2d(1, 1, 1), [images], 8).values()
    assert str(formats.input) == "<3,5>"


def test_a_layer_that_computes_zeros_is_imported_and_one_without_calls_is_not():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2, bias=False))
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.zero_()
    assert list(fixed_formats(model, [torch.ones(2, 3)])) == ["0", "1"]
    assert fixed_formats(model, [torch.ones(0, 3)]) == {}


def test_a_float_model_is_imported():
    model, data = network().eval(), batches()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for bits, error in ((16, 1e-3), (8, 0.1)):
        found = fixed_formats(model, data, bits, output_bits=16)
        assert list(found) == ["0", "2", "4"] and all(f.weight.bits == bits for f in found.values())
        fixed = tt.convert(model, data[0], plan="fixed")
        assert [type(layer) for layer in fixed][::2] == [FixedPointConv2d, FixedPointConv2d, FixedPointLinear]
        with torch.no_grad():
            y = model(data[1])
            assert (fixed(data[1]) - y).abs().max() < error * y.abs().max()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    only = tt.convert(model, data[0], plan={"4": "fixed_linear"})
    assert type(only[4]) is FixedPointLinear and type(only[0]) is nn.Conv2d


def test_a_model_trained_in_fixed_point_is_converted_to_what_it_computes():
    model, data = network(), batches()
    tt.quantize.fixed_point(model, "<2,12>", activations="<6,10>")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for x in data:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    model.eval()
    fixed = tt.convert(model, data[0], plan="fixed")
    with torch.no_grad():
        # Float sums may round across a half step, once in a while.
        y, want = fixed(data[1]), model(data[1])
        assert (y - want).abs().max() <= 4 * 2**-10 and (y == want).float().mean() > 0.9


def test_refuses():
    model = network()
    with pytest.raises(ValueError, match="bits must be from 2 to 16, got 17"):
        fixed_formats(model, batches(), 17)
    with pytest.raises(ValueError, match="choose must be one of mse, max"):
        fixed_formats(model, batches(), choose="best")
    with pytest.raises(ValueError, match="data must hold at least one batch"):
        fixed_formats(model, [])
    with pytest.raises(ValueError, match="values must be finite, got NaN"):
        fixed_formats(model, [torch.full((1, 3, 8, 8), float("nan"))])
    with pytest.raises(TypeError, match="data must be an iterable of batches"):
        fixed_formats(model, batches()[0])
    with pytest.raises(TypeError, match="the input of 'weight' must be a tensor given by position"):
        fixed_formats(nn.Linear(2, 2), [{"input": torch.ones(1, 2)}])
    assert noted_formats(model[0]) is None
    assert not model[0]._forward_hooks
