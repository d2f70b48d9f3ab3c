"""Flattened convolutions in files: written, read back to the bit, layout and all, and put into instances."""

import pytest
import torch
from torch import nn

import tersetorch as tt
from tersetorch.nn import FlattenedConv2d


class Net(nn.Module):
    def __init__(self, stride=1):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.conv(x).mean((2, 3)))


def test_come_back_to_the_bit(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(
        FlattenedConv2d(3, 8, (3, 5), padding="full", stages=2),
        nn.ReLU(),
        FlattenedConv2d(8, 6, 3, stride=2, padding=1, rank=2, bias=False),
    ).eval()
    model[0].pack("fused")
    model[2].relu = True
    model[2].lateral_0.requires_grad_(False)
    x = torch.randn(2, 3, 9, 9)
    tt.save(model, tmp_path / "m.terse")
    found = tt.load(tmp_path / "m.terse")
    assert [layer.layout for layer in (found[0], found[2])] == ["fused", "chain"]
    assert not found[2].lateral_0.requires_grad and found[2].relu and not found[0].relu
    with torch.no_grad():
        assert torch.equal(found(x), model(x))
    tt.save(found, tmp_path / "again.terse")
    assert (tmp_path / "again.terse").read_bytes() == (tmp_path / "m.terse").read_bytes()


def test_go_into_an_instance(tmp_path):
    torch.manual_seed(0)
    model = tt.factorize.flatten(Net(), 2).eval()
    model.conv.pack("fused")
    x = torch.randn(2, 3, 9, 9)
    tt.save(model, tmp_path / "m.terse")
    found = tt.load(tmp_path / "m.terse", model=Net())
    with torch.no_grad():
        assert type(found.conv) is FlattenedConv2d and torch.equal(found(x), model(x))
    with pytest.raises(ValueError, match="model must have FlattenedConv2d"):
        tt.load(tmp_path / "m.terse", model=Net(2))
