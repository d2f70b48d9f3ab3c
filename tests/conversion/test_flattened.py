"""convert on flattened convolutions: the fused op against the chain of torch's."""

import copy

import pytest
import torch
from torch import nn

import tersetorch as tt
from tersetorch.conversion.candidates import CANDIDATES
from tersetorch.conversion.walk import find_sites, groups_of
from tersetorch.nn import FlattenedConv2d


def network():
    torch.manual_seed(0)
    first = FlattenedConv2d(3, 16, 5, padding="same", stages=2)
    return nn.Sequential(first, nn.ReLU(), FlattenedConv2d(16, 16, 3, padding=1), nn.Flatten(), nn.Linear(16 * 64, 4))


def test_told_by_name_and_back():
    model, x = network().eval(), torch.randn(2, 3, 8, 8)
    before = copy.deepcopy(model.state_dict())
    converted = tt.convert(model, x, plan={"0": "flattened_conv2d"})
    assert [converted[i].layout for i in (0, 2)] == ["fused", "chain"] and model[0].layout == "chain"
    assert all(torch.equal(before[name], tensor) for name, tensor in converted.state_dict().items())
    assert converted[0].relu and type(converted[1]) is nn.Identity and not model[0].relu
    with torch.no_grad():
        torch.testing.assert_close(converted(x), model(x), rtol=1e-4, atol=1e-5)
        assert converted[0].packed_0 is not None
    again = tt.convert(converted, x, plan={"2": "flattened_conv2d"})
    assert [again[i].layout for i in (0, 2)] == ["chain", "fused"]
    assert not again[0].relu and type(again[1]) is nn.ReLU and again[1].inplace
    assert tt.report(again).plan == {"0": "dense", "2": "flattened_conv2d", "4": "dense"}


def test_its_own_relu_stays():
    model = network().eval()
    model[2].relu = True
    assert tt.convert(model, plan={"0": "flattened_conv2d"})[2].relu
    with pytest.raises(ValueError, match="a ReLU of its own"):
        tt.convert(model, plan={"2": "flattened_conv2d"})
    model[2].pack("fused")  # without an nn.Identity behind it nobody knows whose it is
    assert (again := tt.convert(model, plan={"0": "flattened_conv2d"})[2]).relu and again.layout == "fused"


def test_measured():
    model, x = network(), torch.randn(2, 3, 8, 8)
    converted = tt.convert(model, x, cache=False)
    layers = {layer.name: layer for layer in tt.report(converted).layers}
    trial = next(trial for trial in layers["0"].trials if trial.format == "flattened_conv2d")
    assert trial.max_difference < 1e-4 and converted.training and converted[0].lateral_0.requires_grad
    converted.train()
    assert converted(x).requires_grad


def test_tied_factors_go_together():
    model = network()
    model[2] = FlattenedConv2d(16, 16, 3, padding=1)
    twin = FlattenedConv2d(16, 16, 3, padding=1)
    for name in list(twin._parameters):
        setattr(twin, name, model[2]._parameters[name])
    model.insert(3, twin)
    groups = [[site.name for site in group] for group in groups_of(find_sites(model, CANDIDATES))]
    assert ["2", "3"] in groups
    converted = tt.convert(model.eval(), plan={"2": "flattened_conv2d", "3": "flattened_conv2d"})
    assert converted[2].lateral_0 is converted[3].lateral_0 and converted[3].layout == "fused"
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(converted(x), model(x), rtol=1e-4, atol=1e-5)
