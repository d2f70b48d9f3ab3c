"""Layers in fixed point in files: written, read back to the bit, put into an instance, and refused where damaged."""

import pytest
import torch
from torch import nn

import tersetorch as tt
from tersetorch.nn import FixedPointConv2d, FixedPointLinear
from tersetorch.storage import TerseFileError


def layers():
    torch.manual_seed(0)
    conv = FixedPointConv2d.from_dense(nn.Conv2d(3, 6, 3, padding=1, groups=3), "<1,7>", "<3,5>", "<4,12>")
    linear = FixedPointLinear.from_dense(nn.Linear(384, 50, bias=False), "<2,14>", "<6,10>", "<6,10>")
    return nn.Sequential(conv, nn.Flatten(), linear).eval()


def test_come_back_to_the_bit(tmp_path, round_trip):
    model = layers()
    loaded = round_trip(model, torch.randn(2, 3, 8, 8))
    assert repr(loaded) == repr(model)
    found = tt.inspect(tmp_path / "model.terse")
    assert found.parts["biases"] and "steps" in {tensor.name.rpartition(".")[2] for tensor in found.tensors}
    # Trained or drawn, 16-bit steps of a small range take fewer bits.
    assert found.file_bytes < 2 * 384 * 50 + 1000
    tt.save(loaded, tmp_path / "again.terse")
    assert (tmp_path / "again.terse").read_bytes() == (tmp_path / "model.terse").read_bytes()


def test_go_into_an_instance(tmp_path):
    class Net(nn.Module):
        def __init__(self, hidden=50):
            super().__init__()
            self.fc = nn.Linear(384, hidden, bias=False)

        def forward(self, x):
            return self.fc(x)

    model = Net()
    model.fc = layers()[2]
    tt.save(model, tmp_path / "m.terse")
    found, x = tt.load(tmp_path / "m.terse", model=Net()), torch.randn(2, 384)
    assert type(found.fc) is FixedPointLinear and torch.equal(found(x), model(x))
    with pytest.raises(ValueError, match="FixedPointLinear"):
        tt.load(tmp_path / "m.terse", model=Net(51))


def test_notes_of_formats_do_not_hinder(tmp_path):
    model = tt.finalize(tt.quantize.fixed_point(nn.Sequential(nn.Linear(4, 3)), "<2,14>"))
    tt.save(model, tmp_path / "m.terse")
    assert torch.equal(tt.load(tmp_path / "m.terse")[0].weight, model[0].weight)


def test_what_was_compiled_comes_back_by_itself(tmp_path):
    model = tt.zoo.LeNet300100().eval()
    torch.compile(model, backend="eager")
    tt.save(model, tmp_path / "m.terse")
    x = torch.rand(2, 1, 28, 28)
    assert torch.equal(tt.load(tmp_path / "m.terse")(x), model(x))


def test_steps_outside_the_format_are_refused(tmp_path):
    model = layers()
    model[2].weight_format = type(model[2].weight_format)(2, 4)  # of 6 bits, which the steps are not
    tt.save(model, tmp_path / "m.terse")
    with pytest.raises(TerseFileError, match="hold the weight of a FixedPointLinear"):
        tt.load(tmp_path / "m.terse")
