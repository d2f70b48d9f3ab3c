"""BinaryConv2d: the convolution of signs, its outputs, copies and state, the compiler, and what it refuses."""

import copy
import pickle

import pytest
import torch
from torch import nn

import tersetorch as tt
from tersetorch.formats import SignWeight
from tersetorch.nn import BinaryConv2d
from tersetorch.ops import sign_pack_images

SIZES = [
    ((70, 40, 3), {"padding": 1}),
    ((64, 64, 3), {"stride": 2, "bias": False}),
    ((6, 8, (3, 2)), {"padding": (2, 0), "dilation": 2, "groups": 2}),
    ((5, 33, 1), {}),
    ((65, 7, 3), {"padding": "same"}),
]
UNGROUPED = [each for each in SIZES if "groups" not in each[1]]


def dense(sizes, options, scaled=False):
    torch.manual_seed(0)
    module = nn.Conv2d(*sizes, **options)
    with torch.no_grad():
        scale = torch.rand(sizes[1], 1, 1, 1) if scaled else 1.0
        module.weight.copy_(torch.where(module.weight >= 0, 1.0, -1.0) * scale)
    return module.eval()


def signs(*shape):
    return torch.where(torch.randn(*shape) >= 0, 1.0, -1.0)


@pytest.mark.parametrize("sizes,options", SIZES)
@pytest.mark.parametrize("scaled", [False, True])
def test_computes_what_its_dense_form_does_of_signs(sizes, options, scaled):
    module = dense(sizes, options, scaled)
    layer = BinaryConv2d.from_dense(module)
    assert torch.equal(layer.weight, module.weight) and torch.equal(layer.to_dense().weight, module.weight)
    assert repr(layer.to_dense()) == repr(module)
    for shape in ((2, sizes[0], 9, 8), (sizes[0], 7, 7)):
        x = signs(*shape)
        want = module(x)
        for given in (x, 3 * x, sign_pack_images(x)):
            y = layer(given)
            assert y.shape == want.shape and torch.allclose(y, want, rtol=1e-5, atol=1e-4)
        assert layer(x.bfloat16()).dtype == torch.bfloat16


def test_thresholds_give_packed_images_and_other_padding_counts():
    weight = SignWeight.from_dense(signs(70, 9 * 66), 9)
    thresholds = torch.arange(-35, 35).int()
    x = signs(2, 66, 6, 7)
    for value in (0, 1, -1):
        layer = BinaryConv2d(weight, kernel_size=3, padding=1, padding_value=value, thresholds=thresholds)
        padded = nn.functional.pad(x, [1] * 4, value=value)
        want = nn.functional.conv2d(padded, layer.weight) >= thresholds[:, None, None]
        assert torch.equal(layer(sign_pack_images(x)), sign_pack_images(want.float() - 0.5))


@pytest.mark.parametrize("sizes,options", [*UNGROUPED, ((6, 8, (3, 2)), {"padding": (2, 0), "dilation": (1, 3)})])
@pytest.mark.parametrize("scaled", [False, True])
def test_real_inputs_are_convolved_as_they_are(sizes, options, scaled, monkeypatch):
    module = dense(sizes, options, scaled)
    layer = BinaryConv2d.from_dense(module, inputs="real")
    assert torch.equal(layer.weight, module.weight) and repr(layer.to_dense()) == repr(module)
    for shape in ((5, sizes[0], 9, 8), (sizes[0], 7, 7), (0, sizes[0], 7, 7)):
        x = torch.randn(shape, requires_grad=True)
        want = module(x)
        assert torch.allclose(layer(x), want, atol=1e-4) and layer(x).is_contiguous()
        (got,), (gradient,) = (torch.autograd.grad(each(x).square().sum(), x) for each in (layer, module))
        assert torch.allclose(got, gradient, rtol=1e-4, atol=1e-3)
        with torch.no_grad():
            whole = layer(x)
            monkeypatch.setattr("tersetorch.nn.binary_conv.PATCHES", 1)
            assert torch.equal(layer(x), whole) and torch.allclose(whole, want, atol=1e-4)
            assert layer(x.bfloat16()).dtype == torch.bfloat16
            with torch.autocast("cpu"):
                assert torch.equal(layer(x), whole.bfloat16())
            if x.dim() == 4 and len(x):
                last = x.contiguous(memory_format=torch.channels_last)
                assert torch.equal(layer(last), whole) and layer(last).stride() == module(last).stride()


@pytest.mark.parametrize("sizes,options", UNGROUPED)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("inputs", ["pixels", "signed_pixels"])
def test_pixels_are_convolved_exactly(sizes, options, scaled, inputs):
    module = dense(sizes, options, scaled)
    layer = BinaryConv2d.from_dense(module, inputs=inputs)
    assert torch.equal(layer.weight, module.weight) and repr(layer.to_dense()) == repr(module)
    for shape in ((2, sizes[0], 9, 8), (sizes[0], 7, 7)):
        pixels = torch.randint(0, 256, shape).to(torch.uint8)
        x = pixels / 255 if inputs == "pixels" else 2 * (pixels / 255) - 1
        want = module(x)
        for given in (pixels, x, x + 1e-4):
            assert torch.allclose(layer(given), want, atol=1e-4)
            assert torch.equal(layer(given), layer(pixels))
        assert layer(x.bfloat16()).dtype == torch.bfloat16 and layer(x).is_contiguous()
        if x.dim() == 4:
            last = x.contiguous(memory_format=torch.channels_last)
            assert layer(last).stride() == module(last).stride()
    # Thresholds see the integer itself, and what lies outside is 0, whatever pixel that is.
    plain = SignWeight(layer.sign_weight.bits, layer.sign_weight.channels)
    thresholds = torch.arange(sizes[1]).int() - 3
    geometry = {name: getattr(module, name) for name in ("kernel_size", "stride", "padding", "dilation")}
    folded = BinaryConv2d(plain, thresholds=thresholds, inputs=inputs, **geometry)
    numbers = pixels.double() if inputs == "pixels" else 2 * pixels.double() - 255
    sums = nn.functional.conv2d(numbers[None], folded.weight.double(), None, *list(geometry.values())[1:])
    want = (sums >= thresholds[:, None, None]).float() - 0.5
    assert torch.equal(folded(pixels), sign_pack_images(want)[0])


def layers():
    strided = BinaryConv2d.from_dense(dense(*SIZES[2], scaled=True))
    real, pixels = (
        BinaryConv2d.from_dense(dense(*SIZES[0], scaled=True), inputs=inputs) for inputs in ("real", "signed_pixels")
    )
    weight = SignWeight.from_dense(signs(40, 9 * 66), 9)
    thresholds = torch.arange(40).int()
    return [
        strided,
        BinaryConv2d(weight, kernel_size=3, padding=1, padding_value=-1, thresholds=thresholds),
        real,
        pixels,
        BinaryConv2d(
            SignWeight.from_dense(signs(40, 27)), kernel_size=3, padding=1, inputs="pixels", thresholds=thresholds
        ),
    ]


@pytest.mark.parametrize("which", range(5))
def test_state_copies_pickles_and_files(which, tmp_path):
    layer = layers()[which].eval()
    x = torch.randn(3, layer.in_channels, 9, 8)
    tt.save(layer, tmp_path / "m.terse")
    twins = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), tt.load(tmp_path / "m.terse")]
    twins.append(BinaryConv2d.of_sizes(**layer.sizes))
    twins[-1].load_state_dict(layer.state_dict())
    for twin in twins:
        assert torch.equal(twin(x), layer(x)) and repr(twin) == repr(layer)


@pytest.mark.parametrize("which", range(5))
def test_memory_formats_are_for_images(which):
    layer, twin = layers()[which], layers()[which]
    bits = twin.bits
    twin.to(memory_format=torch.channels_last)
    assert twin.bits is bits
    x = torch.randn(3, layer.in_channels, 9, 8)
    twin.to(torch.bfloat16, memory_format=torch.channels_last).to("meta")
    assert twin.bits.shape == bits.shape and twin.bits.is_meta
    moved = layers()[which].double().float()
    assert torch.equal(moved(x), layer(x))


@pytest.mark.parametrize("which", [2, 4])
def test_damaged_state_is_refused(which):
    layer = layers()[which]
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    state["bits"][0, -1, 0] = -1
    with pytest.raises(RuntimeError, match="bits past the last channel must be 0"):
        layer.load_state_dict(state)


@pytest.mark.parametrize("which", range(5))
def test_compiles_and_exports(which, fresh_compiler):
    layer = layers()[which]
    x = torch.randn(3, layer.in_channels, 9, 8)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
    assert torch.equal(torch.export.export(layer, (x,)).module()(x), layer(x))


def test_bad_arguments_are_refused():
    layer, weight = layers()[0], SignWeight.from_dense(torch.ones(4, 36), 9)
    one, integers = SignWeight.from_dense(torch.ones(4, 36)), torch.zeros(4, dtype=torch.int32)
    for error, message, call in (
        (ValueError, "inputs must be one of", lambda: BinaryConv2d(weight, kernel_size=3, inputs="bits")),
        (ValueError, "one tap for inputs='pixels'", lambda: BinaryConv2d(weight, kernel_size=3, inputs="pixels")),
        (
            ValueError,
            'BinaryConv2d: thresholds need inputs="signs"',
            lambda: BinaryConv2d(weight, kernel_size=3, inputs="real", thresholds=integers),
        ),
        (
            ValueError,
            "padding_value must be 0 for inputs='pixels'",
            lambda: BinaryConv2d(one, kernel_size=3, inputs="pixels", padding_value=1),
        ),
        (
            ValueError,
            "groups must be 1 for inputs='real', got 2",
            lambda: BinaryConv2d.from_dense(dense(*SIZES[2]), inputs="real"),
        ),
        (
            TypeError,
            'input must be float32 or bfloat16 for inputs="real", got packed signs; unpack',
            lambda: layers()[2](sign_pack_images(torch.ones(1, 70, 9, 9))),
        ),
        (ValueError, r"input must be \[N, 70, H, W\]", lambda: layers()[2](torch.ones(1, 71, 9, 9))),
        (
            TypeError,
            "input must be float32, bfloat16 or uint8, got torch.int64",
            lambda: layers()[3](sign_pack_images(torch.ones(1, 70, 9, 9))),
        ),
        (ValueError, "weight must have 4 taps", lambda: BinaryConv2d(weight, kernel_size=2)),
        (ValueError, "padding_value must be 0, 1 or -1", lambda: BinaryConv2d(weight, kernel_size=3, padding_value=2)),
        (TypeError, r"must be an nn\.Conv2d", lambda: BinaryConv2d.from_dense(nn.Linear(2, 2))),
        (
            ValueError,
            "got padding_mode 'reflect'",
            lambda: BinaryConv2d.from_dense(nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect")),
        ),
        (
            ValueError,
            "got more padding on one side",
            lambda: BinaryConv2d.from_dense(nn.Conv2d(2, 2, 2, padding="same")),
        ),
        (ValueError, "padding_value must be 0 for a plain layer", lambda: layers()[1].to_dense()),
        (ValueError, "input must be", lambda: layer(torch.ones(2, 2))),
        (RuntimeError, "x must have 6 channels, got 5", lambda: layer(torch.ones(1, 5, 9, 9))),
    ):
        with pytest.raises(error, match=message):
            call()
