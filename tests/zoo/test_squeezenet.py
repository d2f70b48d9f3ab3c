"""FireNet: the paper's metaparameters, places of pooling and bypasses, at any size of image."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import fx, nn

import tersetorch as tt
from tersetorch import zoo
from tersetorch.conversion.fusion import fuse
from tersetorch.costs import count
from tersetorch.storage import registry
from tersetorch.zoo.squeezenet import VERSIONS, FireNet, fire_channels

SMALL = {"fires": 4, "base_e": 8, "incr_e": 8, "squeeze_ratio": 0.25, "first": (8, 3, 1)}
FORMS = {
    "none": {},
    "simple": {"bypass": "simple"},
    "complex": {"bypass": "complex"},
    "1x1 alone": {"pct_3x3": 0},
    "3x3 alone": {"pct_3x3": 1, "bypass": "complex", "pooled": "early"},
    "all": {"pct_3x3": 0.25, "squeeze_ratio": 1, "pooled": [2, 5], "dropout": 0, "last_padding": 1, "freq": 1},
}
forms = pytest.mark.parametrize("form", FORMS)


def small(form):
    torch.manual_seed(0)
    return FireNet(3, **SMALL | FORMS[form])


def shapes(model):
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    ("arguments", "channels"),
    [
        # Table 1 of the paper.
        (
            (8, 128, 128, 2, 0.5, 0.125),
            [(s, e, e) for s, e in ((16, 64), (32, 128), (48, 192), (64, 256)) for _ in range(2)],
        ),
        # 0.29 * 100 is 28.999999999999996 in floating point.
        ((3, 100, 100, 1, 0.29, 0.07 / 0.7), [(10, 71, 29), (20, 142, 58), (30, 213, 87)]),
        ((5, 10, 4, 3, 0.5, 0.5), [(5, 5, 5)] * 3 + [(7, 7, 7)] * 2),
        ((2, 6, 0, 1, 0, 1), [(6, 6, 0)] * 2),
        ((1, 6, 5, 9, 1.0, 1 / 3), [(2, 0, 6)]),
    ],
)
def test_channels_follow_the_metaparameters(arguments, channels):
    assert fire_channels(*arguments) == channels


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("bypass", [None, "simple", "complex"])
def test_makes_the_published_networks(version, bypass):
    # Spelled out: the published versions lean on the defaults.
    places = {"1.0": (1, 4, 8), "1.1": (1, 3, 5)}[version]
    first = {"1.0": (96, 7, 2), "1.1": (64, 3, 2)}[version]
    with torch.device("meta"), registry._NoNormal():
        made = FireNet(
            bypass=bypass,
            base_e=128,
            incr_e=128,
            freq=2,
            pct_3x3=0.5,
            squeeze_ratio=0.125,
            pooled=places,
            first=first,
            last_padding=int(version == "1.0"),
        )
        published = zoo.SqueezeNet(version, bypass=bypass)
    assert shapes(made) == shapes(published)
    assert [name for name, _ in made.named_modules()] == [name for name, _ in published.named_modules()]
    images = torch.empty(1, 3, 227, 227, device="meta")
    assert count(made, images).macs == count(published, images).macs
    assert made.least == published.least == {"1.0": 29, "1.1": 25}[version]


def test_a_published_network_is_its_twin_to_the_bit():
    torch.manual_seed(1)
    published = zoo.SqueezeNet("1.1", 5).eval()
    made = FireNet(5, **VERSIONS["1.1"]).eval()
    made.load_state_dict(published.state_dict())
    x = torch.rand(2, 3, 40, 25)
    with torch.no_grad():
        assert torch.equal(made(x), published(x))


@pytest.mark.parametrize(
    ("fires", "late", "early"), [(4, (1, 2, 4), (1, 2, 3)), (6, (1, 3, 6), (1, 2, 4)), (8, (1, 4, 8), (1, 3, 5))]
)
def test_pools_late_or_early(fires, late, early):
    assert FireNet(3, fires=fires).pooled == late
    assert FireNet(3, fires=fires, pooled="early").pooled == early


@forms
def test_computes_its_formula(form):
    model, x = small(form).eval(), torch.rand(2, 3, 30, 33)
    y = model.conv1(x).relu()
    for number in range(1, 6):
        if number > 1:
            fire = model.get_submodule(f"fire{number}")
            s = fire.squeeze(y).relu()
            halves = [getattr(fire, half)(s).relu() for half in ("expand1x1", "expand3x3") if hasattr(fire, half)]
            around = getattr(fire, "bypass", lambda _: 0)(y)
            y = torch.cat(halves, 1) + around
            e = 8 + 8 * ((number - 2) // model.freq)
            assert s.shape[1] == model.squeeze_ratio * e and y.shape[1] == e
            assert sum(half.shape[1] for half in halves[-1:] if hasattr(fire, "expand3x3")) == model.pct_3x3 * e
        if number in model.pooled:
            y = nn.MaxPool2d(3, 2, ceil_mode=True)(y)
    torch.testing.assert_close(model(x), model.conv6(y).relu().mean((2, 3)))


@forms
def test_travels_in_a_file_and_elsewhere(form, tmp_path):
    model, x = small(form).eval(), torch.rand(2, 3, 32, 32)
    tt.save(model, tmp_path / "m.terse")
    loaded = tt.load(tmp_path / "m.terse")
    with torch.no_grad():
        for twin in (loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert type(twin) is FireNet and torch.equal(twin(x), model(x))
    assert all(getattr(loaded, name) == getattr(model, name) for name in inspect.signature(FireNet).parameters)


@forms
def test_convert_and_torch_fx_follow_it(form):
    model, x = small(form).eval(), torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(fx.symbolic_trace(model)(x), model(x))
    relus = {name for name, module in model.named_modules() if type(module) is nn.ReLU}
    assert set(fuse(copy.deepcopy(model), ()).in_place) == relus
    tt.prune.magnitude(model, sparsity=0.7)
    fast = tt.convert(model, plan="sparse")
    layers = [module for module in fast.modules() if isinstance(module, tt.nn.SparseConv2d)]
    assert len(layers) == sum(isinstance(module, nn.Conv2d) for module in model.modules())
    assert sum(layer.relu for layer in layers) == len(relus)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), tt.finalize(model)(x))


@forms
def test_every_parameter_has_a_gradient(form):
    model = small(form)
    model(torch.rand(2, 3, 32, 32)).square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("pooled", [(), (1,), (1, 2, 3), (3, 4, 5)])
@pytest.mark.parametrize("first", [(4, 3, 1), (4, 1, 1), (4, 5, 3)])
def test_takes_images_down_to_the_least(pooled, first):
    model = FireNet(2, **SMALL | {"pooled": pooled, "first": first}).eval()
    with torch.no_grad():
        assert model(torch.rand(1, 3, model.least, model.least + 3)).isfinite().all()
    seen = []
    with torch.device("meta"):
        model = FireNet(2, **SMALL | {"pooled": pooled, "first": first})
    model.conv1.register_forward_hook(lambda _module, _inputs, output: seen.append(output.shape[-1]))
    model(torch.empty(1, 3, model.least, model.least, device="meta"))
    side = seen[0]
    for _ in pooled:
        assert side >= 3
        side = -(-(side - 3) // 2) + 1
    # One pixel less is refused, and would leave a pooling less than its window, or the first convolution no pixel.
    with pytest.raises(ValueError, match=rf"FireNet: images must be .* of {model.least} pixels or more, got shape"):
        model(torch.empty(1, 3, 64, model.least - 1, device="meta"))
    side = (model.least - 1 - first[1]) // first[2] + 1
    for _ in pooled:
        if side < 3:
            break
        side = -(-(side - 3) // 2) + 1
    else:
        assert side < 1


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ({"fires": 0}, ValueError, "FireNet: fires must be at least 1, got 0; pass a larger number"),
        ({"fires": 257}, ValueError, "FireNet: fires must be at most 256, got 257; pass a smaller number"),
        ({"fires": 4.0}, TypeError, "FireNet: fires must be an int, got 4.0"),
        ({"base_e": 0}, ValueError, "base_e must be at least 1, got 0"),
        ({"incr_e": -1}, ValueError, "incr_e must be at least 0, got -1"),
        ({"freq": 0}, ValueError, "FireNet: freq must be at least 1, got 0; pass a larger number"),
        ({"pct_3x3": 1.01}, ValueError, r"FireNet: pct_3x3 must be in \[0, 1\], got 1.01; pass a share such as 0.5"),
        ({"pct_3x3": -0.1}, ValueError, r"pct_3x3 must be in \[0, 1\], got -0.1"),
        ({"pct_3x3": float("nan")}, ValueError, r"pct_3x3 must be in \[0, 1\], got nan"),
        ({"pct_3x3": True}, TypeError, "FireNet: pct_3x3 must be a number, got True; pass a share such as 0.5"),
        ({"pct_3x3": 0.3}, ValueError, r"pct_3x3 must make a whole number of channels, got 0.3 of 8 = 2.4; change it"),
        ({"squeeze_ratio": 0.0}, ValueError, r"FireNet: squeeze_ratio must be in \(0, 1\], got 0.0"),
        ({"squeeze_ratio": 1.5}, ValueError, r"squeeze_ratio must be in \(0, 1\], got 1.5"),
        ({"squeeze_ratio": "1"}, TypeError, "squeeze_ratio must be a number, got '1'"),
        ({"squeeze_ratio": 1e-9}, ValueError, "squeeze_ratio must make a whole number of channels, got 1e-09 of 8"),
        ({"squeeze_ratio": 0.3}, ValueError, "squeeze_ratio must make a whole number of channels, got 0.3 of 8 = 2.4"),
        ({"pooled": "middle"}, TypeError, r"pooled must be 'early', 'late' or layers, got 'middle'; pass such as"),
        ({"pooled": (1, 2.0)}, TypeError, "pooled must be 'early', 'late' or layers, got"),
        ({"pooled": (2, 1)}, ValueError, r"pooled must be rising numbers of layers from 1 to 5, got \(2, 1\); 1 is"),
        ({"pooled": (1, 1)}, ValueError, "pooled must be rising numbers of layers"),
        ({"pooled": (5, 6)}, ValueError, "pooled must be rising numbers of layers"),
        ({"pooled": [0]}, ValueError, "pooled must be rising numbers of layers"),
        ({"pooled": "late", "fires": 3}, ValueError, "pooled='late' must have 4 fires or more, got 3; pass layers"),
        ({"first": (8, 3)}, TypeError, r"first must be channels, taps and stride, got \(8, 3\); pass such as"),
        ({"first": (8, 3, 0)}, ValueError, "FireNet: stride of first must be at least 1, got 0"),
        ({"first": (8.0, 3, 1)}, TypeError, "channels of first must be an int, got 8.0"),
        ({"bypass": "identity"}, ValueError, "bypass must be 'simple', 'complex' or None, got 'identity'"),
        ({"bypass": "simple", "freq": 1, "first": (9, 3, 1)}, ValueError, "bypass='simple' must find a fire with as"),
        ({"classes": 0}, ValueError, "FireNet: classes must be at least 1, got 0"),
        ({"dropout": 1.0}, ValueError, r"FireNet: dropout must be in \[0, 1\), got 1.0"),
        ({"last_padding": -1}, ValueError, "FireNet: last_padding must be at least 0, got -1"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, sentence):
    with pytest.raises(error, match=sentence):
        FireNet(**{"classes": 3} | SMALL | arguments)
