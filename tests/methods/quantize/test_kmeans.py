import re

import numpy as np
import pytest
import torch
from scipy.cluster.vq import kmeans2
from torch import nn

from tersetorch.methods import finalize, prune, quantize
from tersetorch.methods.parametrization import is_live, live_weight


def compressed(module):
    return live_weight(module, "weight").compressed


@pytest.mark.parametrize("init", ["exact", "linear", "density", "random"])
@pytest.mark.parametrize("bits", [1, 2, 5, 8])
@pytest.mark.parametrize("pruned", [False, True])
def test_a_layer_has_at_most_two_to_the_bits_values(mlp, init, bits, pruned):
    if pruned:
        prune.magnitude(mlp, 0.5)
    dense = mlp[0].weight.detach().clone()
    assert quantize.kmeans(mlp, bits, init=init) is mlp
    weight, shared = mlp[0].weight.detach(), compressed(mlp[0])
    assert len(weight.unique()) <= 2**bits
    assert torch.equal(weight == 0, dense == 0)
    assert shared.codes.dtype == torch.uint8 and shared.codes.shape == dense.shape
    assert shared.codebook.shape[0] == 1 and shared.codebook.shape[1] <= 2**bits
    if pruned:
        assert shared.codebook[0, 0] == 0
        assert torch.equal(shared.codes == 0, dense == 0)
    # Each survivor has the nearest value, and each value is its members' mean.
    survivors = dense[dense != 0]
    values = shared.codebook.detach()[0, int(pruned) :]
    nearest = (survivors[:, None].double() - values.double()).abs().argmin(1)
    assert torch.equal(weight[dense != 0], values[nearest])
    means = torch.stack([survivors[nearest == code].double().mean() for code in range(len(values))])
    torch.testing.assert_close(values.double(), means, rtol=1e-6, atol=1e-7)


def test_the_same_as_scipys_lloyd_from_the_same_start(mlp):
    weight = mlp[0].weight.detach().double().flatten().numpy()
    start = np.linspace(weight.min(), weight.max(), 8)
    expected, _ = kmeans2(weight[:, None], start[:, None], iter=1000, minit="matrix", missing="raise")
    quantize.kmeans(mlp, 3, init="linear")
    np.testing.assert_allclose(compressed(mlp[0]).codebook.detach()[0], expected[:, 0], rtol=1e-6)


def test_few_distinct_values_are_kept_to_the_bit(mlp):
    with torch.no_grad():
        mlp[0].weight.copy_((mlp[0].weight * 10).round() / 30)
        mlp[2].weight.zero_()
    dense = [mlp[index].weight.detach().clone() for index in (0, 2)]
    quantize.kmeans(mlp, 4)
    assert torch.equal(mlp[0].weight, dense[0]) and torch.equal(mlp[2].weight, dense[1])
    assert compressed(mlp[2]).codebook.tolist() == [[0.0]]
    quantize.kmeans(mlp, 8)
    assert torch.equal(finalize(mlp)[0].weight, dense[0])


def test_zeros_of_a_finalized_model_stay_zero(mlp, train):
    finalize(prune.magnitude(mlp, 0.7))
    zero = mlp[0].weight == 0
    mlp[0].weight.data[zero] = -0.0
    quantize.kmeans(mlp, 3)
    train(mlp)
    assert torch.equal(mlp[0].weight == 0, zero)
    assert not bool(mlp[0].weight[zero].signbit().any())
    assert len(mlp[0].weight.unique()) == 8


def test_layers_never_share_with_each_other(mlp):
    quantize.kmeans(mlp, 2)
    assert not torch.isin(mlp[0].weight.detach().unique(), mlp[2].weight.detach().unique()).any()


def test_bits_for_each_pattern(mlp):
    quantize.kmeans(mlp, {"0": 4})
    assert type(mlp[2]) is nn.Linear
    quantize.kmeans(mlp, {nn.Linear: 1, "0": 2})
    assert [len(mlp[index].weight.unique()) for index in (0, 2)] == [4, 2]
    quantize.kmeans(mlp, 1, targets="0")
    assert [len(mlp[index].weight.unique()) for index in (0, 2)] == [2, 2]


def test_the_same_seed_gives_the_same_codes(make_mlp):
    def codes(seed):
        model = quantize.kmeans(make_mlp(), 4, init="random", seed=seed)
        return compressed(model[0]).codes

    assert torch.equal(codes(3), codes(3))
    assert not torch.equal(codes(3), codes(4))


def test_the_global_generators_are_left_alone(mlp):
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    quantize.kmeans(mlp, 4, init="random")
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])


def test_pruning_afterwards_takes_members_out(mlp):
    quantize.kmeans(prune.magnitude(mlp, 0.5), 3)
    values = mlp[0].weight.detach().unique()
    prune.magnitude(mlp, 0.9)
    assert int(mlp[0].weight.count_nonzero()) == 34
    assert torch.isin(mlp[0].weight.detach().unique(), values).all()


def test_convolutions_and_empty_layers():
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last), nn.Linear(0, 3), nn.Linear(1, 1)])
    quantize.kmeans(model, 2)
    assert len(model[0].weight.unique()) == 4
    assert model[1](torch.ones(2, 0)).shape == (2, 3)
    assert model[0](torch.ones(1, 3, 5, 5)).shape == (1, 8, 3, 3)
    finalize(model)
    for per in ("tensor", "row", 2):
        empty = quantize.kmeans(nn.Linear(4, 0), 2, per=per)
        assert empty(torch.ones(2, 4)).shape == (2, 0)


@pytest.mark.parametrize("layer", [nn.Linear(4, 3), nn.Conv2d(4, 3, 1)])
def test_data_that_does_not_fit_a_layer_is_refused(layer):
    x = torch.ones(2, 5) if isinstance(layer, nn.Linear) else torch.ones(2, 5, 1, 1)
    with pytest.raises(
        ValueError, match=r"quantize\.kmeans: data must give the layer .* inputs of 4 weights each, got 5"
    ):
        quantize.kmeans(nn.Sequential(layer), 2, data=[x])
    with pytest.raises(
        ValueError, match=r"quantize\.product: data must give the layer .* inputs of 4 weights each, got 5"
    ):
        quantize.product(nn.Sequential(layer), 2, data=[x])
    assert not is_live(layer)


def test_progress_shows_a_bar(mlp, capsys):
    quantize.kmeans(mlp, 2, progress=True)
    assert "sharing weights" in capsys.readouterr().out


def test_codebook_gradients_lower_the_loss(mlp, train):
    prune.magnitude(mlp, 0.5)
    quantize.kmeans(mlp, 2)
    x = torch.randn(64, 20)
    codes = compressed(mlp[0]).codes.clone()
    before = mlp(x).square().mean().item()
    train(mlp, steps=20)
    assert mlp(x).square().mean().item() < before
    assert torch.equal(compressed(mlp[0]).codes, codes)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"bits": 0}, ValueError, "bits must be from 1 to 8, got 0; pass a number in that range"),
        ({"bits": 9}, ValueError, "bits must be from 1 to 8, got 9"),
        ({"bits": 4.0}, TypeError, "bits must be an int, got 4.0"),
        ({"bits": True}, TypeError, "bits must be an int, got True"),
        ({"bits": {"0": 9}}, ValueError, "bits['0'] must be from 1 to 8, got 9"),
        ({"bits": {}}, ValueError, "bits must name at least one layer"),
        ({"bits": {"fc": 3}}, ValueError, "bits must match weights of two or more dimensions, got 'fc'"),
        ({"bits": {"0": 3}, "targets": "0"}, ValueError, "bits must be one number where targets is given"),
        ({"init": "best"}, ValueError, "init must be one of exact, linear, density, random, got 'best'"),
        ({"iterations": 0}, ValueError, "iterations must be at least 1, got 0"),
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
        ({"seed": None}, TypeError, "seed must be an int, got None"),
        ({"targets": "fc"}, ValueError, "targets must match"),
    ],
)
def test_bad_arguments_are_refused_and_change_nothing(mlp, arguments, error, message):
    with pytest.raises(error, match=f"quantize.kmeans: {re.escape(message)}"):
        quantize.kmeans(mlp, **arguments)
    assert not is_live(mlp)


def test_a_weight_with_nan_is_refused_before_anything_changes(mlp):
    mlp[2].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"quantize\.kmeans: the weight of '2' must be finite, got NaN or infinity"):
        quantize.kmeans(mlp, 3)
    assert not is_live(mlp)


@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("init", ["exact", "linear"])
def test_values_that_bfloat16_rounds_to_infinity_become_its_largest(bits, init):
    layer = nn.Linear(20, 10)
    with torch.no_grad():
        layer.weight[0, 0], layer.weight[1, 1] = 3.4e38, -3.4e38
    shared = finalize(quantize.kmeans(layer, bits, bfloat16=True, init=init)).weight.detach()
    largest = torch.finfo(torch.bfloat16).max
    assert (float(shared[0, 0]), float(shared[1, 1])) == (largest, -largest)
    assert torch.equal(shared.bfloat16().float(), shared)
    kept = shared.flatten()[1:]
    assert bool(kept.isfinite().all()) and bool(kept.any())
