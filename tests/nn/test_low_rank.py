"""Layers of two or three factors: the same function as the dense layer they multiply out to, and layers like others."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import tersetorch as tt
from tersetorch.nn import ClusteredConv2d, LowRankConv2d, LowRankLinear


def image(channels=6, size=(11, 13), seed=0):
    return torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(seed))


def mixed(layer, seed=0):
    """The layer with its channels' orders drawn anew."""
    generator = torch.Generator().manual_seed(seed)
    for order in layer.buffers():
        order.copy_(torch.randperm(len(order), generator=generator))
    return layer


GEOMETRIES = [
    {},
    {"padding": 1},
    {"stride": (2, 1), "padding": (2, 1), "dilation": (1, 2)},
    {"padding": "same", "dilation": 2},
    {"padding": (1, 2), "padding_mode": "circular"},
    {"padding": 2, "padding_mode": "reflect", "stride": 2},
    {"padding": (2, 1), "padding_mode": "replicate", "bias": False},
]
CLUSTERED = {
    "outer product": {"rank": 3, "in_clusters": 2, "out_clusters": 4},
    "outer product of all": {"rank": 5},
    "svd": {"rank": (3, 2), "in_clusters": 2, "out_clusters": 4, "form": "svd"},
    "svd, filters in one cluster": {"rank": (2, 2), "in_clusters": 3, "form": "svd"},
    "svd, channels in one cluster": {"rank": (2, 2), "out_clusters": 2, "form": "svd"},
    "monochromatic": {"out_clusters": 4, "form": "monochromatic"},
}


def all_layers():
    torch.manual_seed(0)
    yield LowRankLinear(20, 12, 5), torch.randn(3, 20)
    for form in ("filters", "separable"):
        yield LowRankConv2d(6, 8, (3, 5), 4, padding=1, form=form), image()
    for options in CLUSTERED.values():
        yield mixed(ClusteredConv2d(6, 8, (3, 5), padding=1, **options)), image()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_linear_of_full_rank_is_the_layer_itself(dtype):
    torch.manual_seed(0)
    dense = nn.Linear(13, 7, dtype=dtype)
    layer = LowRankLinear.from_dense(dense, 7)
    assert layer.first.weight.shape == (7, 13) and layer.second.weight.shape == (7, 7) and layer.bias is dense.bias
    assert (layer.weight - dense.weight).abs().max() < 1e-6 and layer.weight.dtype == dtype
    x = torch.randn(2, 3, 13, dtype=dtype)
    torch.testing.assert_close(layer(x), dense(x))


@pytest.mark.parametrize("sizes", GEOMETRIES, ids=str)
@pytest.mark.parametrize("form", ["filters", "separable"])
def test_convolution_of_full_rank_is_the_layer_itself(form, sizes):
    torch.manual_seed(0)
    dense = nn.Conv2d(6, 8, (3, 5), **sizes)
    layer = LowRankConv2d.from_dense(dense, {"filters": 8, "separable": 18}[form], form)
    assert (layer.weight - dense.weight).abs().max() < 1e-6
    x = image()
    torch.testing.assert_close(layer(x), dense(x), atol=5e-6, rtol=1e-5)
    torch.testing.assert_close(layer(x[0]), dense(x[0]), atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("sizes", GEOMETRIES, ids=str)
@pytest.mark.parametrize("options", CLUSTERED.values(), ids=CLUSTERED)
def test_clustered_convolution_is_that_of_its_weight(options, sizes):
    torch.manual_seed(0)
    layer = mixed(ClusteredConv2d(6, 8, (3, 5), **options, **sizes))
    dense = layer.to_dense()
    torch.testing.assert_close(dense.weight, layer.weight)
    for x in (image(), image()[0]):
        torch.testing.assert_close(layer(x), dense(x), atol=2e-6, rtol=1e-5)


def test_factors_and_labels_that_do_not_fit_are_refused():
    """Once what was missing stayed as the memory was, and what was narrow was spread."""
    dense, labels = nn.Conv2d(6, 8, (3, 5)), torch.tensor([0, 1, 0, 1, 1, 0])
    first, middle, last = torch.randn(2, 1, 3, 3), torch.randn(2, 1, 2, 3, 3, 5), torch.randn(2, 1, 8, 2)
    ClusteredConv2d.from_factors(dense, first, middle, last, form="svd", in_labels=labels)
    for factors, chosen, sentence in (
        ((first, middle), labels, "last must have 4 dimensions for svd, got None"),
        ((first[0], middle, last), labels, r"first must have 4 dimensions for svd, got shape \(1, 3, 3\)"),
        ((first, middle, last[:, :, :1]), labels, r"last must be \[2, 1, 8, 2\] .* got \[2, 1, 1, 2\]"),
        ((first, middle[..., :1], last), labels, r"middle must be \[2, 1, 2, 3, 3, 5\]"),
        ((first, middle, last), labels.clamp(max=0), "in_labels must be int64 and put 3 channels into each of 2 clu"),
        ((first, middle, last), 2 * labels - 1, "in_labels must be int64 and put 3 channels"),
    ):
        with pytest.raises(ValueError, match=f"ClusteredConv2d: {sentence}"):
            ClusteredConv2d.from_factors(dense, *factors, form="svd", in_labels=chosen)


def test_other_channels_than_a_clustered_convolution_has_are_refused():
    """More of them were passed over where channels have an order."""
    layer = ClusteredConv2d(4, 6, 3, 2, 2, 3)
    for shape in ((2, 6, 8, 8), (2, 3, 8, 8), (6, 8, 8), (8, 8)):
        with pytest.raises(ValueError, match=r"ClusteredConv2d: input must be \[N, 4, H, W\] or \[4, H, W\], got"):
            layer(torch.ones(shape))
    x = torch.randn(2, 4, 8, 8)
    assert torch.equal(torch.fx.symbolic_trace(nn.Sequential(layer))(x), layer(x))


def test_weight_of_clusters_is_the_sum_that_its_docstring_writes():
    torch.manual_seed(0)
    g, h, j, k = 2, 4, 3, 2
    first, last = torch.randn(g, h, j, 3), torch.randn(g, h, 2, k)
    middle = torch.randn(g, h, k, j, 3, 5)
    inputs, outputs = torch.tensor([0, 1, 0, 1, 1, 0]), torch.tensor([3, 1, 0, 2, 0, 1, 2, 3])
    dense = nn.Conv2d(6, 8, (3, 5))
    layer = ClusteredConv2d.from_factors(dense, first, middle, last, form="svd", in_labels=inputs, out_labels=outputs)
    weight = np.zeros((8, 6, 3, 5), np.float32)
    seen = {}
    for f, of in enumerate(outputs.tolist()):
        row = seen.setdefault(("f", of), []).__len__()
        seen["f", of].append(f)
        for of_c in range(g):
            for position, c in enumerate((inputs == of_c).nonzero()[:, 0].tolist()):
                weight[f, c] = torch.einsum(
                    "k,kjyx,j->yx", last[of_c, of, row], middle[of_c, of], first[of_c, of, :, position]
                ).numpy()
    torch.testing.assert_close(layer.weight, torch.from_numpy(weight))
    torch.testing.assert_close(layer.bias, dense.bias)
    x = image()
    torch.testing.assert_close(
        layer(x), functional.conv2d(x, torch.from_numpy(weight), dense.bias), atol=1e-5, rtol=1e-4
    )


def test_factors_of_a_dense_layer_draw_nothing():
    torch.manual_seed(0)
    linear, conv = nn.Linear(6, 5), nn.Conv2d(4, 8, 3)
    state = torch.random.get_rng_state()
    LowRankLinear.from_dense(linear, 2)
    tt.factorize.bicluster(nn.Sequential(conv), 1, 2, 2, restarts=2)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_products_are_drawn_with_the_dense_layers_variance():
    torch.manual_seed(0)
    for layer, dense in (
        (LowRankLinear(400, 300, 20), nn.Linear(400, 300)),
        (LowRankConv2d(64, 64, 3, 10), nn.Conv2d(64, 64, 3)),
        (LowRankConv2d(64, 64, 3, 10, form="separable"), nn.Conv2d(64, 64, 3)),
    ):
        assert float(layer.weight.std().detach()) == pytest.approx(float(dense.weight.std().detach()), rel=0.1)


def test_layers_are_layers():
    for layer, x in all_layers():
        layer.eval()
        y = layer(x)
        y.square().sum().backward()
        assert all(parameter.grad is not None for parameter in layer.parameters())
        shown = repr(layer)
        assert "rank=" in shown or "monochromatic" in shown
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), type(layer)(**layer.sizes)):
            twin.load_state_dict(layer.state_dict())
            assert torch.equal(twin(x), y) and twin.sizes == layer.sizes
        dense = layer.to_dense()
        torch.testing.assert_close(dense(x), y, atol=2e-6, rtol=1e-5)
        assert layer.weight_shape == dense.weight.shape == layer.weight.shape
        wide = layer.to(torch.bfloat16)(x.bfloat16())
        assert wide.dtype == torch.bfloat16


def test_compile_and_export(fresh_compiler):
    for layer, x in all_layers():
        torch.compiler.reset()
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), layer(x))
        exported = torch.export.export(layer, (x,)).module()
        torch.testing.assert_close(exported(x), layer(x))


def test_weight_lets_gradients_through_and_stays_read_only():
    layer = LowRankLinear(6, 5, 2)
    layer.weight.sum().backward()
    assert layer.first.weight.grad is not None
    with pytest.raises((AttributeError, KeyError)):
        layer.weight = nn.Parameter(torch.zeros(5, 6))


def test_count_is_that_of_the_factors():
    model = nn.Sequential(
        LowRankConv2d(6, 8, (3, 5), 4, padding=1, form="separable"),
        ClusteredConv2d(8, 12, 3, 3, 2, 4, stride=2),
        nn.Flatten(),
        LowRankLinear(12 * 5 * 5, 10, 4),
    )
    counted = tt.costs.count(model, torch.randn(1, 6, 11, 13))
    assert not counted.uncounted
    separable = 4 * 6 * 3 * 11 * 13 + 8 * 4 * 5 * 11 * 11
    blocks = 2 * 4 * 3 * (8 // 2 * 11 * 11 + 9 * 5 * 5 + 12 // 4 * 5 * 5)
    assert counted.macs == separable + blocks + 4 * (300 + 10)
    assert counted.parameters == 4 * (6 * 3 + 8 * 5) + 8 + 2 * 4 * 3 * (4 + 9 + 3) + 12 + 4 * (300 + 10) + 10


REFUSED = [
    (lambda: LowRankLinear(6, 5, 0), ValueError, "LowRankLinear: rank must be from 1 to 5, got 0"),
    (lambda: LowRankLinear(6, 5, 6), ValueError, "rank must be from 1 to 5, got 6"),
    (lambda: LowRankLinear(6, 5, 2.0), TypeError, "rank must be an int, got 2.0"),
    (lambda: LowRankLinear(0, 5, 1), ValueError, "in_features must be at least 1, got 0"),
    (lambda: LowRankLinear.from_dense(nn.Conv2d(1, 1, 1), 1), TypeError, "module must be an nn.Linear, got Conv2d"),
    (lambda: LowRankConv2d(2, 3, 3, 4), ValueError, "rank must be from 1 to 3, got 4"),
    (lambda: LowRankConv2d(2, 3, 3, 7, form="separable"), ValueError, "rank must be from 1 to 6, got 7"),
    (lambda: LowRankConv2d(2, 3, 3, 1, form="tucker"), ValueError, "form must be one of"),
    (lambda: LowRankConv2d.from_dense(nn.Conv2d(4, 4, 3, groups=2), 1), ValueError, "must have one group, got 2"),
    (lambda: LowRankConv2d.from_dense(nn.ConvTranspose2d(4, 4, 3), 1), TypeError, "nn.Conv2d, got ConvTranspose2d"),
    (lambda: ClusteredConv2d(6, 8, 3, 2, 4), ValueError, "in_clusters must divide in_channels=6, got 4"),
    (lambda: ClusteredConv2d(6, 8, 3, 2, 1, 3), ValueError, "out_clusters must divide out_channels=8, got 3"),
    (lambda: ClusteredConv2d(6, 8, 3, 0), ValueError, "rank must be from 1 to 48, got 0"),
    (lambda: ClusteredConv2d(6, 8, 3, 2, form="svd"), TypeError, "rank must be two ints for svd, got 2"),
    (lambda: ClusteredConv2d(6, 8, 3, (7, 1), form="svd"), ValueError, r"rank\[0\] must be from 1 to 6, got 7"),
    (lambda: ClusteredConv2d(6, 8, 3, 2, form="monochromatic"), ValueError, "must be 1 for monochromatic"),
    (lambda: ClusteredConv2d(6, 8, 3, form="cp"), ValueError, "form must be one of"),
]


@pytest.mark.parametrize(("make", "error", "sentence"), REFUSED, ids=[case[2] for case in REFUSED])
def test_bad_sizes_are_refused(make, error, sentence):
    with pytest.raises(error, match=sentence):
        make()


def test_weights_that_are_not_finite_are_refused():
    dense = nn.Linear(4, 3)
    nn.init.constant_(dense.weight, float("nan"))
    with pytest.raises(ValueError, match="weight must be finite, got NaN or infinity"):
        LowRankLinear.from_dense(dense, 1)
