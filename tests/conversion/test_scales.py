"""A batch norm that ends a network of signs becomes scale and bias, to the bit or not at all."""

import pytest
import torch
from torch import nn

import tersetorch as tt
from tersetorch import zoo
from tersetorch.conversion.scales import scale_of
from tersetorch.conversion.thresholds import UnfoldableError
from tersetorch.formats import SignWeight
from tersetorch.methods.binarize import Sign
from tersetorch.nn import BinaryConv2d, BinaryLinear


def stirred(norm):
    torch.manual_seed(0)
    with torch.no_grad():
        norm.running_mean.normal_(0, 20)
        norm.running_var.uniform_(0.5, 500)
        if norm.affine:
            norm.weight.normal_()
            norm.bias.normal_()
    return norm.eval()


def every_sum(columns):
    """Samples that agree with none, one, two, ... of weights that are all +1."""
    return torch.where(torch.arange(columns)[None] < torch.arange(columns + 1)[:, None], 1.0, -1.0)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(40, eps=1e-4), nn.BatchNorm1d(40, affine=False)])
@pytest.mark.parametrize("columns", [1, 64, 333])
def test_scales_are_the_norms_of_every_sum(norm, columns):
    layer, x = BinaryLinear(SignWeight.from_dense(torch.ones(40, columns))), every_sum(columns)
    want = stirred(norm)(layer(x))
    layer.scale_(*scale_of(layer, norm))
    assert torch.equal(layer(x), want)


@pytest.mark.parametrize("padding", [0, 1])
def test_images_are_normed_in_both_layouts(padding):
    torch.manual_seed(0)
    weight = SignWeight.from_dense(torch.where(torch.randn(33, 5 * 9) >= 0, 1.0, -1.0), 9)
    layer, norm = BinaryConv2d(weight, kernel_size=3, padding=padding), stirred(nn.BatchNorm2d(33))
    x = torch.randn(3, 5, 11, 12)
    images = [x, x.contiguous(memory_format=torch.channels_last)]
    want = [norm(layer(each)) for each in images]
    layer.scale_(*scale_of(layer, norm))
    for each, normed in zip(images, want, strict=True):
        assert torch.equal(layer(each), normed) and layer(each).stride() == normed.stride()


def test_what_would_round_in_another_way_is_refused(monkeypatch):
    ones, norm = torch.ones(40, 100), stirred(nn.BatchNorm1d(40))
    scaled = BinaryLinear(SignWeight.from_dense(ones * torch.rand(40, 1)))
    biased = BinaryLinear(SignWeight.from_dense(ones), torch.randn(40))
    for layer in (scaled, biased):
        with pytest.raises(UnfoldableError, match=r"\d+ of its 4040 sums would be rounded in another way"):
            scale_of(layer, norm)
    layer = BinaryLinear(SignWeight.from_dense(ones))
    for other, message in (
        (nn.BatchNorm1d(41), "normalises something else than its 40 rows"),
        (nn.BatchNorm1d(40, track_running_stats=False), "takes the statistics of each batch"),
        (stirred(nn.BatchNorm1d(40)).bfloat16(), "its numbers are rounded before"),
    ):
        with pytest.raises(UnfoldableError, match=message):
            scale_of(layer, other)
    monkeypatch.setattr("tersetorch.conversion.scales.MAX_SUMS", 100)
    with pytest.raises(UnfoldableError, match="more than 100 sums to try"):
        scale_of(layer, norm)


@pytest.mark.parametrize("scale", ["none", "row"])
def test_a_network_of_the_zoo_ends_in_scale_and_bias(scale, tmp_path):
    torch.manual_seed(0)
    model = zoo.BinaryMLP(30, 10, 70)
    tt.binarize.bnn(model, scale=scale)
    tt.finalize(model)
    for name, module in model.named_children():
        if "bn" in name:
            stirred(module)
    x = torch.randn(200, 30)
    fast = tt.convert(model, x, plan=dict.fromkeys(["fc2", "fc3", "fc4"], "binary_linear"))
    reason = next(layer.reason for layer in tt.report(fast).layers if layer.name == "fc4")
    if scale == "none":
        assert type(fast.bn4) is nn.Identity and reason.endswith("its scale and bias stand for bn4")
    else:
        assert type(fast.bn4) is nn.BatchNorm1d and "bn4 stays: " in reason
    assert "returns floats: it is followed by" in reason
    with torch.no_grad():
        assert torch.equal(fast(x), model(x)) or scale == "row"
        assert torch.equal(fast(x).argmax(1), model(x).argmax(1))
    tt.save(fast, tmp_path / "m.terse")
    for loaded in (tt.load(tmp_path / "m.terse"), tt.load(tmp_path / "m.terse", model=model)):
        assert torch.equal(loaded(x), fast(x)) and repr(loaded) == repr(fast)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.sign, self.fc, self.norm = Sign(), nn.Linear(40, 40, bias=False), nn.BatchNorm1d(40)

    def forward(self, x):
        return self.norm(self.fc(self.sign(x))) + x


class Shared(Residual):
    def forward(self, x):
        return self.norm(self.norm(self.fc(self.sign(x))))


@pytest.mark.parametrize("shared", [False, True])
def test_norms_before_a_shortcut_fold_and_shared_ones_stay(shared):
    torch.manual_seed(0)
    model = Shared() if shared else Residual()
    tt.binarize.binary_connect(model)
    stirred(tt.finalize(model).norm)
    x = torch.randn(50, 40)
    fast = tt.convert(model.eval(), x, plan="binary")
    assert (type(fast.norm) is nn.Identity) == (not shared)
    reason = tt.report(fast).layers[0].reason
    assert ("norm stays: it is called elsewhere too" if shared else "its scale and bias stand for norm") in reason
    with torch.no_grad():
        assert torch.equal(fast(x), model(x))
