"""The two networks of BinaryConnect and BNN."""

import pytest
import torch
from torch import nn

import tersetorch as tt
from tersetorch import zoo
from tersetorch.methods.binarize import ShiftBatchNorm1d, ShiftBatchNorm2d, Sign


def test_the_mlp_computes_its_formula():
    torch.manual_seed(0)
    model, x = zoo.BinaryMLP(20, 3, 30).eval(), torch.rand(4, 4, 5)
    y = x.reshape(4, 20)
    for number in (1, 2, 3):
        y = torch.relu(y @ model.get_submodule(f"fc{number}").weight.T / (1 + 1e-4) ** 0.5)
    torch.testing.assert_close(model(x), y @ model.fc4.weight.T / (1 + 1e-4) ** 0.5)
    with pytest.raises(ValueError, match=r"BinaryMLP: images must have 20 values each, got shape \(2, 21\)"):
        model(torch.rand(2, 21))


def test_the_vgg_has_the_papers_layers():
    model = zoo.BinaryVGG(shift=False)
    convs = [layer.out_channels for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    linears = [(layer.in_features, layer.out_features) for layer in model.modules() if isinstance(layer, nn.Linear)]
    assert convs == [128, 128, 256, 256, 512, 512]
    assert linears == [(8192, 1024), (1024, 1024), (1024, 10)]
    assert "conv2 pool2 bn2 act2" in " ".join(model.order)
    with pytest.raises(ValueError, match=r"BinaryVGG: images must be \[N, 3, 32, 32\], got shape"):
        model(torch.rand(1, 3, 28, 28))


@pytest.mark.parametrize("stochastic", [False, True])
def test_signs_that_took_the_place_of_relus_come_back_from_a_file(stochastic, tmp_path):
    torch.manual_seed(1)
    model, x = zoo.BinaryMLP(20, 3, 30, shift=True), torch.rand(8, 20)
    handle = tt.binarize.bnn(model, stochastic=stochastic)
    assert handle.names == ["fc1", "fc2", "fc3", "fc4"]
    model(x).square().sum().backward()
    tt.finalize(model.eval())
    tt.save(model, tmp_path / "m.terse")
    twin = tt.load(tmp_path / "m.terse")
    assert torch.equal(twin(x), model(x))
    assert isinstance(twin.act2, Sign) and twin.act2.stochastic == stochastic
    assert isinstance(twin.bn4, ShiftBatchNorm1d)


def test_norms_and_rates_are_those_asked_for():
    model = zoo.BinaryMLP(20, 3, 30, dropout=0.5, input_dropout=0.2)
    assert [module.p for module in model.modules() if isinstance(module, nn.Dropout)] == [0.2, 0.5, 0.5, 0.5]
    assert model.order[0] == "dropout1"
    norms = [type(module) for name, module in zoo.BinaryVGG(channels=2, shift=True).named_children() if "bn" in name]
    assert norms == 6 * [ShiftBatchNorm2d] + 3 * [ShiftBatchNorm1d]


@pytest.mark.parametrize(
    ("build", "error", "sentence"),
    [
        (lambda: zoo.BinaryMLP(width=0), ValueError, "BinaryMLP: width must be at least 1, got 0"),
        (
            lambda: zoo.BinaryMLP(activation="tanh"),
            ValueError,
            "activation must be one of 'relu', 'sign', 'stochastic s",
        ),
        (lambda: zoo.BinaryMLP(shift=1), TypeError, "BinaryMLP: shift must be True or False, got 1"),
        (lambda: zoo.BinaryMLP(input_dropout=1), ValueError, r"input_dropout must be in \[0, 1\), got 1"),
        (lambda: zoo.BinaryVGG(channels=1.5), TypeError, "BinaryVGG: channels must be an int, got 1.5"),
        (lambda: zoo.BinaryVGG(activation=None), ValueError, "BinaryVGG: activation must be one of"),
    ],
)
def test_bad_arguments_are_refused(build, error, sentence):
    with pytest.raises(error, match=sentence):
        build()
