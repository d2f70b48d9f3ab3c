"""Outer products, colours and blocks: planted structure is found, errors fall, each metric lowers its own measure."""

import copy
from itertools import combinations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import tersetorch as tt
from tersetorch.methods.factorize.balanced import balanced_kmeans, balanced_labels
from tersetorch.nn import ClusteredConv2d


def network(seed=0):
    torch.manual_seed(seed)
    layers = nn.Conv2d(3, 12, 5, padding=2), nn.ReLU(), nn.Conv2d(12, 8, 3, stride=2, padding_mode="reflect", padding=1)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 16, 5))


def images(count=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 8, 8, generator=generator).cumsum(3) * torch.tensor([1, 0.3, 0.1])[:, None, None]


def bank(weight):
    """A network of one convolution of that weight, with a bias."""
    filters, channels, kh, kw = weight.shape
    model = nn.Sequential(nn.Conv2d(channels, filters, (kh, kw), padding=1))
    with torch.no_grad():
        model[0].weight.copy_(weight)
    return model


METHODS = {
    "outer product": (lambda m, **more: tt.factorize.outer_product(m, 6, targets="2", **more), 6 * (12 + 9 + 8)),
    "monochromatic": (
        lambda m, **more: tt.factorize.monochromatic(m, 4, targets="2", restarts=5, **more),
        4 * 12 + 8 * 9,
    ),
    "bicluster": (
        lambda m, **more: tt.factorize.bicluster(m, 2, 3, 2, restarts=5, targets="2", **more),
        3 * 2 * 2 * (4 + 9 + 4),
    ),
    "bicluster, svd": (
        lambda m, **more: tt.factorize.bicluster(m, (2, 3), 3, 2, method="svd", restarts=5, targets="2", **more),
        3 * 2 * (2 * 4 + 2 * 3 * 9 + 3 * 4),
    ),
}
cases = pytest.mark.parametrize(("method", "weights"), METHODS.values(), ids=METHODS)


def squared(model, before, counts=None):
    difference = (model[2].weight - before[2].weight).detach().double()
    return float((difference if counts is None else difference * counts).square().sum())


@cases
def test_layers_compute_what_their_weight_does_in_as_many_weights_as_said(method, weights):
    model, before = network().eval(), network().eval()
    bias = before[2].bias
    assert method(model) is model
    layer, dense = model[2], before[2]
    assert type(layer) is ClusteredConv2d and not layer.training
    assert sum(parameter.numel() for parameter in layer.parameters()) == weights + 8
    assert torch.equal(layer.bias, bias)
    x = before[:2](images())
    stand_in = copy.deepcopy(dense)
    with torch.no_grad():
        stand_in.weight.copy_(layer.weight)
    torch.testing.assert_close(layer(x), stand_in(x), atol=1e-5, rtol=1e-4)
    assert 0 < squared(model, before) < float(dense.weight.square().sum().detach())
    again = method(network().eval())
    for one, other in zip(model.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other)


@cases
def test_each_metric_lowers_its_own_measure(method, weights):
    before = network()
    data = [images(seed=seed) for seed in range(4)]
    counts = {"2": torch.rand(before[2].weight.shape, generator=torch.Generator().manual_seed(0)) ** 4}

    def outputs(model):
        # All patches, as prune.obs takes them.
        inputs = torch.cat([before[:2](x) for x in data])
        return float((model[2](inputs) - before[2](inputs)).square().sum().detach())

    plain, seen, counted = (method(network(), **more) for more in ({}, {"data": data}, {"importance": counts}))
    assert outputs(seen) < 0.9 * outputs(plain)
    assert squared(counted, before, counts["2"]) < squared(plain, before, counts["2"])
    assert squared(plain, before) <= min(squared(seen, before), squared(counted, before))


def test_an_outer_product_is_found():
    torch.manual_seed(0)
    f, c, s = torch.randn(7), torch.randn(5), torch.randn(3, 3)
    weight = f[:, None, None, None] * c[:, None, None] * s
    model = tt.factorize.outer_product(bank(weight), 1)
    torch.testing.assert_close(model[0].weight, weight, atol=1e-6, rtol=1e-5)
    orthogonal = [torch.linalg.qr(torch.randn(n, 3)).Q for n in (7, 5, 9)]
    weight = torch.einsum("fk,ck,sk,k->fcs", *orthogonal, torch.tensor([3.0, 2.0, 1.0])).view(7, 5, 3, 3)
    model = tt.factorize.outer_product(bank(weight), 3)
    torch.testing.assert_close(model[0].weight, weight, atol=1e-5, rtol=1e-4)


def test_more_terms_are_nearer_and_energy_takes_as_many_as_it_needs():
    before = network()
    errors = [squared(tt.factorize.outer_product(network(), rank, targets="2"), before) for rank in (1, 2, 4, 8)]
    assert errors == sorted(errors, reverse=True)
    length = float(before[2].weight.square().sum().detach())
    found = tt.factorize.outer_product(network(), energy={"2": 0.5})
    rank = found[2].rank
    fewer = tt.factorize.outer_product(network(), {"2": rank - 1})
    assert squared(found, before) <= 0.5 * length * (1 + 1e-5) < squared(fewer, before)
    assert type(found[0]) is nn.Conv2d


def test_a_zero_weight_stays_zero():
    for method in (
        lambda m: tt.factorize.outer_product(m, 2),
        lambda m: tt.factorize.monochromatic(m, 2, restarts=2),
        lambda m: tt.factorize.bicluster(m, 1, 2, 2, restarts=2),
        lambda m: tt.factorize.bicluster(m, (1, 1), 2, 2, restarts=2, method="svd"),
    ):
        model = method(bank(torch.zeros(8, 4, 3, 3)))
        weight = model[0].weight
        assert bool(weight.isfinite().all()) and float(weight.abs().max()) < 1e-20


@pytest.mark.parametrize("dead", [np.s_[:], np.s_[:4], np.s_[:, :2]], ids=["all", "filters", "channels"])
def test_what_is_dead_stays_so_in_any_metric(dead):
    torch.manual_seed(0)
    weight = torch.randn(8, 4, 3, 3)
    weight[dead] = 0
    x, counts = torch.randn(4, 4, 6, 6), torch.rand(8, 4, 3, 3)
    for method in (
        lambda m, **more: tt.factorize.outer_product(m, 2, iterations=4, **more),
        lambda m, **more: tt.factorize.monochromatic(m, 4, restarts=2, **more),
        lambda m, **more: tt.factorize.bicluster(m, 1, 2, 2, restarts=2, iterations=4, **more),
        lambda m, **more: tt.factorize.bicluster(m, (1, 1), 2, 2, restarts=2, method="svd", **more),
        lambda m, **more: tt.factorize.svd(m, 2, **more),
    ):
        seen, counted = (method(bank(weight), **m)[0].weight for m in ({"data": [x]}, {"importance": {"0": counts}}))
        with torch.no_grad():
            left, whole = (functional.conv2d(x, w, padding=1).square().sum() for w in (seen - weight, weight))
            assert left <= whole
            assert (counts * (counted - weight)).square().sum() <= (counts * weight).square().sum()


def test_colours_are_found_whatever_their_sign_and_order():
    torch.manual_seed(0)
    colours, labels = torch.randn(4, 3), torch.randperm(12) % 4
    weight = colours[labels][:, :, None, None] * torch.randn(12, 1, 5, 5)
    model = tt.factorize.monochromatic(bank(weight), 4, restarts=20)
    torch.testing.assert_close(model[0].weight, weight, atol=1e-5, rtol=1e-4)
    assert model[0].first.weight.shape == (4, 3, 1, 1) and model[0].middle.groups == 4
    # As many colours as filters: each filter's own best, the leading singular value of each.
    before = network()
    each = tt.factorize.monochromatic(network(), 12, targets="0")
    values = np.linalg.svd(before[0].weight.detach().double().flatten(2).numpy(), compute_uv=False)
    error = float((each[0].weight - before[0].weight).square().sum().detach())
    assert error == pytest.approx(float(np.square(values[:, 1:]).sum()), rel=1e-4)


def test_colours_of_many_channels_take_no_matrix_of_them():
    """Of 8192 channels the products of all pairs were 512 MiB a filter."""
    torch.manual_seed(0)
    colours = torch.randn(2, 8192)
    weight = (colours.repeat_interleave(3, 0) * torch.randn(6, 1))[:, :, None, None]
    model = tt.factorize.monochromatic(bank(weight), 2, restarts=2)
    torch.testing.assert_close(model[0].weight, weight, atol=1e-5, rtol=1e-4)


def test_blocks_are_found():
    torch.manual_seed(0)
    planted = ClusteredConv2d(8, 12, 3, 1, 2, 3)
    with torch.no_grad():
        planted.first.weight.copy_(1 + 0.1 * torch.randn_like(planted.first.weight))
        planted.last.weight.copy_(1 + 0.1 * torch.randn_like(planted.last.weight))
        planted.input_order.copy_(torch.randperm(8))
        planted.output_order.copy_(torch.randperm(12))
        weight = planted.weight
    model = tt.factorize.bicluster(bank(weight), 1, 2, 3, restarts=20)
    torch.testing.assert_close(model[0].weight, weight, atol=1e-5, rtol=1e-4)
    model = tt.factorize.bicluster(bank(weight), (1, 1), 2, 3, restarts=20, method="svd")
    torch.testing.assert_close(model[0].weight, weight, atol=1e-5, rtol=1e-4)


def test_a_block_of_full_ranks_is_the_weight():
    before = network()
    model = tt.factorize.bicluster(network(), (4, 4), 3, 2, method="svd", restarts=2, targets="2")
    assert (model[2].weight - before[2].weight).abs().max() < 1e-6


def test_clusters_are_of_one_size_and_the_best_there_are():
    generator = np.random.default_rng(0)
    for seed in range(5):
        points = generator.standard_normal((6, 2))

        def spread(groups, points=points):
            return sum(float(np.square(points[g] - points[g].mean(0)).sum()) for g in groups)

        labels = balanced_kmeans(points, 2, restarts=10, iterations=100, seed=seed)
        assert np.bincount(labels).tolist() == [3, 3] and labels[0] == 0
        halves = [(list(g), [i for i in range(6) if i not in g]) for g in combinations(range(6), 3)]
        best = min(spread(half) for half in halves)
        found = spread([np.flatnonzero(labels == k) for k in range(2)])
        assert found == pytest.approx(best)
    costs = generator.random((30, 5))
    assert np.bincount(balanced_labels(costs)).tolist() == [6] * 5
    assert balanced_labels(np.array([[0.0, 9], [1, 2], [3, 9], [4, 0]])).tolist() == [0, 1, 0, 1]


# ---- gradients, layer by layer


def test_gradient_sizes_are_those_of_single_samples():
    model = network()
    model[0].weight.requires_grad_(False)
    data = [(images(3, seed), torch.tensor([0, 1, 2])) for seed in range(2)]
    found = tt.factorize.gradient_sizes(model, data, "cross_entropy", targets=["0", "4"])
    assert not model[0].weight.requires_grad and all(parameter.grad is None for parameter in model.parameters())
    twin = network()
    totals = {"0": 0, "4": 0}
    for x, y in data:
        for index in range(3):
            twin.zero_grad()
            functional.cross_entropy(twin(x[index : index + 1]), y[index : index + 1]).backward()
            for name in totals:
                totals[name] = totals[name] + twin[int(name)].weight.grad.double().square()
    for name, total in totals.items():
        torch.testing.assert_close(found[name], total.sqrt().float(), atol=1e-6, rtol=1e-4)
    keyed = [{"input": x, "target": y} for x, y in data]
    again = tt.factorize.gradient_sizes(model, keyed, functional.cross_entropy, targets=["0", "4"])
    assert all(torch.equal(again[name], found[name]) for name in found)


def test_layer_by_layer_freezes_what_is_below():
    model, seen = network(), []

    def retrain(model, name):
        before = copy.deepcopy(model.state_dict())
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.1, weight_decay=0.1)
        model(images()).square().mean().backward()
        optimizer.step()
        seen.append((name, {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}))

    tt.factorize.layer_by_layer(
        model, ["0", "2", "4"], lambda model, name: tt.factorize.svd(model, 2, targets=name), retrain
    )
    assert seen == [
        ("0", {"2.weight", "2.bias", "4.weight", "4.bias"}),
        ("2", {"4.weight", "4.bias"}),
    ]
    assert all(parameter.requires_grad for parameter in model.parameters()) and model[4].rank == 2


def test_what_was_frozen_before_stays_frozen():
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 4))
    model[0][0].bias.requires_grad_(False)
    with pytest.raises(RuntimeError), tt.factorize.frozen_up_to(model, "0.0"):
        flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        assert not flags["0.0.weight"] and flags["0.1.weight"] and flags["1.bias"]
        raise RuntimeError
    assert [parameter.requires_grad for parameter in model.parameters()] == [True, False, True, True, True, True]


# ---- bad input

F = tt.factorize
REFUSED = [
    (lambda m: F.outer_product(m), ValueError, "exactly one of rank and energy must be given, got none"),
    (lambda m: F.outer_product(m, 0), ValueError, "rank of '0' must be from 1 to 36, got 0"),
    (lambda m: F.outer_product(m, {"2": 73}), ValueError, "rank of '2' must be from 1 to 72, got 73"),
    (lambda m: F.outer_product(m, energy=0), ValueError, r"energy of '0' must be in \(0, 1\], got 0"),
    (lambda m: F.outer_product(m, 2, targets="4"), ValueError, "must be that of an nn.Conv2d, got Linear.weight"),
    (lambda m: F.outer_product(m, 2, iterations=0), ValueError, "iterations must be at least 1, got 0"),
    (lambda m: F.outer_product(m, 2, data=[], importance={}), ValueError, "data must be left out where importance"),
    (lambda m: F.outer_product(m, 2, data=[]), ValueError, "data must hold at least one batch, got none"),
    (lambda m: F.monochromatic(m, 5), ValueError, "colours must divide the 12 filters of '0', got 5"),
    (lambda m: F.monochromatic(m, 0), ValueError, "colours of '0' must be from 1 to 12, got 0"),
    (lambda m: F.monochromatic(m, {"0": 4}, targets="0"), ValueError, "colours must be one number where targets"),
    (lambda m: F.bicluster(m, 1, 2, 2), ValueError, "in_clusters must divide the 3 channels of '0', got 2"),
    (lambda m: F.bicluster(m, 1, 3, 5), ValueError, "out_clusters must divide the 12 filters of '0', got 5"),
    (lambda m: F.bicluster(m, 99, 3, 2, targets="2"), ValueError, "rank of '2' must be from 1 to 16, got 99"),
    (lambda m: F.bicluster(m, 1, 3, 2, method="cp"), ValueError, "method must be one of outer_product, svd, got 'cp'"),
    (lambda m: F.bicluster(m, 1, 3, 2, method="svd"), TypeError, "rank must be two ints for svd, got 1"),
    (lambda m: F.bicluster(m, (5, 1), 3, 2, method="svd", targets="2"), ValueError, r"rank\[0\] of '2' must be from"),
    (lambda m: F.bicluster(m, (2, 1), 1, 2, method="svd", targets="5"), ValueError, r"rank\[0\] of '5' .* from 1 to 1"),
    (lambda m: F.bicluster(m, 1, 3, 2, restarts=0), ValueError, "restarts must be at least 1, got 0"),
    (lambda m: F.gradient_sizes(m, [], "cross_entropy"), ValueError, "data must hold at least one sample, got none"),
    (lambda m: F.gradient_sizes(m, [images()], "mse"), TypeError, r"data must give \(inputs..., target\)"),
    (lambda m: F.gradient_sizes(m, [], "mean"), ValueError, "loss must be one of"),
    (lambda m: F.layer_by_layer(m, "0", print, print), TypeError, "layers must be a list of paths, got '0'"),
    (lambda m: F.layer_by_layer(m, ["2", "0"], print, print), ValueError, "must be in the model's order"),
    (lambda m: F.layer_by_layer(m, ["9"], print, print), ValueError, "layers must hold paths of modules in model"),
    (lambda m: F.layer_by_layer(m, ["0"], None, print), TypeError, "approximate must be callable, got NoneType"),
]


@pytest.mark.parametrize(("act", "error", "sentence"), REFUSED, ids=[case[2] for case in REFUSED])
def test_bad_input_is_refused_and_changes_nothing(act, error, sentence):
    model = network().append(nn.Conv2d(4, 8, 1))
    before = list(model.modules())
    with pytest.raises(error, match=sentence):
        act(model)
    assert list(model.modules()) == before


def test_groups_are_refused_by_name_and_passed_over_else():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3))
    with pytest.raises(ValueError, match="the weight of '0' must be of one group, got 2"):
        tt.factorize.outer_product(model, 2, targets="0")
    tt.factorize.outer_product(model, 2)
    assert [type(layer) for layer in model] == [nn.Conv2d, ClusteredConv2d]
