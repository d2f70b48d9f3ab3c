"""binary_connect: the weights that a pass sees, the updates below them, resuming, copying, baking, and bad input."""

import copy

import pytest
import torch
from torch import nn

import tersetorch as tt
from tersetorch.methods.binarize import binary_connect


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 5))


def batch():
    torch.manual_seed(1)
    return torch.randn(6, 2, 6, 6), torch.randint(5, (6,))


def train(model, handle, optimizer, steps=3):
    x, y = batch()
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        handle.step()


def test_passes_see_signs_and_real_values_train():
    model = network()
    real = model[3].weight.detach().clone()
    handle = binary_connect(model, glorot=False)
    assert handle.names == ["0", "3"]
    assert torch.equal(model[3].weight, torch.where(real >= 0, 1.0, -1.0))
    x, y = batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    nn.functional.cross_entropy(model(x), y).backward()
    original = model[3].parametrizations.weight.original
    gradient = original.grad.clone()
    optimizer.step()
    handle.step()
    assert torch.equal(original, (real - 0.5 * gradient).clamp(-1, 1)) and original.abs().max() <= 1
    # The gradient is that at the signs.
    plain = network()
    with torch.no_grad():
        for i in (0, 3):
            plain[i].weight.copy_(torch.where(plain[i].weight >= 0, 1.0, -1.0))
    nn.functional.cross_entropy(plain(x), y).backward()
    assert torch.equal(plain[3].weight.grad, gradient)


def test_glorot_factors_enlarge_changes():
    model = network()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    handle = binary_connect(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1e-3)
    handle.step()
    conv, linear = (model[i].parametrizations.weight.original for i in (0, 3))
    factor = (53 / 1.5) ** 0.5
    assert torch.allclose(linear, (before["3.weight"] + 1e-3 * factor).clamp(-1, 1), atol=1e-6)
    factor = (5 * 9 / 1.5) ** 0.5
    assert torch.allclose(conv, (before["0.weight"] + 1e-3 * factor).clamp(-1, 1), atol=1e-6)
    assert torch.allclose(model[3].bias, before["3.bias"] + 1e-3)
    again = linear.detach().clone()
    handle.step()
    assert torch.equal(linear, again)


def test_stochastic_signs_differ_in_training_and_real_values_serve():
    model = network()
    real = model[3].weight.detach().clone()
    binary_connect(model, stochastic=True)
    torch.manual_seed(0)
    first, second = model[3].weight, model[3].weight
    assert set(first.unique().tolist()) == {-1.0, 1.0} and not torch.equal(first, second)
    assert torch.equal(model.eval()[3].weight, real)


def test_a_row_scale_and_its_gradient():
    model = nn.Linear(6, 3)
    real = model.weight.detach().clone()
    binary_connect(model, scale="row")
    mean = real.abs().mean(1, keepdim=True)
    assert torch.allclose(model.weight, torch.where(real >= 0, 1.0, -1.0) * mean)
    upstream = torch.randn(3, 6)
    model.weight.backward(upstream)
    assert torch.allclose(model.parametrizations.weight.original.grad, upstream * (1 / 6 + mean))


@pytest.mark.parametrize("scale", ["none", "row"])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_weights_without_rows_or_columns_are_steps_like_any(scale):
    # torch runs no convolution to no channels, but holds one.
    for layer in (nn.Linear(4, 0), nn.Linear(0, 4), nn.Conv2d(3, 0, 3)):
        model = nn.Sequential(layer)
        handle = binary_connect(model, scale=scale)
        layer.weight.sum().backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        handle.step()
        original = layer.parametrizations.weight.original
        assert handle.names == ["0"] and original.grad.shape == original.shape


def test_resumes_from_a_state_dict():
    def start():
        model = network()
        return model, binary_connect(model), None

    model, handle, _ = start()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    train(model, handle, optimizer)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, handle, optimizer)
    resumed, again, _ = start()
    resumed.load_state_dict(saved[0])
    again.reset()
    other = torch.optim.Adam(resumed.parameters(), lr=1e-2)
    other.load_state_dict(saved[1])
    train(resumed, again, other)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_goes_on_with_parameters_that_a_checkpoint_puts_in_place():
    saved = network(1)
    binary_connect(saved)
    model = network()
    handle = binary_connect(model)
    model.load_state_dict(saved.state_dict(), assign=True)
    handle.reset()
    linear = model[3].parametrizations.weight.original
    with torch.no_grad():
        want = (linear + 1e-3 * (53 / 1.5) ** 0.5).clamp(-1, 1)
        linear.add_(1e-3)
    handle.step()
    assert torch.allclose(linear, want, atol=1e-6)
    linear.data.add_(5)
    handle.step()
    assert linear.abs().max() <= 1


def test_a_deep_copy_goes_on_by_itself():
    model = network()
    handle = binary_connect(model)
    twin, twin_handle = copy.deepcopy((model, handle))
    before = copy.deepcopy(model.state_dict())
    train(twin, twin_handle, torch.optim.Adam(twin.parameters(), lr=1e-2))
    tt.finalize(twin)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    x, _ = batch()
    assert torch.equal(model[3].weight.abs(), torch.ones(5, 48)) and model(x).isfinite().all()


@pytest.mark.parametrize("options", [{}, {"stochastic": True}, {"scale": "row"}])
def test_finalize_bakes_what_evaluation_computes(options):
    model = network()
    parameters = [model[0].weight, model[3].weight]
    handle = binary_connect(model, **options)
    train(model, handle, torch.optim.Adam(model.parameters(), lr=1e-2))
    x, _ = batch()
    want = model.eval()(x)
    tt.finalize(model)
    assert torch.equal(model(x), want)
    assert model[0].weight is parameters[0] and model[3].weight is parameters[1]
    assert list(model.state_dict()) == list(network().state_dict())


def test_compiles():
    model = network()
    binary_connect(model)
    x, _ = batch()
    assert torch.allclose(torch.compile(model, fullgraph=True)(x), model(x), atol=1e-5)


def test_refuses():
    model = network()
    for error, message, options in (
        (TypeError, "stochastic must be True or False", {"stochastic": "yes"}),
        (ValueError, "scale must be one of none, row", {"scale": "column"}),
        (ValueError, "scale must be 'none' for stochastic signs", {"scale": "row", "stochastic": True}),
        (ValueError, "targets must match weights", {"targets": "fc9"}),
    ):
        with pytest.raises(error, match=message):
            binary_connect(model, **options)
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module"):
        binary_connect([])
    binary_connect(model)
    with pytest.raises(ValueError, match="must have no other parametrization, got BinaryWeight"):
        binary_connect(model)
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match="must not be tied"):
        binary_connect(tied)
    pruned = network()
    tt.prune.magnitude(pruned, sparsity=0.5)
    with pytest.raises(ValueError, match=r"must not be pruned or shared, got one that is; call tt\.finalize"):
        binary_connect(pruned)
