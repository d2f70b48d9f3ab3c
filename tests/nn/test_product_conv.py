"""ProductConv2d and ResidualConv2d as layers: from and to dense, training, state, files, compilers, and refusals."""

import copy
import pickle

import pytest
import torch
from torch import nn

import tersetorch as tt
from tersetorch.formats import ProductWeight
from tersetorch.nn import ProductConv2d, ResidualConv2d

SIZES = [
    {},
    {"stride": 2, "padding": 1, "dilation": (1, 2)},
    {"groups": 2, "bias": False},
    {"padding": "same", "padding_mode": "circular"},
]


def dense(**sizes):
    torch.manual_seed(0)
    return nn.Conv2d(4, 12, 3, **sizes)


def product(**sizes):
    module = dense(**sizes)
    tt.quantize.product(nn.Sequential(module), 9, sub_vector=3)
    return ProductConv2d.from_dense(module)


def residual(**sizes):
    module = dense(**sizes)
    tt.quantize.residual(nn.Sequential(module), 2, 5)
    return ResidualConv2d.from_dense(module)


LAYERS = pytest.mark.parametrize("make", [product, residual])


@LAYERS
@pytest.mark.parametrize("sizes", SIZES)
def test_computes_what_its_dense_form_does(make, sizes):
    layer = make(**sizes)
    plain = layer.to_dense()
    assert type(plain) is nn.Conv2d and torch.equal(plain.weight, layer.weight)
    for shape in ((2, 4, 9, 8), (4, 7, 7), (0, 4, 8, 8)):
        x = torch.randn(shape)
        assert torch.allclose(layer(x), plain(x), atol=1e-5)
        with torch.no_grad():
            assert torch.allclose(layer(x), plain(x), atol=1e-5)


def test_from_dense_takes_over_codes_and_finds_parts():
    module = dense()
    tt.quantize.product(nn.Sequential(module), 9, sub_vector=3)
    layer = ProductConv2d.from_dense(module)
    assert torch.equal(layer.weight, module.weight) and layer.codebooks.shape == (1, 12, 3, 9)
    found = ProductConv2d.from_dense(layer.to_dense(), 3)
    assert torch.equal(found.weight, layer.weight)
    with pytest.raises(ValueError, match="nobody changed since"):
        ResidualConv2d.from_dense(layer.to_dense())
    with pytest.raises(TypeError, match=r"module must be an nn\.Conv2d, got Linear"):
        ProductConv2d.from_dense(nn.Linear(2, 2))


@LAYERS
def test_trains_its_codebooks(make):
    layer = make()
    optimizer = torch.optim.Adam(layer.parameters(), 0.01)
    x, target = torch.randn(8, 4, 6, 6), torch.randn(8, 12, 4, 4)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.97 * losses[0]


@LAYERS
@pytest.mark.parametrize("sizes", SIZES)
def test_state_copies_files_and_dtypes(make, sizes, tmp_path):
    layer = make(**sizes).eval()
    x = torch.randn(2, 4, 8, 8)
    twins = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), type(layer).of_sizes(**layer.sizes)]
    twins[2].load_state_dict(layer.state_dict())
    tt.save(nn.Sequential(layer), tmp_path / "m.terse")
    for twin in (*twins, tt.load(tmp_path / "m.terse")[0]):
        assert type(twin) is type(layer) and torch.equal(twin(x), layer(x))
    narrow = copy.deepcopy(layer).bfloat16()
    assert narrow.codebooks.dtype == torch.float32 and narrow(x.bfloat16()).dtype == torch.bfloat16


@LAYERS
def test_compiles_and_exports(make):
    layer, x = make().eval(), torch.randn(2, 4, 7, 7)
    assert torch.allclose(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x), atol=1e-6)
    with torch.no_grad():
        assert torch.equal(torch.export.export(layer, (x,)).module()(x), layer(x))


def test_relu_and_bad_input():
    layer, x = product(), torch.randn(2, 4, 7, 7)
    weight = layer.product_weight
    fused = ProductConv2d(weight, layer.bias, kernel_size=3, relu=True)
    assert torch.equal(fused(x), layer(x).relu()) and "relu=True" in repr(fused)
    with pytest.raises(ValueError, match=r"input must be \[N, 4, H, W\]"):
        layer(torch.ones(2, 3, 7, 7))
    with pytest.raises(TypeError, match="weight must be a ProductWeight, got Tensor"):
        ProductConv2d(layer.weight, kernel_size=3)
    with pytest.raises(ValueError, match="one segment as wide as its 36 columns, got 12 segments; use ProductConv2d"):
        ResidualConv2d(weight, kernel_size=3)
    with pytest.raises(ValueError, match=r"bias must be \[12\]"):
        ProductConv2d(weight, torch.ones(3), kernel_size=3)
    wide = ProductWeight.from_dense(torch.ones(12, 35), 5)
    with pytest.raises(ValueError, match="multiple of 9 columns"):
        ProductConv2d(wide, kernel_size=3)
