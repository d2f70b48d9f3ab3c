"""Layers of factors in files: written, read back to the bit, put into instances, and refused where damaged."""

import pytest
import torch
from torch import nn

import tersetorch as tt
from tersetorch.nn import ClusteredConv2d, LowRankConv2d, LowRankLinear
from tersetorch.storage import TerseFileError


def layers():
    torch.manual_seed(0)
    model = nn.Sequential(
        LowRankConv2d(3, 8, 3, 4, padding=1, form="separable"),
        nn.ReLU(),
        ClusteredConv2d(8, 12, 3, (2, 3), 2, 4, stride=2, form="svd", padding_mode="circular", padding=1),
        ClusteredConv2d(12, 4, (3, 1), out_clusters=2, form="monochromatic", bias=False),
        nn.Flatten(),
        LowRankLinear(4 * 2 * 4, 10, 5),
    )
    model[2].input_order.copy_(torch.randperm(8))
    model[5].first.weight.requires_grad_(False)
    return model.eval()


def test_come_back_to_the_bit(tmp_path):
    model, x = layers(), torch.randn(2, 3, 8, 8)
    tt.save(model, tmp_path / "m.terse")
    found = tt.load(tmp_path / "m.terse")
    assert [type(layer) for layer in found] == [type(layer) for layer in model]
    assert torch.equal(found(x), model(x)) and not found[5].first.weight.requires_grad
    tt.save(found, tmp_path / "again.terse")
    assert (tmp_path / "again.terse").read_bytes() == (tmp_path / "m.terse").read_bytes()


class Net(nn.Module):
    """Factors come before modules that are named twice."""

    def __init__(self, hidden=8, bias=True):
        super().__init__()
        self.first = nn.Linear(hidden, 8, bias)
        self.second = self.third = nn.Linear(8, 8)
        self.conv = nn.Conv2d(1, 4, 3, padding=1)

    def forward(self, x):
        y = self.third(self.second(self.first(x)))
        return self.conv(y[:, None, None])


def test_go_into_an_instance(tmp_path):
    torch.manual_seed(0)
    model = tt.factorize.svd(Net(), 2, targets=["first", "conv"])
    tt.save(model, tmp_path / "m.terse")
    found, x = tt.load(tmp_path / "m.terse", model=Net()), torch.randn(3, 8)
    assert type(found.first) is LowRankLinear and found.second is found.third and torch.equal(found(x), model(x))
    for other in (Net(9), Net(bias=False)):
        with pytest.raises(ValueError, match="model must have LowRankLinear"):
            tt.load(tmp_path / "m.terse", model=other)


def test_zoo_networks_are_rebuilt(tmp_path):
    torch.manual_seed(0)
    model, x = tt.zoo.LeNet5().eval(), torch.randn(2, 1, 28, 28)
    tt.factorize.svd(model, {"conv2": 10, "fc1": 20})
    tt.save(model, tmp_path / "m.terse")
    found = tt.load(tmp_path / "m.terse")
    assert type(found) is tt.zoo.LeNet5 and type(found.fc1) is LowRankLinear and torch.equal(found(x), model(x))


def test_orders_that_are_none_are_refused(tmp_path):
    model = layers()
    model[2].output_order[0] = 12
    tt.save(model, tmp_path / "m.terse")
    with pytest.raises(TerseFileError, match="output_order must hold each int below 12 once"):
        tt.load(tmp_path / "m.terse")
