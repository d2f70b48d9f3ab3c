"""Layers of factors: multiplied out where that is faster, or each factor in a format of its own."""

import copy

import pytest
import torch
from torch import nn

import tersetorch as tt
from tersetorch.nn import ClusteredConv2d, LowRankConv2d, LowRankLinear, SparseLinear


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        LowRankConv2d(3, 8, 3, 4, padding=1, form="separable"),
        nn.ReLU(),
        ClusteredConv2d(8, 8, 3, 2, 2, 4, stride=2, bias=False),
        nn.Flatten(),
        LowRankLinear(72, 30, 6),
        nn.ReLU(),
        nn.Linear(30, 4),
    ).eval()


x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def chosen(model):
    return {layer.name: layer.chosen for layer in tt.report(model).layers}


def test_multiplied_out_where_that_is_faster(timer):
    timer.seconds |= {"multiplied_out_linear": 5e-4, "multiplied_out_clusters": 5e-4}
    model = net()
    model[4].second.weight.requires_grad_(False)
    fast = tt.convert(model, x)
    assert [type(layer) for layer in fast][:5:2] == [LowRankConv2d, nn.Conv2d, nn.Linear]
    assert not fast[4].weight.requires_grad and not fast[4].training and fast[2].bias is None
    torch.testing.assert_close(fast(x), model(x), atol=1e-5, rtol=1e-4)
    report = tt.report(fast)
    reasons = {layer.name: layer.reason for layer in report.layers}
    assert chosen(fast)["4"] == "multiplied_out_linear" and chosen(fast)["2"] == "multiplied_out_clusters"
    assert "faster" in reasons["4"] and reasons["4.first"] == "a factor of a layer that is multiplied out"
    assert chosen(fast)["0"] == "dense" and "multiplied_out_conv2d not faster" in reasons["0"]
    again = tt.convert(model, plan=report.plan)
    assert chosen(again) == chosen(fast) and torch.equal(again(x), fast(x))
    assert type(model[4]) is LowRankLinear


def test_factors_get_formats_of_their_own(timer):
    model = net()
    with torch.no_grad():
        model[4].first.weight[:, 5:] = 0
    fast = tt.convert(model, x)
    assert type(fast[4]) is LowRankLinear and type(fast[4].first) is SparseLinear and chosen(fast)["4.first"] == "csr"
    torch.testing.assert_close(fast(x), model(x), atol=1e-5, rtol=1e-4)
    # Once more: the whole layer would lose what its factor is.
    again = tt.convert(fast, plan="multiplied_out")
    assert type(again[4]) is nn.Linear
    kept = copy.deepcopy(model)
    kept[4].first.register_forward_hook(lambda *_: None)
    report = tt.report(tt.convert(kept, x))
    reason = next(layer.reason for layer in report.layers if layer.name == "4")
    assert reason == "its factor first carries hooks or a forward of its own, which would be lost"


def test_another_rank_is_measured_anew(timer):
    timer.seconds["multiplied_out_linear"] = 5e-4
    torch.manual_seed(0)
    for rank in (3, 4):
        before = timer.count("multiplied_out_linear")
        tt.convert(nn.Sequential(LowRankLinear(20, 20, rank), nn.ReLU()).eval(), torch.randn(2, 20))
        assert timer.count("multiplied_out_linear") > before
    before = timer.count("multiplied_out_linear")
    tt.convert(nn.Sequential(LowRankLinear(20, 20, 4), nn.ReLU()).eval(), torch.randn(2, 20))
    assert timer.count("multiplied_out_linear") == before


def test_told_for_all_or_by_name():
    model = net()
    fast = tt.convert(model, plan="multiplied_out")
    assert [type(layer) for layer in fast][:5:2] == [nn.Conv2d, nn.Conv2d, nn.Linear]
    torch.testing.assert_close(fast(x), model(x), atol=1e-5, rtol=1e-4)
    some = tt.convert(model, plan={"0": "multiplied_out_conv2d", "4.second": "csr"})
    assert type(some[0]) is nn.Conv2d and type(some[4].second) is SparseLinear and type(some[2]) is ClusteredConv2d
    with pytest.raises(ValueError, match="it runs a LowRankConv2d, not a LowRankLinear"):
        tt.convert(model, plan={"4": "multiplied_out_conv2d"})


def test_weights_that_are_products_become_factors_by_name():
    model = net()
    plain = tt.convert(model, plan="multiplied_out")
    plain[4].bias.requires_grad_(False)
    factors = tt.convert(plain, plan="low_rank")
    # Four terms of 3 x 3 separable filters and one for each pair of clusters are no low rank as [out, rest].
    assert [type(layer) for layer in factors][:5:2] == [nn.Conv2d, nn.Conv2d, LowRankLinear]
    assert factors[4].rank == 6 and factors[4].bias is not plain[4].bias and not factors[4].bias.requires_grad
    assert factors[4].first.weight.requires_grad
    torch.testing.assert_close(factors(x), model(x), atol=1e-5, rtol=1e-4)
    reasons = {layer.name: layer.reason for layer in tt.report(factors).layers}
    assert "its rank is 4, and factors would be larger" in reasons["6"]
    with pytest.raises(ValueError, match="its rank is 4, and factors would be larger"):
        tt.convert(plain, plan={"6": "low_rank_linear"})
    assert chosen(tt.convert(plain, plan={"4": "low_rank_linear"}))["4"] == "low_rank_linear"


def test_tied_products_share_their_factors():
    torch.manual_seed(0)
    model = nn.Sequential(LowRankLinear(20, 20, 3).to_dense(), nn.Linear(20, 20))
    model[1].weight = model[0].weight
    factors = tt.convert(model, plan="low_rank")
    assert factors[0].first.weight is factors[1].first.weight and factors[0].second.weight is factors[1].second.weight
    assert torch.equal(factors[1].bias, model[1].bias) and not torch.equal(factors[0].bias, factors[1].bias)
    x = torch.randn(3, 20)
    torch.testing.assert_close(factors(x), model(x))
