import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from tersetorch.methods import finalize, prune, quantize
from tersetorch.methods.parametrization import is_live


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def silence(layer, outputs=(), inputs=()):
    """Zeroes the weights of some outputs and some inputs; biases stay as they are."""
    with torch.no_grad():
        for index in outputs:
            layer.weight[index] = 0
        for index in inputs:
            layer.weight[:, index] = 0


def shapes(model):
    return [tuple(each.weight.shape) for each in model.modules() if isinstance(each, nn.Linear | nn.Conv1d | nn.Conv2d)]


def outputs_stay(model, *inputs, tolerance=1e-5):
    """Removes dead neurons of a copy; the copy, which gives the same as model on these inputs and does not train."""
    small = copy.deepcopy(model)
    assert prune.remove_dead_neurons(small, tuple(each[:2] for each in inputs)) is small
    with torch.no_grad():
        expected, found = copy.deepcopy(model).eval()(*inputs), copy.deepcopy(small).eval()(*inputs)
    assert torch.allclose(expected, found, atol=tolerance, rtol=tolerance)
    return small


def test_what_nothing_enters_and_what_nothing_leaves_go():
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3))
    silence(model[0], outputs=(1, 4))
    silence(model[3], inputs=(4, 7))
    small = outputs_stay(model, torch.randn(9, 6))
    assert shapes(small) == [(5, 6), (5, 5), (3, 5)]
    assert (small[0].out_features, small[3].in_features, len(small[0].bias)) == (5, 5, 5)
    assert torch.equal(small[0].weight, model[0].weight[[0, 2, 3, 5, 6]])
    assert small.training and model.training


def test_it_goes_on_until_none_is_left():
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    silence(model[3], inputs=(0, 1))
    with torch.no_grad():  # each of these is read only by the one behind it
        for index in (1, 2):
            model[index].weight.copy_(torch.eye(4))
    small = outputs_stay(model, torch.randn(5, 4))
    assert shapes(small) == [(2, 4), (2, 2), (2, 2), (4, 2)]


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(2, 6, 3)
        self.conv2 = nn.Conv2d(6, 7, 3, stride=2, bias=True)
        self.fc1 = nn.Linear(7 * 4, 9)
        self.fc2 = nn.Linear(9, 4)

    def forward(self, x):
        x = functional.max_pool2d(functional.relu(self.conv1(x)), 2)
        x = functional.leaky_relu(self.conv2(x), 0.1)
        x = x.view(x.shape[0], -1) if self.flat == "shape" else torch.flatten(x, 1)
        x = functional.dropout(self.fc1(x).relu(), 0.3, training=self.training)
        return self.fc2(x)


@pytest.mark.parametrize("flat", ["shape", "flatten"])
def test_functions_between_the_layers(flat):
    Functional.flat = flat
    model = Functional()
    silence(model.conv1, outputs=(0, 5))
    silence(model.conv2, outputs=(3,), inputs=(2,))
    silence(model.fc1, inputs=range(4, 8), outputs=(8,))  # channel 1 of conv2
    silence(model.fc1, inputs=range(20, 23))  # only a part of channel 5
    small = outputs_stay(model, torch.randn(5, 2, 12, 12))
    assert shapes(small) == [(3, 2, 3, 3), (5, 3, 3, 3), (8, 20), (4, 8)]
    assert (small.conv1.out_channels, small.conv2.in_channels) == (3, 3)


@pytest.mark.parametrize("mode", ["zeros", "circular", "replicate"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_constant_that_a_padded_or_biasless_layer_reads(mode, bias):
    model = nn.Sequential(
        nn.Conv2d(2, 4, 1),
        nn.ReLU(),
        nn.Conv2d(4, 3, 3, padding=1, padding_mode=mode, bias=bias),
        nn.Flatten(),
        nn.Linear(75, 2),
    )
    silence(model[0], outputs=(0, 1))
    with torch.no_grad():
        model[0].bias[:2] = torch.tensor([-1.0, 1.0])  # behind the ReLU: nothing, and 1
    small = outputs_stay(model, torch.randn(4, 2, 5, 5))
    assert shapes(small)[0][0] == (2 if mode != "zeros" and bias else 3)


def test_batch_norm_between_the_layers():
    model = nn.Sequential(
        nn.Conv1d(3, 6, 3, bias=False), nn.BatchNorm1d(6), nn.ReLU(), nn.Conv1d(6, 4, 1),
        nn.BatchNorm1d(4, affine=False), nn.Flatten(), nn.BatchNorm1d(4 * 6),
        nn.Linear(24, 5), nn.BatchNorm1d(5), nn.Hardtanh(), nn.Linear(5, 2),
    )  # fmt: skip
    for _ in range(5):
        model(torch.randn(16, 3, 8) + 0.3)
    silence(model[0], outputs=(0, 2))
    silence(model[3], outputs=(1,), inputs=(5,))
    silence(model[7], outputs=(4,), inputs=range(12, 18))
    small = outputs_stay(model.eval(), torch.randn(7, 3, 8))
    assert shapes(small) == [(3, 3, 3), (2, 3, 1), (4, 12), (2, 4)]
    assert [small[index].num_features for index in (1, 4, 6, 8)] == [3, 2, 12, 4]
    assert not small.training
    small.train()(torch.randn(7, 3, 8)).sum().backward()


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.inner = nn.Conv2d(6, 6, 3, padding=1)
        self.outer = nn.Conv2d(6, 6, 3, padding=1)
        self.side = nn.Conv2d(6, 4, 1)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        y = x + self.outer(torch.relu(self.inner(x)))
        return self.head(y.mean((2, 3))), self.side(y)


def test_what_is_added_or_returned_keeps_its_size():
    model = Residual()
    for each in (model.stem, model.inner, model.outer, model.side):
        silence(each, outputs=(1, 2))
    with torch.no_grad():
        for each in (model.stem, model.inner, model.outer):
            each.bias.zero_()
    small = prune.remove_dead_neurons(copy.deepcopy(model), torch.randn(1, 3, 6, 6))
    assert shapes(small) == [(6, 3, 3, 3), (4, 6, 3, 3), (6, 4, 3, 3), (4, 6, 1, 1), (3, 6)]
    x = torch.randn(4, 3, 6, 6)
    for expected, found in zip(model(x), small(x), strict=True):
        assert torch.allclose(expected, found, atol=1e-5)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.left, self.right = nn.Linear(4, 6), nn.Linear(6, 2), nn.Linear(6, 3)

    def forward(self, x):
        hidden = torch.sigmoid(self.body(x))
        return torch.cat([self.left(hidden), self.right(hidden)], -1)


def test_a_neuron_that_one_of_two_readers_needs_stays():
    model = Two()
    silence(model.left, inputs=(0, 1, 2))
    silence(model.right, inputs=(1, 2, 3))
    silence(model.body, outputs=(5,))
    small = outputs_stay(model, torch.randn(5, 3, 4))
    assert shapes(small) == [(3, 4), (2, 3), (3, 3)]


def test_one_neuron_stays_in_a_dead_layer():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    silence(model[0], outputs=range(6))
    small = outputs_stay(model, torch.randn(5, 4))
    assert shapes(small) == [(1, 4), (2, 1)]


@pytest.mark.parametrize("shared", [False, True])
def test_a_live_model_shrinks_and_trains_on(shared):
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 10), nn.ReLU(), nn.Linear(10, 4))
    prune.magnitude(model, 0.93)
    if shared:
        quantize.kmeans(model, 3)
    small = outputs_stay(model, torch.randn(9, 20))
    assert shapes(small) != shapes(model) and is_live(small)
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1, momentum=0.9)
    zeros = [int((layer.weight == 0).sum()) for layer in small if isinstance(layer, nn.Linear)]
    for _ in range(2):
        optimizer.zero_grad()
        small(torch.randn(8, 20)).square().sum().backward()
        optimizer.step()
    finalize(small)
    assert [int((layer.weight == 0).sum()) for layer in small if isinstance(layer, nn.Linear)] == zeros
    again = nn.Sequential(*(nn.Linear(*reversed(shape)) for shape in shapes(small)))
    again[0].load_state_dict(small[0].state_dict())


@pytest.mark.parametrize("masked", [False, True])
def test_training_goes_on_with_an_old_loss_in_sight(masked):
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    silence(model[2], inputs=(0,))
    if masked:
        prune.keep_zeros(model)
    x = torch.randn(4, 8)
    loss = model(x).sum()
    loss.backward()
    prune.remove_dead_neurons(model, x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x).sum().backward()
    optimizer.step()
    assert shapes(model) == [(5, 8), (3, 5)] and loss.grad_fn is not None


class Reads(nn.Module):
    """A forward that uses a layer's weight by itself."""

    def __init__(self):
        super().__init__()
        self.enc, self.mid = nn.Linear(8, 6), nn.Linear(6, 6)

    def forward(self, x):
        return functional.linear(self.mid(torch.relu(self.enc(x))), self.enc.weight.t())


def test_a_weight_that_the_model_reads_itself_stays():
    model = Reads()
    silence(model.mid, inputs=(2,))
    small = outputs_stay(model, torch.randn(4, 8))
    assert shapes(small) == [(6, 8), (6, 6)]


def test_a_failure_takes_everything_back(monkeypatch):
    from tersetorch.methods.prune import dead_neurons

    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Linear(4, 4)).eval()
    for layer in (model[0], model[2]):
        silence(layer, outputs=(0,))
    before, run, calls = copy.deepcopy(model), dead_neurons._run, []

    def fail(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return run(*arguments)

    monkeypatch.setattr(dead_neurons, "_run", fail)
    with pytest.raises(KeyboardInterrupt):
        prune.remove_dead_neurons(model, torch.randn(2, 4))
    assert repr(model) == repr(before)
    assert all(torch.equal(tensor, before.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_hooks_and_dropout_that_always_drops_stop_it():
    hooked = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    silence(hooked[0], outputs=(1,))
    hooked[1].register_forward_hook(lambda module, inputs, output: output.flip(1))
    assert shapes(outputs_stay(hooked, torch.randn(3, 4))) == [(4, 4), (2, 4)]

    class Drops(Two):
        def forward(self, x):
            return self.left(functional.dropout(self.body(x), 0.5, True))

    model = Drops()
    silence(model.body, outputs=(1,))
    prune.remove_dead_neurons(model, torch.randn(1, 4))
    assert shapes(model)[0] == (6, 4)


def test_unbatched_and_empty_inputs_change_nothing():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    silence(model[0], outputs=(1,))
    assert shapes(prune.remove_dead_neurons(copy.deepcopy(model), torch.randn(4))) == [(6, 4), (2, 6)]
    empty = nn.Sequential(nn.Linear(4, 0), nn.ReLU(), nn.Linear(0, 4))
    assert shapes(prune.remove_dead_neurons(empty, torch.randn(2, 4))) == [(0, 4), (4, 0)]


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 5)
        self.c.weight = self.b.weight

    def forward(self, x):
        return self.c(self.b(torch.relu(self.a(torch.relu(self.a(x))))))


def test_layers_that_run_twice_or_share_a_weight_stay():
    model = Twice()
    silence(model.a, outputs=(0,))
    silence(model.b, outputs=(0,), inputs=(1,))
    small = outputs_stay(model, torch.randn(5, 5))
    assert shapes(small) == [(5, 5)] * 3


@pytest.mark.parametrize(
    "between",
    [
        nn.Softmax(-1),
        nn.LayerNorm(8),
        nn.Unflatten(1, (2, 4)),
        nn.BatchNorm1d(8, track_running_stats=False),
        nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
        nn.PReLU(8),
    ],
    ids=lambda module: type(module).__name__,
)
def test_what_mixes_or_counts_channels_stops_it(between):
    model = nn.Sequential(
        nn.Linear(4, 8), between, *([nn.Flatten()] if isinstance(between, nn.Unflatten) else []), nn.Linear(8, 2)
    )
    silence(model[0], outputs=(0, 1))
    names = ["0"] if nn.utils.parametrize.is_parametrized(between) else None
    prune.remove_dead_neurons(model, torch.randn(6, 4), targets=names)
    assert shapes(model)[0] == (8, 4)


def test_a_fixed_size_stops_it():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(1, 4, 3), nn.Linear(64, 2)

        def forward(self, x):
            return self.fc(self.conv(x).view(-1, 64))

    model = Fixed()
    silence(model.conv, outputs=(0,))
    assert shapes(outputs_stay(model, torch.randn(3, 1, 6, 6)))[0] == (4, 1, 3, 3)


def test_sequences_keep_their_last_dimension_for_channels():
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 8), nn.Flatten(), nn.Linear(24, 2))
    silence(model[0], outputs=(1,))
    silence(model[2], outputs=(1,))
    small = outputs_stay(model, torch.randn(5, 3, 4))
    assert shapes(small) == [(7, 4), (8, 7), (2, 24)]


def test_targets_and_ignore():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    for layer in model[:2]:
        silence(layer, outputs=(0,))
    assert shapes(prune.remove_dead_neurons(copy.deepcopy(model), torch.randn(1, 4), ignore="0")) == [
        (4, 4),
        (3, 4),
        (4, 3),
    ]
    assert shapes(prune.remove_dead_neurons(model, torch.randn(1, 4), targets="0")) == [(3, 4), (4, 3), (4, 4)]


def test_keyword_inputs():
    model = Two()
    silence(model.body, outputs=(0,))
    prune.remove_dead_neurons(model, {"x": torch.randn(2, 4)})
    assert shapes(model)[0] == (5, 4)


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        (3, TypeError, "example_inputs must be a tensor, a tuple"),
        ({"y": 1}, ValueError, r"example_inputs must name the arguments \['x'\]"),
        (torch.randn(2, 5), ValueError, "model must run on example_inputs, got RuntimeError"),
    ],
)
def test_bad_inputs_are_refused(inputs, error, message):
    model = Two()
    with pytest.raises(error, match=f"prune.remove_dead_neurons: {message}"):
        prune.remove_dead_neurons(model, inputs)
    assert model.training


def test_a_model_that_cannot_be_traced_is_refused():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(2, 2)

        def forward(self, x):
            return self.fc(x) if x.sum() > 0 else x

    with pytest.raises(
        ValueError, match=r"prune.remove_dead_neurons: model must be traceable by torch.fx, got TraceError"
    ):
        prune.remove_dead_neurons(Branches(), torch.ones(1, 2))
