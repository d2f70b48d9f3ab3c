"""ProductLinear and ResidualLinear as layers: from and to dense, state, copies, dtypes, compilers, and refusals."""

import copy
import pickle

import pytest
import torch
from torch import nn

import tersetorch as tt
from tersetorch.formats import ProductWeight
from tersetorch.methods.quantize.product import product_quantize
from tersetorch.methods.quantize.residual import residual_quantize
from tersetorch.nn import ProductConv2d, ProductLinear, ResidualConv2d, ResidualLinear


def product(entries=9, sub_vector=3, seed=0, **options):
    torch.manual_seed(seed)
    dense = nn.Linear(20, 30)
    codes, codebooks = product_quantize(dense.weight, entries, sub_vector=sub_vector)
    return ProductLinear(ProductWeight.from_codes(codes, codebooks, 20), dense.bias.detach().clone(), **options)


def residual():
    torch.manual_seed(0)
    dense = nn.Linear(20, 30)
    return ResidualLinear.from_codes(*residual_quantize(dense.weight, 3, 5), dense.bias.detach(), in_features=20)


LAYERS = pytest.mark.parametrize("make", [product, residual])


@LAYERS
def test_computes_what_its_dense_form_does(make):
    layer = make()
    dense = layer.to_dense()
    assert type(dense) is nn.Linear and torch.equal(dense.weight, layer.weight)
    for shape in ((20,), (1, 20), (2, 13, 20), (0, 20), (40, 20)):
        x = torch.randn(shape)
        assert torch.allclose(layer(x), dense(x), atol=1e-5)
        with torch.no_grad():
            assert torch.allclose(layer(x), dense(x), atol=1e-5)


def test_from_dense_finds_the_parts_again():
    layer = product()
    found = ProductLinear.from_dense(layer.to_dense(), 3)
    assert torch.equal(found.weight, layer.weight)
    assert found.codebooks.shape == layer.codebooks.shape
    with pytest.raises(ValueError, match="at most 256 distinct parts in each 4 columns, got more"):
        ProductLinear.from_dense(nn.Linear(8, 300))
    with pytest.raises(ValueError, match="nobody changed since"):
        ResidualLinear.from_dense(layer.to_dense())


@pytest.mark.parametrize("make", [lambda: nn.Linear(20, 30), lambda: nn.Conv2d(4, 30, 3)])
def test_a_live_weight_that_its_codes_do_not_say_is_refused(make):
    product, residual = (
        (ProductLinear, ResidualLinear) if isinstance(make(), nn.Linear) else (ProductConv2d, ResidualConv2d)
    )
    torch.manual_seed(0)
    model = nn.Sequential(make())
    tt.quantize.product(model, 9, sub_vector=3)
    assert torch.equal(product.from_dense(model[0]).weight, model[0].weight)
    model.bfloat16()
    assert torch.equal(product.from_dense(model[0]).weight, model[0].weight.float())
    tt.prune.magnitude(model, 0.5)
    with pytest.raises(ValueError, match="module's weight must be what its codes and codebooks say"):
        product.from_dense(model[0])
    model = nn.Sequential(make())
    tt.quantize.residual(model, 3, 5)
    torch.testing.assert_close(residual.from_dense(model[0]).weight, model[0].weight.detach())
    with pytest.raises(ValueError, match=r"its dtype, torch\.bfloat16, makes another"):
        residual.from_dense(model.bfloat16()[0])


@LAYERS
def test_trains_its_codebooks(make):
    layer = make()
    optimizer = torch.optim.Adam(layer.parameters(), 0.01)
    x, target = torch.randn(40, 20), torch.randn(40, 30)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@LAYERS
def test_state_copies_and_pickles(make):
    layer = make().eval()
    x = torch.randn(3, 20)
    twins = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    other = make()
    with torch.no_grad():
        other.codebooks.zero_()
    other.load_state_dict(layer.state_dict())
    for twin in (*twins, other):
        assert torch.equal(twin(x), layer(x))


def test_a_state_of_other_entries_is_taken_and_a_damaged_one_refused():
    layer, narrow = product(entries=20), product(entries=9, sub_vector=5)
    parameter = narrow.codebooks
    narrow.load_state_dict(layer.state_dict())
    assert narrow.codebooks is parameter
    x = torch.randn(2, 20)
    assert torch.equal(narrow(x), layer(x))
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    state["codes"][0, 0] = 20
    with pytest.raises(RuntimeError, match=r"codes must lie in \[0, 20\), got 20"):
        layer.load_state_dict(state)


@LAYERS
def test_codebooks_stay_float32(make):
    layer = make().bfloat16()
    assert layer.codebooks.dtype == torch.float32 and layer.bias.dtype == torch.bfloat16
    assert layer(torch.randn(2, 20, dtype=torch.bfloat16)).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert make()(torch.randn(2, 20)).dtype == torch.bfloat16


def test_int8_and_relu():
    layer, x = product(mode="int8", relu=True), torch.randn(5, 20)
    exact = torch.relu(layer.to_dense()(x))
    with torch.no_grad():
        y = layer(x)
    assert (y >= 0).all() and (y - exact).abs().max() < 0.1 and not torch.equal(y, exact)
    assert torch.allclose(layer(x), exact, atol=1e-5)
    assert "mode=int8, relu=True" in repr(layer)


@LAYERS
def test_compiles_and_exports(make):
    layer, x = make().eval(), torch.randn(3, 20)
    assert torch.allclose(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x), atol=1e-6)
    with torch.no_grad():
        exported = torch.export.export(layer, (x,))
        assert torch.equal(exported.module()(x), layer(x))


def test_bad_input_is_refused():
    layer = product()
    with pytest.raises(TypeError, match="input must be a tensor, got list"):
        layer([1.0])
    with pytest.raises(ValueError, match=r"input must be \[..., 20\], got shape \(2, 19\)"):
        layer(torch.ones(2, 19))
    weight = layer.product_weight
    with pytest.raises(TypeError, match="weight must be a ProductWeight, got Tensor"):
        ProductLinear(layer.weight)
    with pytest.raises(ValueError, match=r"bias must be \[30\]"):
        ProductLinear(weight, torch.ones(3))
    with pytest.raises(TypeError, match="bias must be float32 or bfloat16"):
        ProductLinear(weight, torch.ones(30).double())
    with pytest.raises(ValueError, match="mode must be one of"):
        ProductLinear(weight, mode="bfloat16")
    with pytest.raises(TypeError, match="relu must be True or False"):
        ProductLinear(weight, relu=1)
    with pytest.raises(ValueError, match="weight must have one segment as wide as its 20 columns, got 7"):
        ResidualLinear(weight)
    with pytest.raises(TypeError, match=r"module must be an nn\.Linear, got Conv2d"):
        ProductLinear.from_dense(nn.Conv2d(1, 1, 1))
