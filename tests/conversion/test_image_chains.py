"""Chains of convolutions of signs: pools in the right order, flattened images, and what trained networks decide."""

import pytest
import torch
from torch import nn

import tersetorch as tt
from tersetorch import zoo
from tersetorch.conversion.thresholds import thresholds_of
from tersetorch.methods.binarize import ShiftBatchNorm2d, Sign
from tersetorch.nn import BinaryConv2d, BinaryLinear, SignMaxPool2d
from tersetorch.zoo import data


def stir(model):
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            with torch.no_grad():
                module.running_mean.normal_(0, 6).round_()
                module.running_var.uniform_(0.5, 50)
                module.weight.normal_()
                module.weight[:2] = 0
                module.bias.normal_()
                module.bias[1::2] = 0
    return model.eval()


def network(*middle, channels=70, out=66, size=9, **options):
    """A first layer, a convolution of signs, what is tested behind it, another one, and two linear layers."""
    torch.manual_seed(0)
    images = nn.Sequential(
        nn.Conv2d(2, channels, 3, padding=1),
        nn.BatchNorm2d(channels),
        Sign(),
        nn.Conv2d(channels, out, 3, bias=False, **options),
        *middle,
        nn.Conv2d(out, 33, 2, padding=1),
        ShiftBatchNorm2d(33),
        nn.Hardtanh(),
        Sign(),
    )
    inputs = torch.randn(6, 2, size, size + 1)
    features = images(inputs).flatten(1).shape[1]
    rows = nn.Sequential(nn.Flatten(), nn.Linear(features, 20), nn.BatchNorm1d(20), Sign(), nn.Linear(20, 5))
    model = nn.Sequential(*images, *rows)
    tt.binarize.binary_connect(model)
    return tt.finalize(stir(model)), inputs


def norm(channels=66):
    return nn.BatchNorm2d(channels)


@pytest.mark.parametrize(
    "middle",
    [
        lambda: [norm(), Sign()],
        lambda: [nn.MaxPool2d(2), norm(), nn.Hardtanh(), Sign()],
        lambda: [nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True), ShiftBatchNorm2d(66), Sign()],
        lambda: [nn.MaxPool2d(2, dilation=2), norm(), nn.Dropout2d(0.3), Sign(), nn.Dropout(0.3)],
        lambda: [norm(), nn.MaxPool2d(2), Sign()],
        lambda: [norm(), nn.MaxPool2d(2), norm(), Sign()],
        lambda: [norm(), Sign(), nn.MaxPool2d((2, 3), ceil_mode=True)],
        lambda: [nn.MaxPool2d(2), norm(), Sign(), nn.MaxPool2d(2, padding=1)],
        lambda: [Sign()],
    ],
)
@pytest.mark.parametrize("options", [{}, {"padding": 1}, {"stride": 2, "padding": (0, 2), "groups": 2}])
def test_chains_of_images_decide_alike(middle, options):
    model, x = network(*middle(), size=13, **options)
    fast = tt.convert(model, x, plan="binary")
    layers = [module for module in fast if isinstance(module, BinaryConv2d | BinaryLinear)]
    assert layers.pop(0).inputs == "real"
    assert [layer.thresholds is not None for layer in layers] == [True, True, True, False]
    assert not any(isinstance(module, Sign | nn.BatchNorm2d | nn.MaxPool2d) for module in list(fast)[2:])
    with torch.no_grad():
        assert torch.equal(fast(x), model(x))
        assert torch.equal(tt.convert(model, plan="binary")(x), model(x))


@pytest.mark.parametrize("order", ["pool first", "norm first", "both"])
def test_pooled_thresholds_decide_as_float_modules_do(order):
    # Sums of one weight a filter: pools meet every pair of them.
    torch.manual_seed(0)
    layer = BinaryConv2d.from_dense(nn.Conv2d(1, 60, 2).requires_grad_(False).apply(_to_signs))
    first, second = (stir(nn.Sequential(norm(60)))[0] for _ in range(2))
    with torch.no_grad():
        second.running_mean.normal_(0, 3), second.weight.normal_()
    before = [first] if order != "pool first" else []
    after = [second] if order != "norm first" else []
    x = torch.randn(50, 1, 7, 7)
    want = Sign()(nn.Sequential(*before, nn.MaxPool2d(2), *after)(layer(x)))
    found = thresholds_of(layer, before, after, pooled=True)
    assert found.flipped.any() == (order != "norm first")
    layer.fold_(found.values, found.negated)
    pool = SignMaxPool2d.from_dense(nn.MaxPool2d(2), found.flipped)
    assert torch.equal(pool(layer(x)), tt.ops.sign_pack_images(want))


def _to_signs(module):
    module.weight.copy_(torch.where(module.weight >= 0, 1.0, -1.0))
    module.bias.normal_()


@pytest.mark.parametrize("inputs", ["pixels", "signed_pixels"])
@pytest.mark.parametrize("scale", ["none", "row"])
@pytest.mark.parametrize("shift", [False, True])
def test_a_whole_network_of_the_zoo_is_integer_throughout(inputs, scale, shift, tmp_path):
    torch.manual_seed(0)
    model = zoo.BinaryVGG(channels=5, shift=shift)
    tt.binarize.bnn(model, scale=scale)
    stir(tt.finalize(model))
    pixels = torch.randint(0, 256, (40, 3, 32, 32)).to(torch.uint8)
    x = pixels / 255 if inputs == "pixels" else 2 * (pixels / 255) - 1
    names = [name for name, module in model.named_children() if isinstance(module, nn.Conv2d | nn.Linear)]
    plan = {name: "binary_conv2d" if "conv" in name else "binary_linear" for name in names}
    fast = tt.convert(model, x, plan=plan | {"conv1": f"binary_conv2d_{inputs}"})
    assert [fast.get_submodule(name).thresholds is not None for name in names] == [True] * 8 + [False]
    reasons = {layer.name: layer.reason for layer in tt.report(fast).layers}
    assert "takes 8-bit pixels, hands packed signs on: its thresholds stand for bn1, act1" in reasons["conv1"]
    # What float modules decide of the exact sums.
    first = BinaryConv2d.from_dense(model.conv1, inputs=inputs)
    with torch.no_grad():
        assert torch.equal(fast.conv1(pixels), tt.ops.sign_pack_images(model.act1(model.bn1(first(pixels)))))
        got = fast(x)
        assert torch.equal(got.argmax(1), model(x).argmax(1)) and torch.equal(fast(pixels), got)
    tt.save(fast, tmp_path / "m.terse")
    loaded = tt.load(tmp_path / "m.terse")
    assert type(loaded) is zoo.BinaryVGG and torch.equal(loaded(x), got) and repr(loaded) == repr(fast)
    twin = tt.load(tmp_path / "m.terse", model=model)
    assert torch.equal(twin(x), got)
    signs = [tensor for tensor in tt.inspect(tmp_path / "m.terse").tensors if tensor.name.endswith("signs")]
    assert signs[0].shape == (5, 3, 3, 3) and len(signs) == 9


@pytest.mark.parametrize("channels", [8, 64])
@pytest.mark.parametrize("viewed", [False, True])
def test_a_flatten_of_packed_images_sees_batches(channels, viewed, tmp_path):
    torch.manual_seed(0)
    flatten = Viewed() if viewed else nn.Flatten()
    parts = [nn.Conv2d(3, channels, 3, padding=1), Sign(), nn.MaxPool2d(1), flatten, nn.Linear(64, 16)]
    model = nn.Sequential(Sign(), *parts)
    tt.binarize.binary_connect(model)
    tt.finalize(model.eval())
    image, batch = torch.randn(3, 8, 8), torch.randn(2, 3, 1, 64 // channels)
    fast = tt.convert(model, plan="binary")
    assert fast[1].thresholds is not None
    tt.save(fast, tmp_path / "m.terse")
    for each in (fast, tt.load(tmp_path / "m.terse")) if not viewed else (fast,):
        with torch.no_grad():
            assert torch.equal(each(batch), model(batch))
        with pytest.raises(ValueError, match=r"BinaryConv2d: input must be a batch of images, .* got shape \(3, 8, 8"):
            each(image)
    fast = tt.convert(model, image, plan="binary")
    why = next(layer.reason for layer in tt.report(fast).layers if layer.name == "1")
    assert "returns floats: as a chain it raised for example_inputs: ValueError: BinaryConv2d: input must be a" in why
    with torch.no_grad():
        assert torch.equal(fast(image), model(image))


class Viewed(nn.Module):
    def forward(self, x):
        return x.view(x.size(0), -1)


def test_small_images_with_ceil_mode_decide_alike():
    torch.manual_seed(0)
    pool = nn.MaxPool2d(4, 4, ceil_mode=True)
    model = nn.Sequential(Sign(), nn.Conv2d(3, 8, 3, padding=1), pool, norm(8), Sign(), nn.Conv2d(8, 4, 1))
    tt.binarize.binary_connect(model)
    tt.finalize(stir(model))
    fast = tt.convert(model, torch.randn(2, 3, 9, 9), plan="binary")
    assert type(fast[2]) is SignMaxPool2d
    x = torch.randn(2, 3, 7, 3)
    with torch.no_grad():
        # The order in which torch adds a bias depends on the number of threads.
        torch.testing.assert_close(fast(x), model(x))


def test_measuring_keeps_chains_of_images(timer):
    model, x = network(nn.MaxPool2d(2), norm(), Sign())
    timer.seconds |= {"binary_conv2d": 1e-4, "binary_linear": 1e-4}
    fast = tt.convert(model, x)
    assert tt.report(fast).plan["3"] == "binary_conv2d" and fast[3].thresholds is not None
    with torch.no_grad():
        assert torch.equal(fast(x), model(x))


def test_pixels_in_the_middle_of_a_chain_end_it():
    model, x = network(norm(), Sign())
    plan = {"0": "binary_conv2d_real", "3": "binary_conv2d", "6": "binary_conv2d_signed_pixels"}
    fast = tt.convert(model, plan=plan)
    assert [fast[i].thresholds is not None for i in (3, 6)] == [False, False]
    reasons = {layer.name: layer.reason for layer in tt.report(fast).layers}
    assert "its signs are used by 6 (BinaryConv2d)" in reasons["3"]
    with torch.no_grad():
        assert torch.equal(fast(x), model(x))
    grouped = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    tt.binarize.binary_connect(grouped)
    with pytest.raises(ValueError, match="2 groups, which only convolutions of signs have"):
        tt.convert(grouped, plan={"0": "binary_conv2d_pixels"})


def test_pools_come_back_from_files(tmp_path):
    model, x = network(nn.MaxPool2d(2), norm(), Sign(), nn.MaxPool2d(2))
    fast = tt.convert(model, x, plan="binary")
    assert fast[4].flips is not None and fast[7].flips is None
    tt.save(fast, tmp_path / "m.terse")
    for loaded in (tt.load(tmp_path / "m.terse"), tt.load(tmp_path / "m.terse", model=model)):
        assert repr(loaded) == repr(fast)
        with torch.no_grad():
            assert torch.equal(loaded(x), model(x))
    other, _ = network(nn.MaxPool2d(2, ceil_mode=True), norm(), Sign(), nn.MaxPool2d(2))
    with pytest.raises(ValueError, match="SignMaxPool2d"):
        tt.load(tmp_path / "m.terse", model=other)


def test_compiles_and_exports_whole():
    torch.compiler.reset()
    model, x = network(nn.MaxPool2d(2), norm(), Sign(), size=13)
    fast = tt.convert(model, plan="binary")
    with torch.no_grad():
        assert torch.equal(torch.compile(fast, fullgraph=True, backend="aot_eager")(x), fast(x))
        assert torch.equal(torch.export.export(fast, (x,)).module()(x), fast(x))


def test_costs_count_what_the_dense_model_multiplies():
    model, x = network(nn.MaxPool2d(2), norm(), Sign(), size=13)
    fast = tt.convert(model, plan="binary")
    counts = [tt.costs.count(each, x) for each in (model, fast)]
    assert counts[0].macs == counts[1].macs
    assert counts[1].bytes < counts[0].bytes / 8


@pytest.mark.parametrize(
    "middle,why",
    [
        (lambda: [nn.AvgPool2d(2), norm(), Sign()], "it is followed by 4 (AvgPool2d), not by a Sign"),
        (lambda: [norm(), Sign(), nn.Upsample(scale_factor=2)], "its signs are used by 6 (Upsample)"),
        (lambda: [nn.MaxPool2d(2), nn.MaxPool2d(2), norm(), Sign()], "a second pool, 5 (MaxPool2d)"),
    ],
)
def test_other_modules_end_a_chain(middle, why):
    model, x = network(*middle(), size=13)
    fast = tt.convert(model, x, plan="binary")
    assert fast[3].thresholds is None
    assert why in next(layer.reason for layer in tt.report(fast).layers if layer.name == "3")
    with torch.no_grad():
        assert torch.equal(fast(x), model(x))


def trained(model, digits, epochs):
    handle = tt.binarize.bnn(model)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(epochs):
        for at in torch.randperm(len(digits.train_labels)).split(100):
            optimizer.zero_grad()
            tt.binarize.squared_hinge(model(digits.train_images[at]), digits.train_labels[at]).backward()
            optimizer.step()
            handle.step()
    return model.eval()


def mlp(inputs):
    return nn.Sequential(
        nn.Flatten(),
        *[nn.Linear(inputs, 128, bias=False), nn.BatchNorm1d(128), nn.Hardtanh()],
        *[nn.Linear(128, 100, bias=False), nn.BatchNorm1d(100), nn.Hardtanh(), nn.Dropout(0.1)],
        *[nn.Linear(100, 10, bias=False), nn.BatchNorm1d(10)],
    )


class Convolutional(nn.Module):
    """A small VGG as papers write them: blocks, a forward that flattens, and one activation for all layers."""

    def __init__(self, channels):
        super().__init__()
        self.first = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.second = nn.Conv2d(16, 48, 3, padding=1, bias=False)
        self.third = nn.Conv2d(48, 32, 3, padding=1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(16), nn.BatchNorm2d(48), nn.BatchNorm2d(32), nn.BatchNorm1d(10)])
        self.pool, self.pool_again = nn.MaxPool2d(2), nn.MaxPool2d(2)
        self.activation = nn.Hardtanh()
        self.last = nn.LazyLinear(10, bias=False)

    def forward(self, x):
        x = self.activation(self.norms[0](self.first(x)))
        x = self.activation(self.norms[1](self.pool(self.second(x))))
        x = self.activation(self.norms[2](self.pool_again(self.third(x))))
        return self.norms[3](self.last(x.view(x.size(0), -1)))


def test_trained_networks_decide_alike_on_every_test_image():
    digits = data.load("digits")
    torch.manual_seed(0)
    convolutional = Convolutional(1)
    with torch.no_grad():
        convolutional(digits.train_images[:2])
    for model, epochs, best in ((mlp(digits.in_features), 6, 0.85), (convolutional, 3, 0.8)):
        model = trained(model, digits, epochs)
        fast = tt.convert(model, digits.test_images[:50], plan="binary")
        layers = [module for module in fast.modules() if getattr(module, "inputs", None) == "signs"]
        assert [layer.thresholds is not None for layer in layers] == [True] * (len(layers) - 1) + [False]
        assert len(layers) == (2 if model is not convolutional else 3)
        with torch.no_grad():
            want, got = model(digits.test_images), fast(digits.test_images)
        assert torch.equal(want, got)
        assert (got.argmax(1) == digits.test_labels).float().mean() > best
