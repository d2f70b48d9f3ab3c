import copy
import re

import pytest
import torch
from rich.progress import Progress
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrize

from tersetorch.methods import finalize, prune, quantize
from tersetorch.methods.parametrization import is_live, live_weight
from tersetorch.methods.prune import LayerError

LAYERS = ["layerwise", "exactobs", "blocked"]
SOLVERS = ["full", *LAYERS]


def correlated(samples, features, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, features, generator=generator) @ torch.randn(features, features, generator=generator)


def batches(features=20, seed=0):
    return list(correlated(96, features, seed).split(32))


def error(layer, dense, x):
    with torch.no_grad():
        return float((layer(x) - dense(x)).square().sum() / dense(x).square().sum())


@pytest.fixture
def network():
    """Two convolutions, one of them grouped, batch norm and two linear layers."""

    def make():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(4, 8, 3, padding=1, stride=2),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, groups=2),
            nn.Flatten(),
            nn.Linear(64, 12),
            nn.ReLU(),
            nn.Linear(12, 3),
        )

    return make


def images(seed=1):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(4, 4, generator=generator)
    return [torch.einsum("nchw,cd->ndhw", torch.randn(24, 4, 8, 8, generator=generator), mix) for _ in range(3)]


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
def test_the_sparsity_is_exact_and_the_weights_are_masked(mlp, train, solver, sparsity):
    assert prune.obs(mlp, batches(), sparsity, solver=solver) is mlp
    zero = [mlp[index].weight == 0 for index in (0, 2)]
    if solver == "full":
        assert sum(int(each.sum()) for each in zero) == round(sparsity * 425)
    else:
        assert [int(each.sum()) for each in zero] == [round(sparsity * 340), round(sparsity * 85)]
    mlp(torch.randn(8, 20)).square().sum().backward()
    for index, each in zip((0, 2), zero, strict=True):
        gradient = mlp[index].parametrizations.weight.original.grad
        assert not gradient[each].any()
        assert bool(each.all()) or gradient[~each].any()
    mlp.zero_grad()
    train(mlp)
    assert [torch.equal(mlp[index].weight == 0, each) for index, each in zip((0, 2), zero, strict=True)] == [True, True]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_second_order_is_ahead_on_correlated_inputs(seed):
    torch.manual_seed(seed)
    dense, x = nn.Linear(32, 24), correlated(400, 32, seed)
    errors = {"magnitude": error(prune.magnitude(copy.deepcopy(dense), 0.4), dense, x)}
    for solver in LAYERS:
        layer = prune.obs(copy.deepcopy(dense), [x], 0.4, solver=solver)
        errors[solver] = error(layer, dense, x)
    assert errors["magnitude"] > errors["layerwise"] > errors["blocked"] > 3 * errors["exactobs"]


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_rounding_in_the_sweep_is_ahead_of_rounding_afterwards(seed, bits):
    torch.manual_seed(seed)
    dense, x = nn.Linear(32, 24), correlated(400, 32, seed)
    together = prune.obs(copy.deepcopy(dense), [x], 0.4, bits=bits)
    afterwards = quantize.kmeans(prune.obs(copy.deepcopy(dense), [x], 0.4), bits)
    assert error(together, dense, x) < error(afterwards, dense, x)


@pytest.mark.parametrize("bits", [None, 2, 3])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_refined_weights_lose_less(seed, bits):
    torch.manual_seed(seed)
    dense, x = nn.Linear(32, 24), correlated(400, 32, seed)
    swept, refined = (prune.obs(copy.deepcopy(dense), [x], 0.4, bits=bits, refine=rounds) for rounds in (0, 3))
    assert error(refined, dense, x) < 0.95 * error(swept, dense, x)
    assert torch.equal(refined.weight == 0, swept.weight == 0)
    assert bits is None or refined.weight.unique().numel() <= 2**bits


def test_filters_of_groups_are_refined():
    torch.manual_seed(0)
    dense, data = nn.Conv2d(4, 6, 3, groups=2), [images()[0]]
    losses = []
    for rounds in (0, 2):
        layer = prune.obs(copy.deepcopy(dense), data, 0.5, bits=3, refine=rounds)
        losses.append((layer(data[0]) - dense(data[0])).square().sum())
    assert losses[1] < losses[0]


@pytest.mark.parametrize("solver", LAYERS)
def test_the_record_says_what_happened_to_the_outputs(solver):
    torch.manual_seed(0)
    dense, x = nn.Linear(12, 7, bias=solver == "layerwise"), correlated(200, 12)
    layer, history = copy.deepcopy(dense), ["kept"]
    prune.obs(layer, [x[:150], x[150:]], 0.5, solver=solver, history=history)
    assert history[0] == "kept" and len(history) == 2
    found = history[1]
    assert isinstance(found, LayerError)
    assert (found.layer, found.kept, found.total, found.samples) == ("weight", 42, 84, 200)
    outputs = functional.linear(x, dense.weight).square().sum()
    only_zeroed = functional.linear(x, torch.where(layer.weight == 0, dense.weight, 0)).square().sum() / outputs
    assert found.before == pytest.approx(float(only_zeroed.detach()), rel=1e-4)
    after = (layer(x) - dense(x)).square().sum() / outputs
    assert found.after == pytest.approx(float(after.detach()), rel=1e-3)
    assert found.after < found.before


@pytest.mark.parametrize("solver", LAYERS)
def test_one_pass_calibrates_every_layer_on_the_model_as_it_came(network, solver):
    data, history = images(), []
    together = prune.obs(network(), iter(data), 0.5, solver=solver, one_pass=True, history=history)
    for name in ("0", "3", "5", "7"):
        one = prune.obs(network(), data, 0.5, solver=solver, targets=name).get_submodule(name)
        torch.testing.assert_close(together.get_submodule(name).weight, one.weight)
        torch.testing.assert_close(together.get_submodule(name).bias, one.bias)
    assert [note.layer for note in history] == ["0", "3", "5", "7"]
    in_turn = prune.obs(network(), data, 0.5, solver=solver)
    assert not torch.equal(in_turn[3].weight, together[3].weight)


@pytest.mark.parametrize("solver", LAYERS)
def test_later_layers_see_what_earlier_ones_put_out_now(mlp, solver):
    data = batches()
    dense = copy.deepcopy(mlp)
    prune.obs(mlp, data, 0.5, solver=solver)
    by_hand = prune.obs(dense, data, 0.5, solver=solver, targets="0")
    prune.obs(by_hand, data, 0.5, solver=solver, targets="2")
    assert torch.equal(by_hand[0].weight, mlp[0].weight) and torch.equal(by_hand[2].weight, mlp[2].weight)


@pytest.mark.parametrize("solver", LAYERS)
def test_layers_are_pruned_in_the_order_of_use(solver):
    class Reversed(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.last, self.first = nn.Linear(8, 4), nn.Linear(20, 8)

        def forward(self, x):
            return self.last(self.first(x).relu())

    history = []
    prune.obs(Reversed(), batches(), 0.5, solver=solver, history=history)
    assert [each.layer for each in history] == ["first", "last"]


@pytest.mark.parametrize("pattern", [None, "4x1", "2x3"])
@pytest.mark.parametrize("solver", LAYERS)
@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_is_a_linear_layer_on_its_patches(solver, groups, pattern):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 8, 3, stride=2, groups=groups)
    x = images()[0]
    patches = functional.unfold(x, 3, stride=2).mT.reshape(-1, groups, 36 // groups)
    dense = conv.weight.detach().clone()
    biases = conv.bias.detach().clone()
    # A convolution ranks its groups together, so each group's share is taken from it.
    prune.obs(conv, [x], 0.5, solver=solver, pattern=pattern)
    weight = conv.weight.detach()
    assert 0 <= 144 // groups - int((weight == 0).sum()) < 6
    for group in range(groups):
        rows = slice(group * 8 // groups, (group + 1) * 8 // groups)
        twin = nn.Linear(36 // groups, 8 // groups)
        twin.weight.data, twin.bias.data = dense[rows].flatten(1).clone(), biases[rows].clone()
        if groups == 1:
            prune.obs(twin, [patches[:, group]], 0.5, solver=solver, pattern=pattern)
            torch.testing.assert_close(weight[rows].flatten(1), twin.weight.detach())
            torch.testing.assert_close(conv.bias[rows].detach(), twin.bias.detach())
        elif solver == "exactobs":
            # Whatever it chose, what is left is a least-squares fit.
            y = patches[:, group].double() @ dense[rows].flatten(1).double().T
            for row in range(8 // groups):
                kept = weight[rows].flatten(1)[row] != 0
                a = patches[:, group].double()[:, kept]
                damping = 0.01 * patches[:, group].double().square().sum(0).mean()
                whole = dense[rows].flatten(1)[row].double()
                left = a.T @ a + damping * torch.eye(int(kept.sum())).double()
                expected = torch.linalg.solve(left, a.T @ y[:, row] + damping * whole[kept])
                torch.testing.assert_close(weight[rows].flatten(1)[row][kept].double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("solver", LAYERS)
def test_groups_of_input_channels(network, solver):
    model = prune.obs(network(), images(), solver=solver, pattern="2:4")
    for index in (0, 3, 5, 7):
        kept = (model[index].weight != 0).movedim(1, -1)
        count = kept.unflatten(-1, (-1, 4)).sum(-1)
        assert torch.equal(count, torch.full_like(count, 2))


@pytest.mark.parametrize("solver", LAYERS)
def test_convolutions_of_every_dimension(solver):
    torch.manual_seed(0)
    for layer, shape in (
        (nn.Conv1d(4, 6, 3, padding="same"), (8, 4, 10)),
        (nn.Conv3d(2, 4, 2, dilation=2), (8, 2, 5, 5, 5)),
        (nn.Conv2d(6, 6, 3, groups=6).to(memory_format=torch.channels_last), (8, 6, 6, 6)),
    ):
        dense, x = copy.deepcopy(layer), torch.randn(shape)
        prune.obs(layer, [x], 0.5, solver=solver)
        assert int((layer.weight == 0).sum()) == layer.weight.numel() // 2
        plain = prune.magnitude(copy.deepcopy(dense), 0.5)
        assert error(layer, dense, x) < error(plain, dense, x)
        assert layer.weight.stride() == dense.weight.stride() or not layer.weight.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("solver", SOLVERS)
def test_other_precisions_are_rounded_at_the_end(make_mlp, solver, dtype):
    model = prune.obs(make_mlp().to(dtype), [x.to(dtype) for x in batches()], 0.5, solver=solver)
    assert all(parameter.dtype == dtype for parameter in model.parameters())
    assert sum(layer.kept for layer in prune.density(model).values()) == pytest.approx(213, abs=2)
    if dtype == torch.float64 and solver != "full":
        single = prune.obs(make_mlp(), batches(), 0.5, solver=solver, dtype=torch.float32)
        torch.testing.assert_close(single[0].weight, model[0].weight.float(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("solver", SOLVERS)
def test_pruning_adds_up(mlp, train, solver):
    prune.magnitude(mlp, 0.5)
    hidden = mlp[0].parametrizations.weight.original
    hidden.data[mlp[0].weight == 0] = float("nan")
    zero = mlp[0].weight == 0
    prune.obs(mlp, batches(), 0.8, solver=solver)
    assert not mlp[0].weight[zero].any() and bool(mlp[0].weight.isfinite().all())
    total = sum(layer.kept for layer in prune.density(mlp).values())
    assert total == 425 - (340 if solver == "full" else 272 + 68)
    train(mlp)
    before = [mlp[index].weight.detach().clone() for index in (0, 2)]
    prune.obs(mlp, batches(), 0.3, solver=solver)
    for index, weight in zip((0, 2), before, strict=True):
        assert torch.equal(mlp[index].weight, weight)
    finalize(mlp)
    zero = mlp[0].weight == 0
    prune.obs(mlp, batches(), 0.9, solver=solver)
    assert not mlp[0].weight[zero].any()


@pytest.mark.parametrize("solver", LAYERS)
def test_inputs_that_are_dead_lose_their_weights_first(solver):
    torch.manual_seed(0)
    layer = nn.Linear(10, 6)
    dense, x = layer.weight.detach().clone(), correlated(64, 10)
    x[:, [2, 7, 8]] = 0
    prune.obs(layer, [x], 18 / 60, solver=solver, block_size=128)
    assert not layer.weight[:, [2, 7, 8]].any()
    torch.testing.assert_close(layer.weight.detach(), torch.where(layer.weight == 0, 0, dense), rtol=1e-5, atol=1e-6)
    few = nn.Linear(10, 6)
    few.weight.data.copy_(dense)
    prune.obs(few, [x], 4 / 60, solver=solver)
    assert int((few.weight[:, [2, 7, 8]] == 0).sum()) == 4
    # What stays of them is as it was.
    assert torch.equal(few.weight[few.weight != 0], dense[few.weight != 0])
    nothing = nn.Linear(10, 6)
    prune.obs(nothing, [x * 0], 0.5, solver=solver)
    assert int((nothing.weight == 0).sum()) == 30


def test_rounding_onto_a_codebook(network):
    data = images()
    history = []
    model = prune.obs(network(), data, 0.5, bits=3, history=history)
    for index in (0, 3, 5, 7):
        shared = live_weight(model[index], "weight").compressed
        assert shared.codebook.shape == (1, 8) and shared.codebook[0, 0] == 0
        assert torch.equal(shared.codes == 0, ~shared.mask) and len(model[index].weight.unique()) == 8
        assert int(shared.mask.sum()) == shared.mask.numel() // 2
        original = model[index].parametrizations.weight.original
        assert torch.equal(model[index].weight, original.detach()) and not original.requires_grad
    assert [each.layer for each in history] == ["0", "3", "5", "7"]
    model(data[0]).sum().backward()
    assert shared.codebook.grad is not None
    finalize(model)


def test_rounding_without_pruning_leaves_all_values_for_the_weights():
    torch.manual_seed(0)
    layer = prune.obs(nn.Linear(12, 8), [correlated(64, 12)], 0.0, bits=2)
    shared = live_weight(layer, "weight").compressed
    assert bool(shared.mask.all()) and shared.codebook.shape == (1, 4) and bool((shared.codebook != 0).all())
    grouped = prune.obs(nn.Conv2d(4, 4, 3), [images()[0]], pattern="1:4", bits=1)
    assert len(grouped.weight.unique()) == 2 and int(grouped.weight.count_nonzero()) == 36


def test_each_layer_is_rounded_to_its_own_bits_in_one_call(make_mlp):
    together = prune.obs(make_mlp(), batches(), 0.5, bits={"0": 2, "*": 3}, refine=1)
    assert [len(together[place].weight.unique()) for place in (0, 2)] == [4, 8]
    apart = prune.obs(make_mlp(), batches(), 0.5, bits=2, refine=1, targets="0")
    prune.obs(apart, batches(), 0.5, bits=3, refine=1, targets="2")
    assert all(torch.equal(value, apart.state_dict()[name]) for name, value in together.state_dict().items())
    some = prune.obs(make_mlp(), batches(), 0.5, bits={"2": 2})
    assert live_weight(some[0], "weight").compressed.codebook is None and len(some[2].weight.unique()) == 4


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_same_data_gives_the_same_bits_and_the_state_loads(make_mlp, solver):
    first, second = make_mlp(), make_mlp()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    prune.obs(first, batches(), 0.7, solver=solver)
    assert torch.equal(torch.get_rng_state(), state) and first.training
    torch.manual_seed(4)
    prune.obs(second, batches(), 0.7, solver=solver)
    assert torch.equal(first[0].weight, second[0].weight) and torch.equal(first[2].weight, second[2].weight)
    loaded = prune.magnitude(make_mlp(seed=9), 0.0)
    loaded.load_state_dict(first.state_dict())
    assert torch.equal(loaded[0].weight, first[0].weight) and torch.equal(loaded[2].bias, first[2].bias)


@pytest.mark.parametrize("solver", SOLVERS)
def test_an_optimizer_built_before_goes_on(mlp, train, solver):
    parameters = list(mlp.parameters())
    optimizer = train(mlp)
    prune.obs(mlp, batches(), 0.5, solver=solver)
    before = mlp[0].weight.detach().clone()
    train(mlp, optimizer)
    assert not torch.equal(mlp[0].weight, before)
    assert torch.equal(mlp[0].weight == 0, before == 0)
    assert all(one is other for one, other in zip(finalize(mlp).parameters(), parameters, strict=True))


@pytest.mark.parametrize("solver", LAYERS)
def test_tied_layers_stay_tied(solver):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(20, 20), nn.Linear(20, 20)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(self.first(x).relu())

    model, data = Twice(), batches()
    bias = model.first.bias.detach().clone()
    prune.obs(model, data, 0.5, solver=solver)
    assert torch.equal(model.first.weight, model.second.weight) and int((model.first.weight == 0).sum()) == 200
    assert torch.equal(model.first.bias, bias)
    finalize(model)
    assert model.first.weight is model.second.weight


def test_a_layer_without_weights_and_an_iterator_for_one_layer():
    model = nn.Sequential(nn.Linear(0, 3), nn.Linear(3, 2))
    prune.obs(model, iter([torch.ones(2, 0)]), 0.5, solver="exactobs")
    assert is_live(model[0]) and int((model[1].weight == 0).sum()) == 3
    empty = prune.obs(nn.Linear(0, 3), [torch.ones(2, 0)], 0.5, solver="full")
    assert is_live(empty)
    layer = prune.obs(nn.Linear(20, 3), (x for x in batches()), 0.5)
    assert int((layer.weight == 0).sum()) == 30


@pytest.mark.parametrize("solver", SOLVERS)
def test_progress_moves_a_bar_to_its_end(mlp, solver):
    with Progress(disable=True) as progress:
        prune.obs(mlp, batches(), 0.5, solver=solver, progress=progress)
        assert [task.description for task in progress.tasks] == ["pruning"] and progress.finished


def test_statistics_of_batch_norm_are_taken_anew_afterwards(network):
    data = images()
    model = prune.recalibrate_batch_norm(prune.obs(network(), data, 0.8, solver="exactobs"), data)
    seen = torch.stack([model[0](x).detach().mean((0, 2, 3)) for x in data]).mean(0)
    torch.testing.assert_close(model[1].running_mean, seen)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "sparsity must be given, got neither it nor a pattern N:M; pass a number such as 0.5"),
        ({"solver": "full"}, ValueError, "sparsity must be given, got neither it nor max_increase"),
        ({"sparsity": 0.5, "solver": "full", "one_pass": True}, ValueError, "one_pass must be left out with solver"),
        ({"sparsity": 0.5, "one_pass": 1}, TypeError, "one_pass must be"),
        ({"sparsity": 1.2}, ValueError, "sparsity must be in [0, 1), got 1.2; pass a number in that range"),
        ({"sparsity": "0.5"}, TypeError, "sparsity must be a number, got '0.5'"),
        ({"sparsity": {"fc": 0.5}}, ValueError, "sparsity must match weights of two or more dimensions, got 'fc'"),
        ({"sparsity": {"0": 0.5}, "solver": "full"}, ValueError, "sparsity must be one number with solver 'full'"),
        ({"sparsity": 0.5, "solver": "obd"}, ValueError, "solver must be one of full, layerwise, exactobs, blocked"),
        ({"sparsity": 0.5, "pattern": "2:4"}, ValueError, "sparsity must be left out with a pattern N:M, got both"),
        ({"pattern": "1:2", "solver": "full"}, ValueError, "pattern must be left out with solver 'full'"),
        ({"pattern": "1:2", "targets": "2"}, ValueError, "pattern 1:2 must divide the input channels, got 17 of '2'"),
        ({"sparsity": 0.5, "pattern": "4:2"}, ValueError, "pattern must be 'N:M' with 0 < N < M or 'RxC'"),
        ({"sparsity": 0.5, "damping": -1}, ValueError, "damping must be finite and at least 0, got -1"),
        ({"sparsity": 0.5, "damping": 0, "solver": "full"}, ValueError, "damping must be more than 0 with solver"),
        ({"sparsity": 0.5, "block_size": 0}, ValueError, "block_size must be at least 1, got 0"),
        ({"sparsity": 0.5, "bits": 9}, ValueError, "bits must be from 1 to 8, got 9"),
        ({"sparsity": 0.5, "bits": {"0": 4.0}}, TypeError, "bits['0'] must be an int, got 4.0"),
        ({"sparsity": 0.5, "bits": {"fc": 4}}, ValueError, "bits must match weights of two or more dimensions, got"),
        (
            {"sparsity": {"0": 0.5}, "bits": {"2": 4}},
            ValueError,
            "bits must name layers that are pruned, got '2'; add it to sparsity, with 0",
        ),
        (
            {"sparsity": 0.5, "bits": 4, "solver": "exactobs"},
            ValueError,
            "bits must be left out with solver 'exactobs'",
        ),
        ({"sparsity": 0.5, "refine": -1}, ValueError, "refine must be at least 0, got -1"),
        ({"sparsity": 0.5, "refine": 2, "solver": "layerwise"}, ValueError, "refine must be 0 with solver 'layerwise'"),
        ({"max_increase": 0.1}, ValueError, "max_increase must be left out with solver 'blocked'"),
        ({"max_increase": -1, "solver": "full"}, ValueError, "max_increase must be finite and at least 0, got -1"),
        ({"sparsity": 0.5, "dtype": torch.float16}, ValueError, "dtype must be torch.float64 or torch.float32, got"),
        ({"sparsity": 0.5, "history": {}}, TypeError, "history must be a list, got dict; pass one to be"),
        ({"sparsity": 0.5, "targets": "fc"}, ValueError, "targets must match"),
        ({"sparsity": 0.5, "data": []}, ValueError, "data must hold at least one batch, got none"),
        ({"sparsity": 0.5, "data": torch.ones(4, 20)}, TypeError, "data must be an iterable of batches, got Tensor"),
        ({"sparsity": 0.5, "data": (x for x in batches())}, TypeError, "data must be iterable 3 times, got generator"),
        (
            {"sparsity": 0.5, "data": [torch.full((4, 20), torch.nan)]},
            ValueError,
            "data must give finite inputs, got NaN",
        ),
        (
            {"sparsity": 0.5, "data": [torch.ones(0, 20)]},
            ValueError,
            "data must reach the layer '0', got no input there",
        ),
        (
            {"sparsity": 0.5, "data": [torch.ones(4, 20)], "damping": 0},
            ValueError,
            "the input moments of '0' must be positive definite, got a singular matrix; raise damping, or pass more",
        ),
    ],
)
def test_bad_arguments_are_refused_and_change_nothing(mlp, arguments, error, message):
    before = copy.deepcopy(mlp.state_dict())
    history = []
    arguments = {"data": batches(), "history": history, **arguments}
    with pytest.raises(error, match=f"prune.obs: {re.escape(message)}"):
        prune.obs(mlp, **arguments)
    assert not is_live(mlp) and not history and mlp.training
    assert all(torch.equal(value, before[name]) for name, value in mlp.state_dict().items())


@pytest.mark.parametrize("solver", LAYERS)
def test_a_failure_half_way_puts_everything_back(mlp, solver):
    class Spoiled(nn.Module):
        """Passes on NaN once something before it is pruned."""

        def __init__(self, before):
            super().__init__()
            self.watched = [before]

        def forward(self, x):
            return x * float("nan") if int((self.watched[0].weight == 0).sum()) else x

    model = nn.Sequential(mlp[0], Spoiled(mlp[0]), mlp[2])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="data must give finite inputs, got NaN or infinity at the layer '2'; clean"):
        prune.obs(model, batches(), 0.5, solver=solver)
    assert not is_live(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_cannot_be_calibrated_is_refused(tied, mlp):
    tokens = [torch.arange(12)]
    with pytest.raises(
        ValueError, match="the weight of 'embedding' must be held by Linear and Conv layers alone, got Emb"
    ):
        prune.obs(tied, tokens, 0.5)
    prune.obs(tied, tokens, 0.5, targets="inner")
    with pytest.raises(ValueError, match="'weight_ih_l0' must be held by Linear and Conv layers alone, got LSTM"):
        prune.obs(nn.LSTM(3, 3), [torch.ones(2, 3)], 0.5, targets="*")
    attention = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with pytest.raises(ValueError, match=r"data must reach the layer 'self_attn.out_proj', got no input there"):
        prune.obs(attention, [torch.randn(3, 4, 8)], 0.5)
    prune.obs(attention, [torch.randn(3, 4, 8)], 0.5, ignore="self_attn.out_proj")
    assert int((attention.linear1.weight == 0).sum()) == 64
    quantize.kmeans(mlp, 3)
    for solver in SOLVERS:
        with pytest.raises(ValueError, match="the weight of '0' must not be shared, got one with a codebook; finalize"):
            prune.obs(mlp, batches(), 0.5, solver=solver)
    conv = nn.Conv2d(4, 6, 3, groups=2)
    with pytest.raises(ValueError, match="blocks must divide the 3 outputs of a convolution group, got 2 rows for"):
        prune.obs(conv, images(), 0.5, pattern="2x1")


def test_parametrizations_on_top_are_refused(mlp):
    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    prune.magnitude(mlp, 0.5)
    parametrize.register_parametrization(mlp[0], "weight", Double())
    with pytest.raises(ValueError, match="the weight of '0' must have no other parametrization, got Double; remove"):
        prune.obs(mlp, batches(), 0.6)


def test_a_bias_that_two_layers_share_is_left():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    model[2].bias = model[0].bias
    before = model[0].bias.detach().clone()
    prune.obs(model, [torch.randn(64, 8)], 0.4, solver="layerwise")
    assert torch.equal(model[0].bias, before) and model[2].bias is model[0].bias


def test_a_batch_of_no_samples_adds_nothing_to_a_convolution() -> None:
    full, mixed = (nn.Sequential(nn.Conv2d(4, 4, 3)) for _ in range(2))
    mixed.load_state_dict(full.state_dict())
    x = torch.randn(8, 4, 6, 6)
    prune.obs(full, [x], 0.5)
    prune.obs(mixed, [x, x[:0]], 0.5)
    assert torch.equal(full[0].weight, mixed[0].weight)
