import pytest
import torch
from torch import nn
from torch.nn import functional

from tersetorch.methods import prune
from tersetorch.methods.prune import calibration
from tersetorch.methods.prune.calibration import call, evaluating, in_order_of_use, input_moments, layer_inputs
from tersetorch.methods.selection import select


def target_of(model, name=None):
    return select("f", model, name, None)[0]


def moments_of(vectors):
    """H of vectors [N, n]."""
    return 2 / len(vectors) * vectors.double().T @ vectors.double()


CONVOLUTIONS = [
    nn.Conv1d(4, 6, 3, padding=2, stride=2),
    nn.Conv2d(4, 6, 3),
    nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2, bias=False),
    nn.Conv2d(4, 4, 3, padding="same", groups=4),
    nn.Conv2d(4, 8, 4, padding="same", dilation=2),
    nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
    nn.Conv2d(4, 6, 3, padding=2, padding_mode="reflect"),
    nn.Conv3d(4, 6, (1, 2, 3), padding=(0, 1, 1), padding_mode="replicate", groups=2),
]


@pytest.mark.parametrize("by_position", [False, True])
@pytest.mark.parametrize("layer", CONVOLUTIONS, ids=repr)
def test_a_convolution_is_the_product_of_its_weight_with_its_patches(monkeypatch, layer, by_position):
    monkeypatch.setattr(calibration, "CHUNK", 600)
    torch.manual_seed(0)
    x = torch.randn(3, 4, *[9, 8, 7][: len(layer.kernel_size)])
    patches = torch.cat(list(layer_inputs(layer, x, by_position)), 1)
    weight = layer.weight.movedim(1, -1) if by_position else layer.weight
    products = patches @ weight.reshape(layer.groups, -1, patches.shape[2]).mT
    expected = layer(x) if layer.bias is None else layer(x) - layer.bias.view(-1, *[1] * (x.dim() - 2))
    # [groups, N * positions, outputs of a group] against [N, groups * outputs, positions].
    made = products.unflatten(1, (3, -1)).permute(1, 0, 3, 2).reshape(expected.shape)
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-5)
    alone = torch.cat(list(layer_inputs(layer, x[0], by_position)), 1)
    assert torch.equal(alone, patches[:, : alone.shape[1]])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_moments_of_a_linear_layer_with_any_leading_dimensions(dtype):
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    data = [torch.randn(6, 5), torch.randn(2, 3, 5), torch.randn(5)]
    moments = input_moments("f", model, target_of(model, "2"), data, dtype=dtype)
    inner = torch.cat([model[:2](x).detach().reshape(-1, 4) for x in data])
    assert moments.samples == 13 and moments.hessian.dtype == dtype
    torch.testing.assert_close(moments.hessian[0], moments_of(inner).to(dtype))
    wider = input_moments("f", model, target_of(model, "2"), data, bias=True)
    torch.testing.assert_close(wider.hessian[0], moments_of(functional.pad(inner, (0, 1), value=1)))


def test_moments_of_a_convolution_by_groups():
    layer = nn.Conv2d(4, 6, 3, groups=2, stride=2)
    x = torch.randn(5, 4, 7, 7)
    moments = input_moments("f", layer, target_of(layer), [x[:3], x[3:]])
    patches = functional.unfold(x, 3, stride=2).unflatten(1, (2, 18)).permute(1, 0, 3, 2).reshape(2, -1, 18)
    torch.testing.assert_close(moments.hessian, torch.stack([moments_of(each) for each in patches]))
    assert moments.samples == 5 * 9


def test_tied_layers_sum_their_inputs():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(self.first(self.first(x)))

    model, x = Twice(), torch.randn(6, 4)
    inner = model.first(x)
    vectors = torch.cat([x, inner, model.first(inner)]).detach()
    torch.testing.assert_close(input_moments("f", model, target_of(model), [x]).hessian[0], moments_of(vectors))


def test_a_pruned_layer_passes_on_what_it_computes_now():
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    prune.magnitude(model, 0.5, targets="0")
    x = torch.randn(7, 5)
    torch.testing.assert_close(
        input_moments("f", model, target_of(model, "1"), [x]).hessian[0], moments_of(model[0](x).detach())
    )


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (torch.ones(2), 1),
        ((torch.ones(2),), 1),
        ([torch.ones(2), "label"], 1),
        ((torch.ones(2), torch.ones(2), "label"), 2),
        ({"x": torch.ones(2), "y": torch.ones(2)}, 2),
    ],
)
def test_batches_of_every_form(batch, expected):
    class Sum(nn.Module):
        def forward(self, x, y=0):
            return x + y

    assert call(Sum(), batch)[0] == expected


def test_keyword_inputs_of_a_layer_count():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x):
            return self.fc(input=x)

    model, x = Named(), torch.randn(4, 3)
    torch.testing.assert_close(input_moments("f", model, target_of(model), [x]).hessian[0], moments_of(x))


def test_layers_come_in_the_order_of_use():
    class Reversed(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.unused, self.first = nn.Linear(3, 2), nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.last(self.first(x))

    model = Reversed()
    assert in_order_of_use(model, select("f", model, None, None), [torch.ones(1, 3)]) == [2, 0, 1]


def test_what_no_layer_multiplies_is_refused():
    model, images = nn.Sequential(nn.Linear(3, 3)), nn.Sequential(nn.Conv2d(3, 4, 3))
    for batch, came in ((None, "NoneType"), (torch.tensor(1.0), r"shape \(\)")):
        with pytest.raises(ValueError, match=rf"f: data must give the layer .* tensors, got {came}"):
            input_moments("f", model, target_of(model), [batch])
    with pytest.raises(ValueError, match=r"f: data must .* tensors of 3 or 4 dimensions, got shape \(4, 3\)"):
        input_moments("f", images, target_of(images), [torch.ones(4, 3)])


def test_modes_random_numbers_and_hooks_are_put_back():
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.BatchNorm1d(3))
    model[2].eval()
    modes = [module.training for module in model.modules()]
    statistics, state = model[2].running_mean.clone(), torch.get_rng_state()
    with evaluating(model):
        torch.rand(3)
        assert not any(module.training for module in model.modules())
    with pytest.raises(ZeroDivisionError), evaluating(model):
        _ = 1 / 0
    input_moments("f", model, target_of(model), [torch.randn(4, 3, generator=torch.Generator().manual_seed(0))])
    with pytest.raises(ValueError, match=r"f: data must give the layer .* inputs of 3 weights each, got 5"):
        input_moments("f", model, target_of(model), [torch.ones(4, 5)])
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(model[2].running_mean, statistics)
    assert not any(module._forward_pre_hooks for module in model.modules())
