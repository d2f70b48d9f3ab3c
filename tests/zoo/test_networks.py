"""What every network of the zoo promises: its published size, and that it travels."""

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import nn

import tersetorch as tt
from tersetorch import zoo
from tersetorch.conversion.fusion import fuse
from tersetorch.costs import count
from tersetorch.storage import registry

# Name, how to build it, its input, parameters and multiply-accumulates of one image, as the papers and the authors'
# files have them.
PUBLISHED = [
    ("lenet-300-100", zoo.LeNet300100, (1, 28, 28), 266_610, 266_200),
    ("lenet-5", zoo.LeNet5, (1, 28, 28), 431_080, 2_293_000),
    ("alexnet", zoo.AlexNet, (3, 227, 227), 60_965_224, 724_406_816),
    ("vgg-16", zoo.VGG16, (3, 224, 224), 138_357_544, 15_470_264_320),
    ("resnet-20", zoo.ResNet20, (3, 32, 32), 269_722, 40_551_040),
    ("resnet-32", zoo.ResNet32, (3, 32, 32), 464_154, 68_862_592),
    ("resnet-44", zoo.ResNet44, (3, 32, 32), 658_586, 97_174_144),
    ("resnet-56", zoo.ResNet56, (3, 32, 32), 853_018, 125_485_696),
    ("resnet-110", zoo.ResNet110, (3, 32, 32), 1_727_962, 252_887_680),
    ("squeezenet-1.0", lambda: zoo.SqueezeNet(version="1.0"), (3, 227, 227), 1_248_424, 861_339_936),
    ("squeezenet-1.1", lambda: zoo.SqueezeNet(version="1.1"), (3, 227, 227), 1_235_496, 387_747_520),
    ("squeezenet-simple-bypass", lambda: zoo.SqueezeNet(bypass="simple"), (3, 227, 227), 1_248_424, 861_339_936),
    # 1x1 convolutions around fire2, 4, 6 and 8: (96 + 1) 128 + (128 + 1) 256 + (256 + 1) 384 + (384 + 1) 512.
    ("squeezenet-complex-bypass", lambda: zoo.SqueezeNet(bypass="complex"), (3, 227, 227), 1_589_672, 1_212_625_184),
    ("", lambda: zoo.SqueezeNet("1.1", bypass="complex"), (3, 227, 227), 1_572_648, 496_930_496),
    ("mobilenet", zoo.MobileNet, (3, 224, 224), 4_231_976, 568_740_352),
    ("", lambda: zoo.MobileNet(0.75), (3, 224, 224), 2_585_560, 325_400_448),
    ("", lambda: zoo.MobileNet(0.5), (3, 224, 224), 1_331_592, 149_497_088),
    ("", lambda: zoo.MobileNet(0.25), (3, 224, 224), 470_072, 41_030_272),
    # A filter of k taps and one of a channel each, at every pixel it reads.
    ("flattened-cnn", zoo.FlattenedCNN, (3, 32, 32), 1_195_658, 23_038_464),
    # Two numbers of batch norm for each unit and channel beside the weights.
    ("binary-mlp", zoo.BinaryMLP, (1, 28, 28), 36_806_656 + 2 * 12_298, 36_806_656),
    ("", lambda: zoo.BinaryMLP(width=1024), (784,), 2_910_208 + 2 * 3_082, 2_910_208),
    ("binary-vgg", zoo.BinaryVGG, (3, 32, 32), 14_022_016 + 2 * 3_850, 616_966_144),
]

# The same networks as small as they come, with an input.
SMALL = [
    (lambda: zoo.LeNet5(classes=3, dropout=0.5), (1, 28, 28)),
    (lambda: zoo.CifarResNet(8, classes=3), (3, 8, 8)),
    (lambda: zoo.CifarResNet(20), (3, 32, 32)),
    (lambda: zoo.SqueezeNet("1.0", classes=3), (3, 29, 29)),
    (lambda: zoo.SqueezeNet("1.1", classes=3), (3, 25, 40)),
    (lambda: zoo.SqueezeNet("1.1", 3, "simple"), (3, 25, 25)),
    (lambda: zoo.SqueezeNet("1.1", 3, "complex"), (3, 25, 25)),
    (lambda: zoo.MobileNet(0.25, classes=3), (3, 32, 32)),
    (lambda: zoo.BinaryMLP(20, 3, 30, "sign", dropout=0.5), (4, 5)),
    (lambda: zoo.BinaryVGG(3, 4, "stochastic sign", shift=True), (3, 32, 32)),
]
SMALL_NAMES = [
    "lenet-5",
    "resnet-8",
    "resnet-20",
    "squeezenet-1.0",
    "squeezenet-1.1",
    "simple-bypass",
    "complex-bypass",
    "mobilenet",
    "binary-mlp",
    "binary-vgg",
]
small = pytest.mark.parametrize(("build", "shape"), SMALL, ids=SMALL_NAMES)


def on_meta(build):
    # Without drawing normal numbers, for which torch would import its compiler.
    with torch.device("meta"), registry._NoNormal():
        return build()


@pytest.mark.parametrize(("name", "build", "shape", "parameters", "macs"), PUBLISHED)
def test_has_the_published_size(name, build, shape, parameters, macs):
    model = on_meta(build)
    counted = count(model, torch.empty(1, *shape, device="meta"))
    assert (counted.parameters, counted.macs, counted.uncounted) == (parameters, macs, ())
    if name:
        twin = on_meta(zoo.NETWORKS[name])
        assert type(twin) is type(model)
        assert {n: t.shape for n, t in twin.state_dict().items()} == {n: t.shape for n, t in model.state_dict().items()}


def test_every_network_has_its_size_checked():
    assert {name for name, *_ in PUBLISHED if name} == set(zoo.NETWORKS)


# Weights and floating-point operations, two for each multiply-accumulate: tables 2 to 5 of Han et al. (2015).
HAN = {
    "lenet-300-100": "fc1 235K 470K, fc2 30K 60K, fc3 1K 2K",
    "lenet-5": "conv1 0.5K 576K, conv2 25K 3200K, fc1 400K 800K, fc2 5K 10K",
    "alexnet": "conv1 35K 211M, conv2 307K 448M, conv3 885K 299M, conv4 663K 224M, conv5 442K 150M, "
    "fc6 38M 75M, fc7 17M 34M, fc8 4M 8M",
    "vgg-16": "conv1_1 2K 0.2B, conv1_2 37K 3.7B, conv2_1 74K 1.8B, conv2_2 148K 3.7B, conv3_1 295K 1.8B, "
    "conv3_2 590K 3.7B, conv3_3 590K 3.7B, conv4_1 1M 1.8B, conv4_2 2M 3.7B, conv4_3 2M 3.7B, "
    "conv5_1 2M 925M, conv5_2 2M 925M, conv5_3 2M 925M, fc6 103M 206M, fc7 17M 34M, fc8 4M 8M",
}


def agrees(value, printed):
    """Whether value is what was printed, rounded or cut to the digits shown."""
    number, unit = float(printed[:-1]), {"K": 1e3, "M": 1e6, "B": 1e9}[printed[-1]]
    return abs(value / unit - number) < (0.1 if "." in printed else 1)


@pytest.mark.parametrize("name", HAN)
def test_each_layer_has_the_papers_weights_and_operations(name):
    model = on_meta(zoo.NETWORKS[name])
    shape = next(shape for known, _, shape, *_ in PUBLISHED if known == name)
    layers = {layer.name: layer for layer in count(model, torch.empty(1, *shape, device="meta")).layers}
    rows = [row.split() for row in HAN[name].split(", ")]
    assert list(layers) == [layer for layer, *_ in rows]
    for layer, weights, operations in rows:
        assert agrees(model.get_submodule(layer).weight.numel(), weights), layer
        assert agrees(2 * layers[layer].macs, operations), layer


@small
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_gives_logits_for_any_batch(build, shape, batch):
    model = build().eval()
    with torch.no_grad():
        y = model(torch.rand(batch, *shape))
    assert y.shape == (batch, model.classes)
    assert y.isfinite().all()


@small
def test_state_travels(build, shape):
    torch.manual_seed(0)
    model, x = build().eval(), torch.rand(2, *shape)
    other = build().eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        y = model(x)
        for twin in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(x), y)


@small
def test_comes_back_from_a_file_without_its_class_at_hand(build, shape, tmp_path):
    torch.manual_seed(1)
    model = build().eval()
    tt.prune.magnitude(model, sparsity=0.8)
    tt.finalize(model)
    tt.save(model, tmp_path / "m.terse")
    twin = tt.load(tmp_path / "m.terse")
    assert type(twin) is type(model)
    x = torch.rand(2, *shape)
    with torch.no_grad():
        assert torch.equal(twin(x), model(x))


@pytest.mark.parametrize("build", [zoo.AlexNet, zoo.VGG16], ids=["alexnet", "vgg-16"])
def test_large_networks_are_registered(build):
    with torch.device("meta"):
        model = build(classes=7)
    kind = registry.kind_of(model)
    twin = registry.construct(kind, kind.config(model), "meta")
    assert kind.name == f"zoo.{type(model).__name__}" and registry.named(kind.name) is kind
    assert {n: t.shape for n, t in twin.state_dict().items()} == {n: t.shape for n, t in model.state_dict().items()}


@small
def test_every_parameter_has_a_gradient(build, shape):
    torch.manual_seed(2)
    model = build()
    model(torch.rand(4, *shape)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_alexnet_computes_its_formula():
    torch.manual_seed(3)
    model = zoo.AlexNet(classes=2).eval()
    layers = nn.ModuleList(
        [
            nn.Sequential(model.conv1, nn.ReLU(), nn.LocalResponseNorm(5, 1e-4, 0.75, 1.0), nn.MaxPool2d(3, 2)),
            nn.Sequential(model.conv2, nn.ReLU(), nn.LocalResponseNorm(5, 1e-4, 0.75, 1.0), nn.MaxPool2d(3, 2)),
            nn.Sequential(model.conv3, nn.ReLU(), model.conv4, nn.ReLU(), model.conv5, nn.ReLU(), nn.MaxPool2d(3, 2)),
            nn.Sequential(nn.Flatten(), model.fc6, nn.ReLU(), model.fc7, nn.ReLU(), model.fc8),
        ]
    )
    x = y = torch.rand(1, 3, 227, 227)
    with torch.no_grad():
        for layer in layers:
            y = layer(y)
        torch.testing.assert_close(model(x), y)
    # The normalisation by hand, at one pixel: channels 3 to 7 around channel 5.
    a = model.conv1(x).relu()
    b = a[0, 5, 2, 2] / (1 + 1e-4 / 5 * a[0, 3:8, 2, 2].square().sum()) ** 0.75
    torch.testing.assert_close(layers[0][2](a)[0, 5, 2, 2], b)


def test_lenet_5_computes_its_formula():
    torch.manual_seed(4)
    model, x = zoo.LeNet5().eval(), torch.rand(2, 1, 28, 28)
    pooled = nn.MaxPool2d(2, 2)
    y = pooled(model.conv2(pooled(model.conv1(x)))).reshape(2, 800)
    torch.testing.assert_close(model(x), model.fc2(torch.relu(model.fc1(y))))


def test_a_residual_block_that_adds_nothing_is_its_shortcut():
    block = zoo.CifarResNet(8).layer2[0].eval()
    nn.init.zeros_(block.bn2.weight)
    x = torch.rand(2, 16, 6, 6)
    y = block(x)
    assert y.shape == (2, 32, 3, 3)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert not y[:, :8].any() and not y[:, 24:].any()


def test_a_fire_module_joins_both_sizes():
    torch.manual_seed(5)
    fire = zoo.SqueezeNet().fire2
    x = torch.rand(1, 96, 5, 6)
    s = torch.relu(fire.squeeze(x))
    y = fire(x)
    assert torch.equal(y[:, :64], torch.relu(fire.expand1x1(s)))
    assert torch.equal(y[:, 64:], torch.relu(fire.expand3x3(s)))


def test_a_bypass_goes_around_the_fires_of_the_paper():
    plain, simple, complicated = (zoo.SqueezeNet(bypass=bypass) for bypass in (None, "simple", "complex"))
    around = {
        number: [type(getattr(model.get_submodule(f"fire{number}"), "bypass", None)) for model in (simple, complicated)]
        for number in range(2, 10)
    }
    assert around == {n: [nn.Identity, nn.Identity] if n % 2 else [type(None), nn.Conv2d] for n in range(2, 10)}
    simple.load_state_dict(plain.state_dict())
    x = torch.rand(1, 128, 5, 5)
    with torch.no_grad():
        assert torch.equal(simple.fire3(x), plain.fire3(x) + x)
        fire, bypass = complicated.fire4, complicated.fire4.bypass
        both = torch.cat([torch.relu(f(torch.relu(fire.squeeze(x)))) for f in (fire.expand1x1, fire.expand3x3)], 1)
        matrix = bypass.weight.flatten(1)
        torch.testing.assert_close(
            fire(x), both + torch.einsum("oi,nihw->nohw", matrix, x) + bypass.bias[:, None, None]
        )


@pytest.mark.parametrize("bypass", ["simple", "complex"])
def test_convert_runs_a_bypass(bypass):
    torch.manual_seed(6)
    model, x = zoo.SqueezeNet("1.1", 3, bypass).eval(), torch.rand(2, 3, 25, 25)
    tt.prune.magnitude(model, sparsity=0.7)
    fast = tt.convert(model, plan="sparse")
    layers = [module for module in fast.modules() if isinstance(module, tt.nn.SparseConv2d)]
    assert len(layers) == 26 + 4 * (bypass == "complex")
    assert sum(layer.relu for layer in layers) == 26
    with torch.no_grad():
        torch.testing.assert_close(fast(x), tt.finalize(model)(x))


@pytest.mark.parametrize(("version", "sides"), [("1.0", (111, 55, 27, 13, 15)), ("1.1", (113, 56, 28, 14, 14))])
def test_squeezenet_has_the_papers_sides(version, sides):
    model = on_meta(lambda: zoo.SqueezeNet(version))
    seen = []
    for module in (model.conv1, model.fire2, model.conv10):
        module.register_forward_hook(lambda _module, _inputs, output: seen.append(output.shape[-1]))
    last = {"1.0": (model.fire5, model.fire9), "1.1": (model.fire4, model.fire6)}[version]
    for module in last:
        module.register_forward_hook(lambda _module, _inputs, output: seen.append(output.shape[-1]))
    model(torch.empty(1, 3, 227, 227, device="meta"))
    assert tuple(seen) == sides


def test_mobilenet_is_made_of_pairs_of_depthwise_and_1x1():
    model = on_meta(zoo.MobileNet)
    for block in model.blocks:
        depthwise, pointwise = (module for module in block if isinstance(module, nn.Conv2d))
        assert depthwise.groups == depthwise.in_channels == depthwise.out_channels
        assert pointwise.kernel_size == (1, 1) and pointwise.groups == 1
    counted = count(model, torch.empty(1, 3, 224, 224, device="meta"))
    ones = sum(layer.macs for layer in counted.layers if layer.name.startswith("blocks") and layer.name.endswith("3"))
    assert ones / counted.macs == pytest.approx(0.9486, abs=1e-4)  # table 2 of the paper: 94.86 %


@pytest.mark.parametrize(
    ("build", "shape"),
    [SMALL[0], SMALL[1], SMALL[3], SMALL[6], SMALL[7], SMALL[8]],
    ids=["lenet-5", "resnet", "squeezenet", "complex-bypass", "mobilenet", "binary-mlp"],
)
def test_exports(build, shape):
    model = build().eval()
    x = torch.rand(2, *shape)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("n", min=1, max=64)},))
    x = torch.rand(5, *shape)
    torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize(
    ("build", "shape", "sentence"),
    [
        (zoo.LeNet5, (2, 784), r"LeNet5: images must be \[N, 1, 28, 28\], got shape \(2, 784\)"),
        (zoo.LeNet5, (2, 3, 28, 28), r"images must be \[N, 1, 28, 28\], got shape \(2, 3, 28, 28\)"),
        (zoo.AlexNet, (1, 3, 224, 224), r"AlexNet: images must be \[N, 3, 227, 227\], got shape \(1, 3, 224, 224\)"),
        (zoo.VGG16, (1, 3, 224, 225), r"VGG16: images must be \[N, 3, 224, 224\], got"),
        (zoo.ResNet20, (3, 32, 32), r"CifarResNet: images must be \[N, 3, height, width\] of 1 pixels or more, got"),
        (zoo.ResNet20, (1, 3, 0, 32), r"CifarResNet: images must be .* got shape \(1, 3, 0, 32\)"),
        (zoo.SqueezeNet, (1, 3, 227, 28), r"SqueezeNet: images must be \[N, 3, height, width\] of 29 pixels or more"),
        (lambda: zoo.SqueezeNet("1.1"), (1, 3, 24, 227), r"SqueezeNet: images must be .* of 25 pixels or more"),
        (zoo.MobileNet, (1, 1, 32, 32), r"MobileNet: images must be \[N, 3, height, width\]"),
    ],
)
def test_wrong_images_are_refused(build, shape, sentence):
    model = on_meta(build)
    with pytest.raises(ValueError, match=sentence):
        model(torch.empty(shape, device="meta"))
    with pytest.raises(TypeError, match="images must be a tensor, got list; pass a batch of images"):
        model([1.0])


@pytest.mark.parametrize(
    ("build", "error", "sentence"),
    [
        (lambda: zoo.LeNet5(0), ValueError, "LeNet5: classes must be at least 1, got 0"),
        (lambda: zoo.LeNet5(dropout=1.0), ValueError, r"LeNet5: dropout must be in \[0, 1\), got 1.0"),
        (lambda: zoo.AlexNet(1.0), TypeError, "AlexNet: classes must be an int, got 1.0"),
        (lambda: zoo.VGG16(True), TypeError, "VGG16: classes must be an int, got True"),
        (lambda: zoo.CifarResNet(18), ValueError, r"depth must be 6 n \+ 2 from 8 to 1202, got 18"),
        (lambda: zoo.CifarResNet(2), ValueError, r"depth must be 6 n \+ 2 from 8 to 1202, got 2"),
        (lambda: zoo.CifarResNet("20"), TypeError, "depth must be an int, got '20'"),
        (lambda: zoo.ResNet20(classes=-1), ValueError, "CifarResNet: classes must be at least 1, got -1"),
        (lambda: zoo.SqueezeNet("1.2"), ValueError, r"version must be '1\.0' or '1\.1', got '1\.2'"),
        (lambda: zoo.SqueezeNet(1.0), ValueError, r"version must be '1\.0' or '1\.1', got 1\.0"),
        (lambda: zoo.SqueezeNet(bypass=True), ValueError, "bypass must be 'simple', 'complex' or None, got True"),
        (lambda: zoo.SqueezeNet(classes=0), ValueError, "SqueezeNet: classes must be at least 1, got 0"),
        (lambda: zoo.MobileNet(0.0), ValueError, r"width must be in \(0, 16\], got 0.0"),
        (lambda: zoo.MobileNet(float("nan")), ValueError, r"width must be in \(0, 16\], got nan"),
        (lambda: zoo.MobileNet("1"), TypeError, "width must be a number, got '1'"),
        (lambda: zoo.MobileNet(classes=0), ValueError, "MobileNet: classes must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_refused(build, error, sentence):
    with pytest.raises(error, match=sentence):
        build()


def test_a_file_from_before_the_relus_were_modules_still_loads(tmp_path):
    network = zoo.SqueezeNet("1.1", 10).eval()
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    want = network(images)
    for module in list(network.modules()):
        for name in [name for name, child in module._modules.items() if type(child) is nn.ReLU]:
            del module._modules[name]
    tt.save(network, tmp_path / "old.terse")
    assert torch.equal(tt.load(tmp_path / "old.terse")(images), want)


@pytest.mark.parametrize(
    "make", [zoo.AlexNet, zoo.SqueezeNet, partial(zoo.SqueezeNet, bypass="complex"), zoo.MobileNet]
)
def test_convert_finds_every_relu(make):
    network = make(classes=10)
    relus = {name for name, module in network.named_modules() if type(module) is nn.ReLU}
    assert relus == set(fuse(network, ()).in_place) != set()
