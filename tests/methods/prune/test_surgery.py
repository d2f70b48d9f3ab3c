import copy
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import tersetorch as tt
from tersetorch.methods import finalize, prune, quantize
from tersetorch.methods.parametrization import is_live, live_weight


def sites(model):
    """Weights and biases of the two layers, with their masks."""
    return [live_weight(model[index], name) for index in (0, 2) for name in ("weight", "bias")]


def masks(model):
    return [live.compressed.mask.clone() for live in sites(model) if live is not None]


def threshold(c_rate, *tensors):
    sizes = np.abs(np.concatenate([tensor.detach().double().numpy().ravel() for tensor in tensors]))
    sizes = sizes[sizes != 0]
    mean = sizes.mean()
    return max(mean + c_rate * np.sqrt((sizes**2).mean() - mean**2), 0)


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


class Reference:
    """The paper's training loop, with masks of its own and a plain SGD, for the network of make_mlp."""

    def __init__(self, model, c_rate, biases, gamma, power, iter_stop, seed):
        self.tensors = [parameter.detach().clone() for parameter in model.parameters()]
        self.masks = [torch.ones_like(tensor, dtype=torch.bool) for tensor in self.tensors]
        self.momenta = [torch.zeros_like(tensor) for tensor in self.tensors]
        self.cut = [True, biases, True, biases]
        counted = [self.tensors[:2], self.tensors[2:]] if biases else [self.tensors[:1], self.tensors[2:3]]
        self.thresholds = [t for pool in counted for t in [threshold(c_rate, *pool)] * 2]
        self.gamma, self.power, self.iter_stop = gamma, power, iter_stop
        self.generator = torch.Generator().manual_seed(seed)
        self.returned = 0
        self.update()

    def update(self):
        for index, (tensor, mask) in enumerate(zip(self.tensors, self.masks, strict=True)):
            t = self.thresholds[index]
            for position in np.ndindex(*tensor.shape) if self.cut[index] else ():
                size = abs(float(tensor[position]))
                if mask[position] and size <= 0.9 * t:
                    mask[position] = False
                elif not mask[position] and size > 1.1 * t:
                    mask[position] = True
                    self.returned += 1

    def run(self, steps, seed, lr=0.05, momentum=0.9, weight_decay=0.01):
        data = torch.Generator().manual_seed(seed)
        for iteration in range(1, steps + 1):
            x = torch.randn(16, 20, generator=data)
            leaves = [
                torch.where(mask, tensor, 0).requires_grad_()
                for mask, tensor in zip(self.masks, self.tensors, strict=True)
            ]
            hidden = functional.linear(x, *leaves[:2]).relu()
            functional.linear(hidden, *leaves[2:]).square().mean().backward()
            for leaf, tensor, velocity in zip(leaves, self.tensors, self.momenta, strict=True):
                velocity.mul_(momentum).add_(leaf.grad + weight_decay * tensor)
                tensor.sub_(lr * velocity)
            if iteration < self.iter_stop:
                drawn = float(torch.rand(1, generator=self.generator))
                if drawn < (1 + self.gamma * iteration) ** -self.power:
                    self.update()


@pytest.mark.parametrize("biases", [False, True])
def test_it_trains_as_the_paper_says(make_mlp, train, biases):
    settings = {"gamma": 0.2, "power": 0.7, "iter_stop": 30, "seed": 3}
    model = make_mlp()
    reference = Reference(model, 0.3, biases, **settings)
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.01)
    surgery = prune.DynamicSurgery(model, 0.3, biases=biases, **settings)
    assert len(masks(model)) == (4 if biases else 2)

    def compare():
        found = [live for live in sites(model) if live is not None]
        kept = [mask for mask, cut in zip(reference.masks, reference.cut, strict=True) if cut]
        assert same([live.compressed.mask for live in found], kept)

    compare()
    before = masks(model)
    train(model, optimizer, steps=29, seed=1, after=surgery.step)
    reference.run(29, seed=1)
    compare()
    assert reference.returned and not same(masks(model), before)
    for parameter, tensor in zip(parameters, reference.tensors, strict=True):
        torch.testing.assert_close(parameter.detach(), tensor)


def test_the_threshold_counts_what_is_not_zero_of_weight_and_bias_together(make_mlp):
    for biases in (False, True):
        model = make_mlp()
        with torch.no_grad():
            model[0].weight[:5] = 0
            model[0].bias[:3] = 0
        pools = [(layer.weight, layer.bias)[: 1 + biases] for layer in (model[0], model[2])]
        wanted = {"0": threshold(0.5, *pools[0]), "2": threshold(-0.5, *pools[1])}
        dense = [layer.weight.detach().clone() for layer in (model[0], model[2])]
        surgery = prune.DynamicSurgery(model, {"0": 0.5, nn.Linear: -0.5}, biases=biases)
        assert surgery.thresholds == pytest.approx(wanted)
        for layer, before, name in zip((model[0], model[2]), dense, ("0", "2"), strict=True):
            assert torch.equal(layer.weight, torch.where(before.abs() > 0.9 * wanted[name], before, 0))
    assert prune.DynamicSurgery(make_mlp(), -100.0).thresholds == {"0": 0.0, "2": 0.0}
    empty = nn.Linear(3, 2)
    nn.init.zeros_(empty.weight)
    assert prune.DynamicSurgery(empty).thresholds == {"weight": 0.0}


def test_all_weights_get_the_gradient_and_inputs_that_of_the_kept_ones(mlp):
    prune.DynamicSurgery(mlp, 0.3, biases=True)
    plain = finalize(copy.deepcopy(mlp))
    x = torch.randn(16, 20, generator=torch.Generator().manual_seed(0))
    gradients = []
    for model in (mlp, plain):
        leaf = x.clone().requires_grad_()
        model(leaf).square().mean().backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)
    for live, dense in zip(sites(mlp), [plain[0].weight, plain[0].bias, plain[2].weight, plain[2].bias], strict=True):
        assert torch.equal(live.original.grad, dense.grad)
    pruned = ~sites(mlp)[0].compressed.mask
    assert bool(sites(mlp)[0].original.grad[pruned].count_nonzero())
    assert bool((plain[0].weight[pruned] == 0).all()) and not bool(plain[0].weight[pruned].signbit().any())


def test_a_pruned_weight_that_grows_returns_with_its_value(mlp):
    surgery = prune.DynamicSurgery(mlp, 0.3, gamma=0.0)
    live = sites(mlp)[0]
    t = surgery.thresholds["0"]
    position = tuple((~live.compressed.mask).nonzero()[0].tolist())
    for size, kept in ((1.05, False), (1.15, True), (0.95, True), (0.85, False), (-1.15, True)):
        with torch.no_grad():
            live.original[position] = size * t
        surgery.step()
        assert mlp[0].weight[position].item() == pytest.approx(size * t if kept else 0)


def test_masks_that_another_method_set_can_return_too(mlp):
    prune.magnitude(mlp, 0.9)
    surgery = prune.DynamicSurgery(mlp, -100.0, gamma=0.0)
    assert surgery.thresholds["0"] == 0
    assert int((mlp[0].weight == 0).sum()) == 0


def test_draws_decide_when_masks_change(make_mlp):
    gamma, power, iter_stop = 0.05, 1.3, 60
    model = make_mlp()
    surgery = prune.DynamicSurgery(model, 0.3, gamma=gamma, power=power, iter_stop=iter_stop, seed=7)
    draws = torch.Generator().manual_seed(7)
    original = sites(model)[0].original
    changes = 0
    for iteration in range(1, 80):
        torch.manual_seed(iteration)  # the global generator has no say
        with torch.no_grad():
            original.copy_(torch.randn(original.shape, generator=torch.Generator().manual_seed(iteration)))
        before = masks(model)[0]
        assert surgery.iteration == iteration - 1
        surgery.step()
        due = iteration < iter_stop and float(torch.rand(1, generator=draws)) < (1 + gamma * iteration) ** -power
        assert due == (not torch.equal(masks(model)[0], before))
        changes += due
        assert surgery.active == (iteration < iter_stop)
    assert 5 < changes < 50


def test_once_it_is_over_masks_stay_and_pruned_weights_have_no_gradient(mlp, train):
    surgery = prune.DynamicSurgery(mlp, 0.3, biases=True, gamma=0.0, iter_stop=5)
    optimizer = train(mlp, steps=3, after=surgery.step)
    x = torch.randn(4, 20)
    expected = mlp(x)
    surgery.finish()
    assert torch.equal(mlp(x), expected)
    kept = masks(mlp)
    train(mlp, optimizer, steps=20, after=surgery.step)
    assert same(masks(mlp), kept)
    for live, mask in zip(sites(mlp), kept, strict=True):
        assert not bool(live.original.grad[~mask].count_nonzero())
        assert torch.equal(getattr(live.module, live.tensor) == 0, ~mask)
    assert surgery.iteration == 23
    surgery.finish()


@pytest.mark.parametrize("steps", [4, 9])
def test_a_resumed_run_gives_the_same_bits(make_mlp, train, steps):
    def begin(seed):
        model = make_mlp(seed)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
        surgery = prune.DynamicSurgery(model, 0.3, biases=True, gamma=0.3, iter_stop=8, seed=seed)
        return model, optimizer, surgery

    model, optimizer, surgery = begin(0)
    train(model, optimizer, steps=steps, seed=1, after=surgery.step)
    states = copy.deepcopy([part.state_dict() for part in (model, optimizer, surgery)])
    train(model, optimizer, steps=10, seed=2, after=surgery.step)

    resumed, resumed_optimizer, resumed_surgery = begin(1)
    for part, state in zip((resumed, resumed_optimizer, resumed_surgery), states, strict=True):
        part.load_state_dict(state)
    train(resumed, resumed_optimizer, steps=10, seed=2, after=resumed_surgery.step)
    assert resumed.state_dict().keys() == model.state_dict().keys()
    assert same(resumed.state_dict().values(), model.state_dict().values())
    assert resumed_surgery.thresholds == surgery.thresholds
    assert not resumed_surgery.active


def test_a_state_survives_a_file_and_turns_back_time(mlp, train, tmp_path):
    surgery = prune.DynamicSurgery(mlp, 0.3, iter_stop=4)
    torch.save(surgery.state_dict(), tmp_path / "surgery.pt")
    train(mlp, steps=4, after=surgery.step)
    assert not surgery.active and not live_weight(mlp[0], "weight").compressed.dense_gradient
    surgery.load_state_dict(torch.load(tmp_path / "surgery.pt", weights_only=True))
    assert surgery.active and surgery.iteration == 0
    assert live_weight(mlp[0], "weight").compressed.dense_gradient


def test_convolutions_and_linear_layers_in_turn():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x, y = torch.randn(32, 1, 8, 8), torch.randint(10, (32,))
    for kind, rate in ((nn.Conv2d, -0.2), (nn.Linear, 0.5)):
        surgery = prune.DynamicSurgery(model, rate, targets=kind, biases=True, gamma=0.0, iter_stop=20)
        with prune.only(model, kind):
            for _ in range(20):
                functional.cross_entropy(model(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()
                surgery.step()
        assert not surgery.active
    densities = prune.density(model)
    assert 0 < densities["0"].kept < 54 and 0 < densities["3"].kept < 2160
    assert functional.cross_entropy(model(x), y) < 0.5
    finalize(model)
    assert not is_live(model) and prune.density(model) == densities


def test_copies_are_on_their_own(mlp, train):
    surgery = prune.DynamicSurgery(mlp, 0.3, biases=True, gamma=0.1, iter_stop=6)
    train(mlp, steps=2, after=surgery.step)
    x = torch.randn(4, 20)
    expected = mlp(x)
    baked = finalize(copy.deepcopy(mlp))
    assert type(baked[0]) is nn.Linear and torch.equal(baked(x), expected)
    other, other_surgery = copy.deepcopy((mlp, surgery))
    train(other, steps=6, after=other_surgery.step)
    assert torch.equal(mlp(x), expected) and surgery.active and not other_surgery.active
    train(mlp, steps=6, after=surgery.step)
    assert same(mlp.state_dict().values(), other.state_dict().values())


def test_weights_are_shared_after_it(mlp, train):
    surgery = prune.DynamicSurgery(mlp, 0.3, gamma=0.0)
    train(mlp, steps=3, after=surgery.step)
    zeros = mlp[0].weight == 0
    surgery.finish()
    quantize.kmeans(mlp, 3)
    train(mlp)
    assert torch.equal(mlp[0].weight == 0, zeros)
    assert len(mlp[0].weight.unique()) == 8


def test_sharing_or_finalizing_too_soon_is_told_at_the_next_step(make_mlp, train):
    model = make_mlp()
    surgery = prune.DynamicSurgery(model, 0.3, gamma=0.0)
    quantize.kmeans(model, 3)
    zeros = model[0].weight == 0
    train(model)
    assert torch.equal(model[0].weight == 0, zeros)
    state = surgery.state_dict()
    with pytest.raises(ValueError, match="the weight of '0' must not be shared, got a codebook; call finish before"):
        surgery.step()
    assert surgery.iteration == 0 and torch.equal(surgery.state_dict()["generator"], state["generator"])
    with pytest.raises(ValueError, match="DynamicSurgery: the weight of '0' must not be shared, got a codebook; share"):
        prune.DynamicSurgery(model)
    surgery.finish()
    surgery.step()

    model = make_mlp()
    surgery = prune.DynamicSurgery(model, 0.3, gamma=0.0)
    finalize(model)
    with pytest.raises(ValueError, match="the weight of '0' must carry its mask, got a finalized one"):
        surgery.step()
    surgery.finish()
    train(model, after=surgery.step)


def test_the_result_is_saved_and_converted(mlp, train, tmp_path):
    surgery = prune.DynamicSurgery(mlp, 0.3, biases=True, gamma=0.0)
    train(mlp, after=surgery.step)
    x = torch.randn(4, 20)
    expected = mlp(x)
    fast = tt.convert(mlp, plan="sparse")
    assert isinstance(fast[0], tt.nn.SparseLinear)
    torch.testing.assert_close(fast(x), expected)
    plain = finalize(copy.deepcopy(mlp))
    tt.save(plain, tmp_path / "model.terse")
    assert same(tt.load(tmp_path / "model.terse").state_dict().values(), plain.state_dict().values())
    assert surgery.active and torch.equal(mlp(x), expected)


def test_tied_weights_are_cut_once_and_each_bias_with_them(tied):
    surgery = prune.DynamicSurgery(tied, 0.3, targets=["head", "inner"], biases=True, gamma=0.0)
    assert set(surgery.thresholds) == {"embedding", "inner"}
    optimizer = torch.optim.SGD(tied.parameters(), lr=0.1)
    for _ in range(3):
        tied(torch.arange(12)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        surgery.step()
    assert live_weight(tied.head, "bias") is not None
    assert torch.equal(tied.head.weight, tied.embedding.weight)
    assert 0 < int((tied.head.weight == 0).sum()) < 96
    finalize(tied)
    assert tied.head.weight is tied.embedding.weight is tied.twin.weight


def test_a_recurrent_module_is_cut_with_its_biases():
    torch.manual_seed(0)
    model = nn.LSTM(5, 7)
    x = torch.randn(3, 2, 5)
    surgery = prune.DynamicSurgery(model, 0.0, targets="weight_*", biases=True, gamma=0.0)
    assert set(surgery.thresholds) == {"weight_ih_l0", "weight_hh_l0"}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x)[0].square().mean().backward()
    optimizer.step()
    surgery.step()
    expected = model(x)[0]
    assert 0 < int((model.bias_hh_l0 == 0).sum()) < 28
    torch.testing.assert_close(finalize(model)(x)[0], expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(make_mlp, dtype):
    model = make_mlp().to(dtype)
    weight = model[0].weight.detach().clone()
    surgery = prune.DynamicSurgery(model, 0.3, gamma=0.0)
    limit = 0.9 * threshold(0.3, weight)
    expected = torch.from_numpy(np.abs(weight.double().numpy()) > limit)
    assert torch.equal(live_weight(model[0], "weight").compressed.mask, expected)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(4, 20, dtype=dtype)).square().mean().backward()
    optimizer.step()
    surgery.step()
    assert model[0].weight.dtype == dtype


def test_a_compiled_model_sees_the_masks_change_and_end(mlp):
    surgery = prune.DynamicSurgery(mlp, 0.3, gamma=0.0)
    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
    x = torch.randn(16, 20, generator=torch.Generator().manual_seed(0))

    def check():
        compiled(x).square().mean().backward()
        gradients = [parameter.grad.clone() for parameter in mlp.parameters()]
        mlp.zero_grad()
        mlp(x).square().mean().backward()
        for compiled_one, parameter in zip(gradients, mlp.parameters(), strict=True):
            torch.testing.assert_close(compiled_one, parameter.grad)
        mlp.zero_grad()

    check()
    with torch.no_grad():
        sites(mlp)[0].original.mul_(1.5)
    before = masks(mlp)
    surgery.step()
    assert not same(masks(mlp), before)
    check()
    surgery.finish()
    check()


def test_weights_that_are_not_finite_stop_it(make_mlp):
    model = make_mlp()
    surgery = prune.DynamicSurgery(model, 0.3, gamma=0.0)
    before, state = masks(model), surgery.state_dict()
    good = sites(model)[2].original.detach().clone()
    sites(model)[0].original.data.mul_(2)
    sites(model)[2].original.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"step: the weight of '2' must be finite, got NaN or infinity"):
        surgery.step()
    assert same(masks(model), before) and surgery.iteration == 0
    assert torch.equal(surgery.state_dict()["generator"], state["generator"])
    sites(model)[2].original.data.copy_(good)
    surgery.step()
    assert not same(masks(model), before)

    hidden = prune.magnitude(make_mlp(), 0.5)
    position = (~live_weight(hidden[0], "weight").compressed.mask).nonzero()[0]
    live_weight(hidden[0], "weight").original.data[tuple(position)] = float("inf")
    before = masks(hidden)
    with pytest.raises(ValueError, match=r"DynamicSurgery: the weight of '0' must be finite"):
        prune.DynamicSurgery(hidden)
    assert same(masks(hidden), before) and not live_weight(hidden[0], "weight").compressed.dense_gradient


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"c_rate": "3"}, TypeError, "c_rate must be a number, got '3'"),
        ({"c_rate": float("-inf")}, ValueError, "c_rate must be finite, got -inf"),
        ({"c_rate": float("nan")}, ValueError, "c_rate must be finite, got nan"),
        ({"c_rate": {}}, ValueError, "c_rate must name at least one layer, got {}"),
        ({"c_rate": {"0": None}}, TypeError, "c_rate['0'] must be a number, got None"),
        ({"c_rate": {"fc": 1.0}}, ValueError, "c_rate must match"),
        ({"c_rate": {"0": 1.0}, "targets": "0"}, ValueError, "c_rate must be one number where targets is given"),
        ({"gamma": -0.1}, ValueError, "gamma must be finite and at least 0, got -0.1"),
        ({"power": float("inf")}, ValueError, "power must be finite and at least 0, got inf"),
        ({"iter_stop": 0}, ValueError, "iter_stop must be at least 1, got 0"),
        ({"iter_stop": 1.5}, TypeError, "iter_stop must be an int, got 1.5"),
        ({"biases": 1}, TypeError, "biases must be True or False, got 1"),
        ({"broadcast": "no"}, TypeError, "broadcast must be True or False, got 'no'"),
        ({"seed": -1}, ValueError, "seed must be from 0 to"),
        ({"targets": "fc"}, ValueError, "targets must match"),
    ],
)
def test_bad_arguments_are_refused_and_change_nothing(mlp, arguments, error, message):
    with pytest.raises(error, match=f"prune.DynamicSurgery: {re.escape(message)}"):
        prune.DynamicSurgery(mlp, **arguments)
    assert not is_live(mlp)


def test_a_bias_that_cannot_be_masked_is_refused(make_mlp):
    model = make_mlp()
    model[2].bias.data[0] = float("nan")
    with pytest.raises(ValueError, match="the bias of '2' must be finite, got NaN or infinity; repair the training"):
        prune.DynamicSurgery(model, biases=True)
    assert not is_live(model)
    model = make_mlp()
    nn.utils.parametrizations.weight_norm(model[0], "bias", dim=None)
    with pytest.raises(ValueError, match="the bias of '0' must be a parameter, got a tensor that something else"):
        prune.DynamicSurgery(model, biases=True)
    assert not is_live(model)
    prune.DynamicSurgery(model)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (3, TypeError, "state must be a dict, got int"),
        ({"step": 3}, ValueError, "state must hold"),
        ({"iteration": "3"}, TypeError, r"state\['iteration'\] must be an int, got '3'"),
        ({"iteration": -1}, ValueError, r"state\['iteration'\] must be at least 0, got -1"),
        ({"active": 1}, TypeError, r"state\['active'\] must be True or False, got 1"),
        ({"thresholds": 3}, ValueError, r"state\['thresholds'\] must be of \['0', '2'\], got int"),
        ({"thresholds": {"0": 1.0}}, ValueError, r"state\['thresholds'\] must be of \['0', '2'\], got \['0'\]"),
        ({"thresholds": {"0": 1.0, "2": -1.0}}, ValueError, r"state\['thresholds'\]\['2'\] must be finite and at"),
        ({"generator": 3}, ValueError, r"state\['generator'\] must be a generator's state, got int"),
        ({"generator": torch.zeros(3, dtype=torch.uint8)}, ValueError, r"state\['generator'\] must be a generator's"),
    ],
)
def test_a_bad_state_is_refused(mlp, change, error, message):
    surgery = prune.DynamicSurgery(mlp, 0.3)
    state = surgery.state_dict()
    bad = {**state, **change} if isinstance(change, dict) else change
    with pytest.raises(error, match=message):
        surgery.load_state_dict(bad)
    assert {**surgery.state_dict(), "generator": 0} == {**state, "generator": 0}
    assert torch.equal(surgery.state_dict()["generator"], state["generator"])


def test_a_surgery_that_takes_over_ends_the_one_before():
    torch.manual_seed(0)
    model = nn.Linear(10, 10)
    first = prune.DynamicSurgery(model, 1.0, iter_stop=5)
    second = prune.DynamicSurgery(model, 1.0, iter_stop=50)
    first.finish()
    compressed = model.parametrizations.weight[0]
    assert second.active and compressed.dense_gradient
    third = prune.DynamicSurgery(model, 1.0, iter_stop=50)
    mask = compressed.mask.clone()
    model.parametrizations.weight.original.data.mul_(100)
    second.step()
    assert not second.active and torch.equal(compressed.mask, mask) and compressed.dense_gradient
    third.finish()
    assert not compressed.dense_gradient


def test_a_frozen_layer_is_refused_and_changes_nothing(mlp):
    mlp[2].weight.requires_grad_(False)
    with pytest.raises(ValueError, match="DynamicSurgery: the weight of '2' must not be frozen"):
        prune.DynamicSurgery(mlp)
    assert not is_live(mlp)
    mlp[0].bias.requires_grad_(False)
    with pytest.raises(ValueError, match="the bias of '0' must not be frozen, got one that this would change; call"):
        prune.DynamicSurgery(mlp, ignore="2", biases=True)
    assert not is_live(mlp)
    prune.DynamicSurgery(mlp, ignore="2")
