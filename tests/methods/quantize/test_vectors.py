"""Product and residual quantisation: of tensors, of models, trained, stored in states and taken over by layers."""

import copy

import pytest
import torch
from torch import nn

import tersetorch as tt
from tersetorch.methods import vector_codes
from tersetorch.methods.quantize import product_quantize, residual_quantize


def weight(rows=60, columns=14, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def error(found, dense):
    return (vector_codes.decode(*found, dense.shape[1]) - dense).square().sum().item()


def model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(2, 6, 3), nn.Flatten(), nn.Linear(96, 40), nn.ReLU(), nn.Linear(40, 9))


# ---- tensors


@pytest.mark.parametrize("options, books", [({"sub_vector": 4}, 4), ({"segments": 7}, 7), ({"shared": True}, 1)])
def test_product_codes_are_the_nearest_entries(options, books):
    dense = weight()
    codes, codebooks = product_quantize(dense, 12, **options)
    width = codebooks.shape[2]
    segments = -(-14 // width)
    assert codes.dtype == torch.uint8 and codes.shape == (60, segments)
    assert codebooks.shape == (1, books, width, 12)
    padded = nn.functional.pad(dense, (0, segments * width - 14))
    for s in range(segments):
        table = codebooks[0, 0 if books == 1 else s].T
        part = padded[:, s * width : (s + 1) * width]
        chosen = (part - table[codes[:, s].long()]).square().sum(1)
        assert torch.allclose(chosen, torch.cdist(part, table).amin(1).square(), atol=1e-4)


def test_as_many_entries_as_rows_are_exact():
    dense = weight(20, 6)
    assert error(product_quantize(dense, 20, sub_vector=3), dense) < 1e-8
    assert error(residual_quantize(dense, 1, 20), dense) < 1e-8


def test_more_stages_and_refinements_and_beams_lower_the_error():
    dense = weight(200, 30)
    errors = [error(residual_quantize(dense, stages, 8), dense) for stages in (1, 2, 4)]
    assert errors[0] > errors[1] > errors[2]
    assert error(residual_quantize(dense, 4, 8, refinements=0), dense) > errors[2]
    assert error(residual_quantize(dense, 4, 8, refinements=0, beam=1), dense) > errors[2]


def test_seeds_decide():
    dense = weight()
    for quantize in (product_quantize, lambda w, k, seed: residual_quantize(w, 2, k, seed=seed)):
        first, again, other = (quantize(dense, 9, seed=seed) for seed in (3, 3, 4))
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
        assert not torch.equal(first[0], other[0])


def test_moments_lower_the_error_of_outputs():
    dense = weight(80, 8)
    x = torch.randn(500, 8, generator=torch.Generator().manual_seed(1)) * torch.logspace(-2, 1, 8)
    moments = x.T @ x

    def output_error(found):
        return (x @ (vector_codes.decode(*found, 8) - dense).T).square().sum().item()

    for quantize in (
        lambda m: product_quantize(dense, 8, sub_vector=4, moments=m),
        lambda m: residual_quantize(dense, 2, 8, moments=m),
    ):
        assert output_error(quantize(moments)) < 0.7 * output_error(quantize(None))


@pytest.mark.parametrize(
    "call, error, sentence",
    [
        (lambda w: product_quantize(w.tolist(), 4), TypeError, "weight must be a float tensor, got list"),
        (lambda w: product_quantize(w[0], 4), ValueError, r"weight must be \[rows, columns\]"),
        (lambda w: product_quantize(w * torch.nan, 4), ValueError, "weight must be finite"),
        (
            lambda w: product_quantize(w, 4, moments=-torch.eye(14)),
            ValueError,
            "product_quantize: moments must be a sum of products",
        ),
        (
            lambda w: residual_quantize(w, 2, 4, moments=torch.diag(torch.tensor([5.0] * 13 + [-5.0]))),
            ValueError,
            "residual_quantize: moments must be a sum of products",
        ),
        (lambda w: product_quantize(w, 0), ValueError, "entries must be from 1 to 256, got 0"),
        (lambda w: product_quantize(w, 257), ValueError, "entries must be from 1 to 256, got 257"),
        (lambda w: product_quantize(w, 61), ValueError, "entries must be at most the 60 rows"),
        (lambda w: product_quantize(w, 4.0), TypeError, "entries must be an int"),
        (lambda w: product_quantize(w, 4, segments=2, sub_vector=7), ValueError, "segments must be left out"),
        (lambda w: product_quantize(w, 4, sub_vector=15), ValueError, "sub_vector must be from 1 to 14"),
        (lambda w: product_quantize(w, 4, segments=8), ValueError, "segments must cut 14 columns .* pass 7"),
        (lambda w: product_quantize(w, 4, moments=torch.ones(3, 3)), ValueError, r"moments must be \[14, 14\]"),
        (lambda w: product_quantize(w, 4, shared=True, moments=torch.eye(14)), ValueError, "shared must be False"),
        (lambda w: residual_quantize(w, 0, 4), ValueError, "stages must be at least 1"),
        (lambda w: residual_quantize(w, 2, 4, beam=0), ValueError, "beam must be at least 1"),
        (lambda w: residual_quantize(w, 2, 61), ValueError, "entries must be at most the 60 rows"),
    ],
)
def test_bad_arguments_are_refused(call, error, sentence):
    with pytest.raises(error, match=sentence):
        call(weight())


# ---- models


METHODS = pytest.mark.parametrize(
    "share, layer",
    [
        (lambda net, **options: tt.quantize.product(net, 8, sub_vector=3, **options), tt.nn.ProductLinear),
        (lambda net, **options: tt.quantize.residual(net, 2, 8, **options), tt.nn.ResidualLinear),
    ],
)


@METHODS
def test_a_models_codebooks_train_and_are_baked(share, layer):
    net, x = model(), torch.randn(5, 2, 6, 6)
    optimizer = torch.optim.SGD(net.parameters(), 0.05)
    before = copy.deepcopy(net)
    assert share(net) is net
    assert not torch.equal(net(x), before(x))
    codes = net[2].parametrizations.weight[0].codes.clone()
    first = net[2].weight.detach().clone()
    net(x).square().sum().backward()
    optimizer.step()
    assert torch.equal(net[2].parametrizations.weight[0].codes, codes) and not torch.equal(net[2].weight, first)
    taken = layer.from_dense(net[2])
    assert torch.equal(taken.weight, net[2].weight)
    y = net(x)
    tt.finalize(net)
    assert torch.equal(net(x), y) and type(net[2]) is nn.Linear and net[2].weight.requires_grad


@METHODS
def test_states_come_back(share, layer):
    net, x = share(model()), torch.randn(5, 2, 6, 6)
    state, y = copy.deepcopy(net.state_dict()), net(x)
    for other in (model(1), share(model(1)), tt.quantize.kmeans(model(1), 2)):
        if not hasattr(other[0], "parametrizations"):
            continue
        other.load_state_dict(state)
        assert torch.equal(other(x), y)
    dense = tt.finalize(copy.deepcopy(net)).state_dict()
    net.load_state_dict(dense)
    assert torch.allclose(net(x), y, atol=1e-5)
    net.load_state_dict(model(2).state_dict())  # quantised anew
    assert net[2].parametrizations.weight[0].codes.shape == state["2.parametrizations.weight.0.codes"].shape
    state["2.parametrizations.weight.0.codes"][0, 0] = 8
    with pytest.raises(RuntimeError, match=r"codes must lie in \[0, 8\), got 8"):
        net.load_state_dict(state)


@METHODS
def test_data_weighs_inputs(share, layer):
    x = torch.randn(64, 6) * torch.logspace(-1, 1, 6)
    nets = [nn.Linear(6, 80) for _ in range(3)]
    for net in nets:
        net.load_state_dict(nets[0].state_dict())
    plain, weighted, dense = share(nets[0]), share(nets[1], data=[x]), nets[2]

    def distance(net):
        return (net(x) - dense(x)).square().mean()

    assert distance(weighted) < distance(plain)


def test_bad_models_and_arguments_are_refused():
    net = model()
    state = copy.deepcopy(net.state_dict())
    for call, sentence in (
        (lambda: tt.quantize.product(net, 0), "entries must be from 1 to 256"),
        (lambda: tt.quantize.product(net, sub_vector=30), "0: sub_vector must be from 1 to 18"),
        (lambda: tt.quantize.product(net, targets="nothing"), "targets must match"),
        (lambda: tt.quantize.product(net, shared=True, data=[torch.ones(1)]), "shared must be False where data"),
        (lambda: tt.quantize.residual(net, 0), "stages must be at least 1"),
        (lambda: tt.quantize.residual(net, seed=-1), "seed must be at least 0"),
        (lambda: tt.quantize.product(nn.Linear(0, 3)), "must hold numbers"),
    ):
        with pytest.raises(ValueError, match=sentence):
            call()
    assert state.keys() == net.state_dict().keys()
    # Fewer rows than entries: one for each row.
    tt.quantize.product(net, 256, targets="4")
    assert torch.allclose(net[4].weight, state["4.weight"], atol=1e-6)
