"""Weights of shared sub-vectors, and of sums of them, become layers that compute with the codes: told and measured."""

import copy
import functools

import pytest
import torch
from torch import nn

import tersetorch as tt
from tersetorch.conversion import convert, report
from tersetorch.conversion.planner import Planner
from tersetorch.nn import ProductConv2d, ProductLinear, ResidualConv2d, ResidualLinear


def network():
    """Layers by what will be made of them."""
    return copy.deepcopy(made())


@functools.cache
def made():
    torch.manual_seed(0)
    layers = {
        "product": nn.Linear(24, 300),
        "relu": nn.ReLU(),
        "residual": nn.Linear(300, 288),
        "fold": nn.Unflatten(1, (8, 6, 6)),
        "product_conv": nn.Conv2d(8, 40, 3, padding=1),
        "residual_conv": nn.Conv2d(40, 270, 1, stride=5),
        "pool": nn.Flatten(),
        "plain": nn.Linear(270 * 4, 300),
    }
    model = nn.Sequential()
    for name, layer in layers.items():
        model.add_module(name, layer)
    tt.quantize.product(model, 16, sub_vector=6, targets=["product", "product_conv"])
    return tt.quantize.residual(model, 3, 12, targets=["residual*"])


X = torch.randn(3, 24, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("live", [True, False])
def test_a_plan_takes_every_layer_that_can(live):
    model = network() if live else tt.finalize(network())
    dense = tt.finalize(copy.deepcopy(model)).eval()
    for plan, linear, convolution in (
        ("product", ProductLinear, ProductConv2d),
        ("residual", ResidualLinear, ResidualConv2d),
    ):
        fast = convert(model, X, plan=plan).eval()
        with torch.no_grad():
            torch.testing.assert_close(fast(X), dense(X), atol=1e-5, rtol=1e-5)
        expected = {plan: linear, f"{plan}_conv": convolution}
        for name, layer in dense.named_children():
            kind = expected.get(name, nn.Identity if name == "relu" and plan == "product" else type(layer))
            assert type(fast.get_submodule(name)) is kind
            if name in expected:
                assert torch.equal(fast.get_submodule(name).weight, layer.weight)
        assert fast.get_submodule("product" if plan == "product" else "residual").relu == (plan == "product")
        reasons = {layer.name: layer.reason for layer in report(fast).layers}
        refused = {
            "product": "product_linear: its rows share no sub-vectors, at most 256 in each segment of columns",
            "residual": "residual_linear: its rows are no sums that quantize.residual made and nobody changed since",
        }
        assert reasons["plain"] == refused[plan]


@pytest.mark.parametrize(
    ("name", "wanted", "why"),
    [
        ("plain", "product_linear", "its rows share no sub-vectors"),
        ("plain", "residual_linear", "its rows are no sums that quantize.residual made"),
        ("residual", "product_linear", "its rows are sums of shared rows, which quantize.residual made"),
        ("product_conv", "residual_conv2d", "its rows are no sums"),
        ("product_conv", "product_linear", "it runs a Linear, not a Conv2d"),
    ],
)
def test_what_cannot_be_held_is_refused_in_words(name, wanted, why):
    with pytest.raises(ValueError, match=why):
        convert(network(), plan={name: wanted})


def test_sums_that_were_changed_or_rounded_are_refused():
    model = tt.finalize(network())
    narrow = copy.deepcopy(model).bfloat16()
    with torch.no_grad():
        model.residual.weight[0] += 1
    with pytest.raises(ValueError, match="nobody changed since"):
        convert(model, plan={"residual": "residual_linear"})
    with pytest.raises(ValueError, match=r"weights of torch\.bfloat16, which rounds sums of shared rows"):
        convert(narrow, plan={"residual": "residual_linear"})
    # Entries are rounded alike.
    fast = convert(narrow, plan={"product": "product_linear"})
    assert torch.equal(fast.product.weight, narrow.product.weight.float())


def test_files_and_states_do_not_stand_in_the_way(tmp_path):
    model = tt.finalize(network())
    tt.save(model, tmp_path / "m.terse")
    loaded = tt.load(tmp_path / "m.terse")
    plan = {"product": "product_linear", "residual": "residual_linear", "residual_conv": "residual_conv2d"}
    fast = convert(loaded, plan=plan)
    assert {name: report(fast).plan[name] for name in plan} == plan
    tt.save(fast, tmp_path / "fast.terse")
    again = tt.load(tmp_path / "fast.terse").eval()
    with torch.no_grad():
        assert torch.equal(again(X), fast.eval()(X))
    other = tt.finalize(network())
    nn.init.zeros_(other.product.weight)
    other.load_state_dict(model.state_dict())
    assert type(convert(other, plan="product").product) is ProductLinear


def test_tied_layers_share_their_codes():
    model = nn.Sequential(nn.Linear(24, 300), nn.Linear(24, 300))
    model[1].weight = model[0].weight
    tt.quantize.product(model, 16)
    fast = convert(model, plan="product")
    assert fast[0].codebooks is fast[1].codebooks and fast[0].codes is fast[1].codes


def test_a_faster_product_is_chosen_and_one_of_8_bits_where_errors_are_allowed(timer):
    model, x = nn.Sequential(tt.finalize(network()).product), X
    timer.seconds["product_linear"] = timer.seconds["product_linear_int8"] = 3e-4
    fast = convert(model, x, cache=False)
    assert type(fast[0]) is ProductLinear and fast[0].mode == "exact"
    (layer,) = report(fast).layers
    trials = {trial.format: trial.reason for trial in layer.trials}
    assert trials["product_linear_int8"] == "not tried: it rounds, and max_error= allows no error"
    timer.seconds["product_linear"] = 2e-3
    rounded = convert(model, x, max_error=0.1, cache=False)
    assert type(rounded[0]) is ProductLinear and rounded[0].mode == "int8"
    assert report(rounded).plan == {"0": "product_linear_int8"}
    # What was built stays as it is.
    assert type(convert(rounded, x, cache=False)[0]) is ProductLinear
    timer.seconds["product_linear_int8"] = 2e-3
    assert type(convert(model, x, max_error=0.1, cache=False)[0]) is nn.Linear


def test_sums_and_convolutions_are_measured_too(timer):
    model = tt.finalize(network()).eval()
    for name in ("product_linear", "residual_linear", "product_conv2d", "residual_conv2d"):
        timer.seconds[name] = 3e-4
    fast = convert(model, X, cache=False)
    kinds = [ProductLinear, nn.Identity, ResidualLinear, nn.Unflatten, ProductConv2d, ResidualConv2d]
    assert [type(layer) for layer in fast][:6] == kinds


def test_what_other_codes_say_in_fewer_bytes_is_not_measured(timer):
    torch.manual_seed(0)
    linear = nn.Linear(256, 300)
    for change in (lambda: tt.quantize.kmeans(linear, 2), lambda: tt.prune.magnitude(linear, 0.95)):
        nn.init.normal_(linear.weight)
        change()
        tt.finalize(linear)
        planner = Planner(tt.conversion.candidates.CANDIDATES, None, 0, timer, {}, None)
        sites = tt.conversion.walk.find_sites(linear, planner.table)
        trials = {trial.format: trial.reason for trial in planner.decide(sites, [[torch.ones(4, 256)]]).trials}
        assert trials["product_linear"].startswith("not tried: no shared sub-vectors take fewer bytes than")
        assert not any(label.endswith("product_linear") for label in timer.asked)
