"""fixed_point: what is on the grid, replay, resuming, copies, the switch, baking, and bad input."""

import copy

import pytest
import torch
from torch import nn

import tersetorch as tt
from tersetorch.formats import FixedFormat
from tersetorch.methods.quantize import fixed_point, switch_fixed_point
from tersetorch.methods.quantize.fixed_point import FixedActivations, FixedWeight
from tersetorch.methods.quantize.fixed_rounding import Rounding
from tersetorch.ops import fixed_round


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 5))


def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, 2, 6, 6, generator=generator), torch.randint(5, (6,), generator=generator)


def train(model, optimizer, steps=3):
    x, y = batch()
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y, reduction="sum").backward()
        optimizer.step()


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def on_grid(tensor, fraction_bits=14):
    return torch.equal(tensor, tensor.mul(2**fraction_bits).round().div(2**fraction_bits))


def same(model, other):
    state, of_other = model.state_dict(), other.state_dict()
    return state.keys() == of_other.keys() and all(torch.equal(state[key], of_other[key]) for key in state)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_everything_is_on_the_grid(rounding):
    model = network()
    optimizer = sgd(model)  # built before
    parameter = model[3].weight
    assert fixed_point(model, "<2,14>", rounding=rounding, activations="<6,10>", gradients="<3,13>") is model
    assert model[3].parametrizations.weight.original is parameter
    seen = {}
    model[3].register_forward_hook(lambda module, args, output: seen.update(x=args[0], y=output))
    train(model, optimizer)
    for name in ("0.weight", "0.bias", "3.weight", "3.bias"):
        layer, tensor = name.split(".")
        original = getattr(model[int(layer)].parametrizations, tensor).original
        assert on_grid(original) and torch.equal(getattr(model[int(layer)], tensor), original), name
        assert on_grid(original.grad, 13) and original.grad.abs().max() > 0, name
    assert on_grid(seen["x"], 10) and on_grid(seen["y"], 10)


def test_updates_and_gradients_are_rounded_as_said():
    model = nn.Linear(8, 4)
    with torch.no_grad():
        model.weight.copy_(fixed_round(model.weight, 2, 8))
        model.bias.copy_(fixed_round(model.bias, 2, 8))
    plain = copy.deepcopy(model)
    fixed_point(model, "<2,8>", activations="float", gradients="float", seed=3)
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    for net in (model, plain):
        net(x).square().sum().backward()
        torch.optim.SGD(net.parameters(), lr=1e-3).step()
    original = model.parametrizations.weight.original
    assert torch.equal(original.grad, plain.weight.grad)
    assert torch.equal(original, fixed_round(plain.weight.detach(), 2, 8, "stochastic", seed=3 << 23))
    assert not torch.equal(original, fixed_round(plain.weight.detach(), 2, 8))


def test_small_updates_get_lost_to_the_nearest_and_not_at_random():
    left = {}
    for rounding in ("nearest", "stochastic"):
        model = nn.Linear(100, 10, bias=False)
        nn.init.zeros_(model.weight)
        fixed_point(model, "<2,6>", rounding=rounding, activations="float", gradients="float")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
        for _ in range(200):
            optimizer.zero_grad()
            model.weight.sum().backward()
            optimizer.step()
        left[rounding] = float(model.weight.detach().mean())
    assert left["nearest"] == 0 and abs(left["stochastic"] + 0.2) < 0.01


def test_the_same_seed_gives_the_same_bits():
    runs = []
    for seed in (5, 5, 6):
        model = fixed_point(network(), "<4,12>", seed=seed)
        train(model, sgd(model))
        runs.append(model)
    assert same(runs[0], runs[1]) and not same(runs[0], runs[2])


def test_resumes_to_the_same_bits():
    model = fixed_point(network(), "<4,12>", seed=5)
    optimizer = sgd(model)
    train(model, optimizer, 2)
    switch_fixed_point(model, "<4,16>", rounding="nearest", activations="<6,10>")
    train(model, optimizer, 1)
    state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    resumed = fixed_point(network(3), "<2,14>", seed=1)
    of_resumed = sgd(resumed)
    resumed.load_state_dict(state[0])
    of_resumed.load_state_dict(state[1])
    train(model, optimizer, 2)
    train(resumed, of_resumed, 2)
    assert same(model, resumed)


def test_a_copy_goes_on_by_itself():
    model = fixed_point(network(), "<4,12>")
    train(model, sgd(model), 1)
    other = copy.deepcopy(model)
    before = copy.deepcopy(model.state_dict())
    train(other, sgd(other), 2)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    train(model, sgd(model), 2)
    assert same(model, other) and on_grid(other[3].parametrizations.weight.original, 12)


def test_the_switch_keeps_weights_and_the_optimizer():
    model = fixed_point(network(), "<2,14>")
    optimizer = sgd(model)
    train(model, optimizer, 1)
    before = model[3].weight.detach().clone()
    assert switch_fixed_point(model, "<4,16>") is model
    assert torch.equal(model[3].weight, before)
    train(model, optimizer, 2)
    assert on_grid(model[3].weight, 16) and not on_grid(model[3].weight, 14)
    formats = {str(m.values.format) for m in model.modules() if isinstance(m, FixedWeight)}
    assert formats == {"<4,16>"}
    switch_fixed_point(model, "<2,4>", activations="<6,4>")
    assert on_grid(model[3].parametrizations.weight.original, 4)


def test_evaluation_repeats_and_compiles():
    model = fixed_point(network(), "<4,12>").eval()
    x, _ = batch()
    state = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        y = model(x)
        assert torch.equal(model(x), y) and on_grid(y, 12)
        torch.testing.assert_close(torch.compile(model)(x), y, atol=2**-12, rtol=0)
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def test_training_compiles_around_the_rounding():
    x, y = batch()
    runs = []
    for compiled in (False, True):
        model = fixed_point(network(), "<4,12>", seed=5)
        optimizer = sgd(model)
        run = torch.compile(model, backend="eager") if compiled else model
        for step in range(5):
            with torch._dynamo.config.patch(error_on_recompile=step > 1):
                optimizer.zero_grad()
                nn.functional.cross_entropy(run(x), y).backward()
                optimizer.step()
        runs.append(model)
    assert same(*runs)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="fixed_point counts the random bits of training in Python"):
        torch.compile(model, backend="eager", fullgraph=True)(x)
    with torch.no_grad():
        torch.compile(model.eval(), backend="eager", fullgraph=True)(x)


def test_channels_last_stays_so():
    model = fixed_point(network(), "<4,12>").to(memory_format=torch.channels_last)
    seen = {}
    model[0].register_forward_hook(lambda module, args, output: seen.update(y=output))
    x = batch()[0].to(memory_format=torch.channels_last).requires_grad_()
    model(x).sum().backward()
    for tensor in (seen["y"], x.grad):
        assert tensor.is_contiguous(memory_format=torch.channels_last) and on_grid(tensor, 12)
    plain = copy.deepcopy(model).to(memory_format=torch.contiguous_format).eval()
    torch.testing.assert_close(model.eval()(x), plain(x.contiguous()), atol=2**-12, rtol=0)


def test_what_something_else_wrote_is_rounded():
    model = fixed_point(network(), "<2,6>")
    train(model, sgd(model), 1)
    original = model[3].parametrizations.weight.original
    assert torch.equal(model[3].weight, original)
    with torch.no_grad():
        original.add_(0.3)
    assert not on_grid(original, 6) and on_grid(model[3].weight, 6)
    train(model, sgd(model), 1)
    original.data.add_(0.3)
    assert on_grid(model.eval()[3].weight, 6) and not on_grid(original, 6)


def test_large_tensors_are_rounded_in_place_as_they_are_at_once():
    x = torch.randn(300, 1000, generator=torch.Generator().manual_seed(0))
    for tensor in (x, x.t(), x.view(300, 10, 10, 10).to(memory_format=torch.channels_last), x[:, ::2]):
        at_once, in_place = (Rounding(FixedFormat(2, 6), True, 7) for _ in range(2))
        wanted, rounded = at_once(tensor), tensor.clone()
        in_place.round_(rounded)
        assert torch.equal(rounded, wanted) and at_once.offset == in_place.offset


def test_finalize_leaves_the_weights_plain():
    model = fixed_point(network(), "<2,14>", activations="<6,10>")
    names = list(dict(network().named_parameters()))
    original = model[3].parametrizations.weight.original
    train(model, sgd(model), 1)
    weight = model[3].weight.detach().clone()
    other = copy.deepcopy(model)
    tt.finalize(model)
    assert model[3].weight is original and torch.equal(original, weight) and type(model[3]) is nn.Linear
    assert list(dict(model.named_parameters())) == names
    assert not any(isinstance(m, FixedActivations) for m in model.modules())
    assert not model[3]._forward_hooks and not model[3]._forward_pre_hooks
    assert list(model.state_dict()) == list(network().state_dict())
    x, _ = batch()
    plain = network()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model(x), plain(x))
    train(other, sgd(other), 1)
    optimizer = sgd(model)
    train(model, optimizer, 1)
    assert not on_grid(model[3].weight.detach())


def test_gradients_are_zero_outside_the_range():
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(0.5)
    fixed_point(model, "<2,6>", activations="<2,6>", gradients="<6,6>")
    x = torch.tensor([[1.0], [3.0]], requires_grad=True)
    model(x).sum().backward()
    assert x.grad.tolist() == [[0.5], [0.0]]  # 3 saturates
    assert model.parametrizations.weight.original.grad.item() == 1 + 2 - 2**-6


def test_learns():
    torch.manual_seed(0)
    centres = torch.randn(4, 16)
    labels = torch.arange(256) % 4
    x = centres[labels] + 0.3 * torch.randn(256, 16)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    fixed_point(model, "<4,12>", gradients="<8,12>")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels, reduction="sum").backward()
        optimizer.step()
    assert float((model.eval()(x).argmax(1) == labels).float().mean()) > 0.95


def test_formats():
    f = FixedFormat(2, 14)
    assert (str(f), f.bits, f.step, f.low, f.high) == ("<2,14>", 16, 2**-14, -2.0, 2 - 2**-14)


def test_refuses():
    model = network()
    before = copy.deepcopy(model.state_dict())
    for bad, sentence in (
        ("<0,8>", r"format: a format must be <IL,FL> with IL of at least 1, for the sign.*got <0,8>"),
        ("2.14", "must be a format such as '<2,14>', got '2.14'"),
        ("<20,20>", "2 to 24 bits together"),
    ):
        with pytest.raises(ValueError, match=sentence):
            fixed_point(model, bad)
    with pytest.raises(TypeError, match="format must be a format such as"):
        fixed_point(model, 16)
    with pytest.raises(ValueError, match="gradients: a format must be"):
        fixed_point(model, "<2,14>", gradients="<0,8>")
    with pytest.raises(ValueError, match="rounding must be one of nearest, stochastic, got 'up'"):
        fixed_point(model, "<2,14>", rounding="up")
    with pytest.raises(ValueError, match="seed must be from 0"):
        fixed_point(model, "<2,14>", seed=-1)
    with pytest.raises(ValueError, match="model must be in fixed point, got one that is not"):
        switch_fixed_point(model, "<2,14>")
    with pytest.raises(ValueError, match="must be float32, got"):
        fixed_point(network().double(), "<2,14>")
    with pytest.raises(ValueError, match="must be that of a Linear or Conv layer, got Embedding"):
        fixed_point(nn.Embedding(4, 3), "<2,14>", targets=nn.Embedding)
    for bias, sentence in (
        (torch.zeros(4, dtype=torch.float64), "must have a float32 bias beside it, got torch.float64"),
        (torch.full((4,), float("nan")), "must have a finite bias beside it"),
    ):
        odd = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        odd[1].bias = nn.Parameter(bias)
        with pytest.raises(ValueError, match=sentence):
            fixed_point(odd, "<2,14>")
        assert type(odd[0]) is nn.Linear
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match="must not be tied to another layer, got one of 2"):
        fixed_point(tied, "<2,14>")
    with pytest.raises(ValueError, match="must not be pruned or shared"):
        fixed_point(tt.prune.magnitude(network(), sparsity=0.5), "<2,14>")
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    fixed_point(model, "<2,14>")
    with pytest.raises(ValueError, match="model must not be in fixed point yet"):
        fixed_point(model, "<2,14>")
    with pytest.raises(TypeError, match="a layer's input must be float32 or bfloat16"):
        model[3](torch.zeros(2, 48, dtype=torch.float64))
    with pytest.raises(ValueError, match="a state must be int64"):
        model[3].fixed_point.set_extra_state("nothing")
    with pytest.raises(ValueError, match="a state must have a format for the weight, got zeros"):
        model[3].parametrizations.weight[0].set_extra_state(torch.zeros(2, 5, dtype=torch.int64))
