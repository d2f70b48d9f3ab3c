"""BinaryLinear: the product of signs, its outputs, copies and state, the compiler, and what it refuses."""

import copy
import pickle

import pytest
import torch
from torch import nn

from tersetorch.formats import SignWeight
from tersetorch.nn import BinaryLinear
from tersetorch.ops import sign_pack, sign_unpack


def dense(columns=150, rows=70, scaled=False, bias=True):
    torch.manual_seed(0)
    module = nn.Linear(columns, rows, bias)
    with torch.no_grad():
        scale = torch.rand(rows, 1) if scaled else 1.0
        module.weight.copy_(torch.where(module.weight >= 0, 1.0, -1.0) * scale)
    return module.eval()


def signs(*shape):
    return torch.where(torch.randn(*shape) >= 0, 1.0, -1.0)


@pytest.mark.parametrize("scaled,bias", [(False, False), (False, True), (True, False), (True, True)])
def test_computes_what_its_dense_form_does_of_signs(scaled, bias):
    module = dense(scaled=scaled, bias=bias)
    layer = BinaryLinear.from_dense(module)
    assert torch.equal(layer.weight, module.weight) and torch.equal(layer.to_dense().weight, module.weight)
    for shape in ((150,), (3, 150), (2, 5, 150), (0, 150)):
        x = signs(*shape)
        want = module(x)
        for given in (x, x * 3, sign_pack(x)):
            y = layer(given)
            assert y.dtype == torch.float32 and torch.allclose(y, want, rtol=1e-5, atol=1e-5)
            assert scaled or bias or torch.equal(y, want)
        assert layer(x.bfloat16()).dtype == torch.bfloat16


def test_thresholds_give_packed_signs():
    module = dense(bias=False)
    thresholds = torch.arange(-35, 35).int()
    layer = BinaryLinear(SignWeight.from_dense(module.weight), thresholds=thresholds)
    x = signs(9, 150)
    assert torch.equal(layer(x), sign_pack(module(x) - thresholds))
    assert torch.equal(sign_unpack(layer(sign_pack(x)), 70) > 0, module(x) >= thresholds)


@pytest.mark.parametrize("channels,taps", [(3, 50), (64, 2), (75, 2)])
def test_takes_flattened_images(channels, taps):
    module = dense(channels * taps)
    layer = BinaryLinear.from_dense(module, taps=taps)
    assert torch.equal(layer.weight, module.weight)
    x = signs(4, channels, taps)
    packed = sign_pack(x.transpose(1, 2)).flatten(1)
    for given in (packed, x.flatten(1)):
        assert torch.allclose(layer(given), module(x.flatten(1)), atol=1e-5)


@pytest.mark.parametrize("scaled,bias", [(False, False), (True, True)])
def test_real_inputs_are_multiplied_as_they_are(scaled, bias):
    module = dense(scaled=scaled, bias=bias)
    layer = BinaryLinear.from_dense(module, inputs="real")
    x = torch.randn(2, 5, 150, requires_grad=True)
    assert torch.allclose(layer(x), module(x), atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(layer(x), module(x), atol=1e-5)
        assert layer(x.bfloat16()).dtype == torch.bfloat16
    (got,) = torch.autograd.grad(layer(x).square().sum(), x)
    (want,) = torch.autograd.grad(module(x).square().sum(), x)
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("scaled,bias", [(False, False), (True, True)])
@pytest.mark.parametrize("inputs", ["pixels", "signed_pixels"])
def test_pixels_are_multiplied_exactly(scaled, bias, inputs):
    module = dense(scaled=scaled, bias=bias)
    layer = BinaryLinear.from_dense(module, inputs=inputs)
    pixels = torch.randint(0, 256, (2, 5, 150)).to(torch.uint8)
    x = pixels / 255 if inputs == "pixels" else 2 * (pixels / 255) - 1
    want = module(x)
    for given in (pixels, x, x + 1e-4):
        assert torch.allclose(layer(given), want, atol=1e-4)
        assert torch.equal(layer(given), layer(pixels))
    assert torch.equal(layer.weight, module.weight) and layer(x.bfloat16()).dtype == torch.bfloat16
    assert torch.allclose(layer(torch.full((1, 150), 9.0)), module(torch.ones(1, 150)), atol=1e-4)
    with pytest.raises(TypeError, match="input must be float32, bfloat16 or uint8"):
        layer(sign_pack(x))


def layers():
    thresholds = torch.arange(70).int()
    return [
        BinaryLinear.from_dense(dense(scaled=True), inputs="real"),
        BinaryLinear.from_dense(dense()),
        BinaryLinear.from_dense(dense(scaled=True, bias=False)),
        BinaryLinear(SignWeight.from_dense(dense().weight, 3), thresholds=thresholds),
    ]


@pytest.mark.parametrize("which", range(4))
def test_state_copies_and_pickles(which):
    layer = layers()[which]
    x = torch.randn(3, 150)
    twins = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), BinaryLinear.of_sizes(**layer.sizes)]
    twins[2].load_state_dict(layer.state_dict())
    for twin in twins:
        assert torch.equal(twin(x), layer(x)) and repr(twin) == repr(layer)
    assert not list(layer.parameters())


def test_damaged_state_is_refused():
    layer = layers()[1]
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    state["bits"][0, -1, 0] = -1
    with pytest.raises(RuntimeError, match="bits past the last channel must be 0"):
        layer.load_state_dict(state)


def test_numbers_stay_float32():
    layer = BinaryLinear.from_dense(dense(scaled=True))
    x = signs(2, 150)
    want = layer(x)
    layer.bfloat16()
    assert {str(tensor.dtype) for tensor in layer.buffers()} == {"torch.int64", "torch.float32"}
    assert torch.equal(layer(x), want)


@pytest.mark.parametrize("which", range(4))
def test_compiles_and_exports(which, fresh_compiler):
    layer, x = layers()[which], torch.randn(3, 150)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
    assert torch.equal(torch.export.export(layer, (x,)).module()(x), layer(x))


def test_shows_what_it_is():
    assert repr(layers()[0]) == "BinaryLinear(in_features=150, out_features=70, bias=True, scale=True, inputs=real)"
    assert repr(layers()[2]) == "BinaryLinear(in_features=150, out_features=70, bias=False, scale=True)"
    assert repr(layers()[3]) == "BinaryLinear(in_features=150, out_features=70, taps=3, bias=False, thresholds=True)"


def test_bad_arguments_are_refused():
    layer, weight = layers()[1], SignWeight.from_dense(torch.ones(3, 5))
    scaled = SignWeight.from_dense(torch.full((3, 5), 2.0))
    integers = torch.zeros(3, dtype=torch.int32)
    for error, message, call in (
        (TypeError, "weight must be a SignWeight, got Tensor", lambda: BinaryLinear(torch.ones(2, 2))),
        (TypeError, "thresholds must be int32", lambda: BinaryLinear(weight, thresholds=torch.zeros(3))),
        (ValueError, r"bias must be \[3\]", lambda: BinaryLinear(weight, torch.zeros(4))),
        (ValueError, "thresholds stand in for", lambda: BinaryLinear(scaled, thresholds=integers)),
        (ValueError, "inputs must be one of", lambda: BinaryLinear(weight, inputs="bits")),
        (ValueError, "thresholds need", lambda: BinaryLinear(weight, thresholds=integers, inputs="real")),
        (TypeError, "got packed signs", lambda: BinaryLinear(weight, inputs="real")(sign_pack(torch.ones(2, 5)))),
        (ValueError, "one tap", lambda: BinaryLinear.from_dense(dense(), taps=2, inputs="real")),
        (TypeError, r"must be an nn\.Linear, got Conv2d", lambda: BinaryLinear.from_dense(nn.Conv2d(1, 1, 1))),
        (ValueError, r"\+a and -a in each row", lambda: BinaryLinear.from_dense(nn.Linear(3, 4))),
        (ValueError, "taps must divide in_features 10, got 3", lambda: BinaryLinear.of_sizes(10, 2, 3)),
        (TypeError, "input must be a tensor, got list", lambda: layer([1.0])),
        (TypeError, "input must be float32, bfloat16 or packed", lambda: layer(torch.ones(2, 150).double())),
        (RuntimeError, "x must have 150 features, got 149", lambda: layer(torch.ones(2, 149))),
        (RuntimeError, "x must have 3 words, got 2", lambda: layer(torch.ones(2, 2, dtype=torch.int64))),
    ):
        with pytest.raises(error, match=message):
            call()
