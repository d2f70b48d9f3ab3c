"""CodebookLinear in place of nn.Linear: the same numbers, training, copies, state, files and conversion."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import tersetorch as tt
from tersetorch.formats import CodebookWeight
from tersetorch.nn import CodebookLinear


def dense_layer(out_features=37, in_features=150, entries=16, bias=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    dense = nn.Linear(in_features, out_features, bias=bias)
    with torch.no_grad():
        table = torch.randn(entries, generator=g)
        dense.weight.copy_(table[torch.randint(entries, dense.weight.shape, generator=g)])
        if bias:
            dense.bias.copy_(torch.randn(out_features, generator=g))
    return dense


def inputs(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("entries", [3, 16, 32, 256])
@pytest.mark.parametrize("bias", [True, False])
def test_computes_what_the_dense_layer_computes(entries, bias):
    dense = dense_layer(entries=entries, bias=bias)
    layer = CodebookLinear.from_dense(dense)
    assert torch.equal(layer.weight, dense.weight) and torch.equal(layer.to_dense().weight, dense.weight)
    for shape in ((150,), (1, 150), (2, 3, 150), (20, 150), (0, 150)):
        x = inputs(*shape)
        recorded = layer(x)
        torch.testing.assert_close(recorded, dense(x), rtol=1e-5, atol=2e-5)
        with torch.no_grad():
            assert torch.equal(layer(x), recorded)


def test_rounding_layouts_stay_near_and_train_exactly():
    dense, x = dense_layer(), inputs(5, 150)
    layer = CodebookLinear.from_dense(dense)
    for layout, error in (("codebook_bfloat16", 0.02), ("codebook_int8", 0.03)):
        with torch.no_grad():
            got = layer.pack(layout)(x)
            assert not torch.equal(got, dense(x))
            assert (got - dense(x)).abs().max() < error * dense(x).abs().max()
        torch.testing.assert_close(layer(x), dense(x), rtol=1e-5, atol=2e-5)
    with pytest.raises(ValueError, match="layout must be one of"):
        layer.pack("csr")


def test_gradients_and_fine_tuning():
    dense, x, upstream = dense_layer(), inputs(5, 150), inputs(5, 37, seed=2)
    layer = CodebookLinear.from_dense(dense)
    x.requires_grad_()
    (of_x,) = torch.autograd.grad((dense(x) * upstream).sum(), x)
    dense(x).backward(upstream)
    (got_x,) = torch.autograd.grad((layer(x) * upstream).sum(), x)
    layer(x).backward(upstream)
    torch.testing.assert_close(got_x, of_x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.bias.grad, dense.bias.grad)
    codes = layer.codebook_weight.unpacked().int().flatten()
    sums = torch.zeros(16).index_add(0, codes, dense.weight.grad.flatten())
    torch.testing.assert_close(layer.codebook.grad[0], sums, rtol=1e-4, atol=1e-3)
    optimizer, losses = torch.optim.Adam(layer.parameters(), lr=0.01), []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (layer(inputs(64, 150)) - inputs(64, 37, seed=3)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]


def test_shared_layers_keep_their_tables():
    for per in ("tensor", "row", 64):
        model = nn.Sequential(nn.Linear(150, 20))
        tt.quantize.kmeans(model, bits=3, per=per)
        layer = CodebookLinear.from_dense(model[0])
        assert layer.codebook.shape[0] == {"tensor": 1, "row": 20, 64: 3}[per]
        assert torch.equal(layer.weight, model[0].weight)
        torch.testing.assert_close(layer(inputs(4, 150)), model(inputs(4, 150)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("per", ["tensor", "row", 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trained_tables_are_taken_as_the_weight_has_them_rounded(per, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 40)).to(dtype)
    tt.quantize.kmeans(model, 4, per=per, bfloat16=dtype == torch.float32)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model(inputs(8, 64).to(dtype)).square().mean().backward()
        optimizer.step()
    layer = CodebookLinear.from_dense(model[0])
    assert layer.codebook.shape == ({"tensor": 1, "row": 40, 16: 4}[per], 16)
    assert torch.equal(layer.weight, model[0].weight.float())


def test_a_state_of_tables_of_other_places_is_refused():
    codes = torch.randint(4, (8, 2048), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    table = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
    rows, blocks = (CodebookLinear(CodebookWeight.from_codes(codes, table, column_block=at)) for at in (0, 256))
    assert {name: tensor.shape for name, tensor in rows.state_dict().items()} == {
        name: tensor.shape for name, tensor in blocks.state_dict().items()
    }
    file = io.BytesIO()
    torch.save(nn.Sequential(rows).state_dict(), file)
    file.seek(0)
    with pytest.raises(RuntimeError, match="column_block must be 256, as the layer's, got a state of 0"):
        nn.Sequential(blocks).load_state_dict(torch.load(file))
    blocks.load_state_dict(blocks.state_dict())
    rows.load_state_dict(dict(rows.state_dict()))  # says nothing, as an older state


OPTIMIZERS = {
    "adam": lambda parameters: torch.optim.Adam(parameters, 0.01),
    "momentum": lambda parameters: torch.optim.SGD(parameters, 0.01, momentum=0.9),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, 0.01),
    "lbfgs": lambda parameters: torch.optim.LBFGS(parameters, 0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_goes_on_with_a_state_of_another_number_of_entries(name):
    layer, wide = (CodebookLinear.from_dense(dense_layer(entries=entries)) for entries in (16, 200))
    other = copy.deepcopy(wide)
    old, new = OPTIMIZERS[name]([layer.codebook]), OPTIMIZERS[name]([other.codebook])

    def step(model, optimizer):
        def loss():
            optimizer.zero_grad()
            value = model(inputs(8, 150)).square().mean()
            value.backward()
            return value

        optimizer.step(loss)

    step(layer, old)
    layer.load_state_dict(wide.state_dict())
    for _ in range(2):
        step(layer, old)
        step(other, new)
        assert torch.equal(layer.codebook, other.codebook)
    assert len(old.state) == 1


def test_copies_state_and_dtypes():
    layer, x = CodebookLinear.from_dense(dense_layer()), inputs(5, 150)
    other = CodebookLinear.from_dense(dense_layer(entries=200, seed=4))
    held = other.codebook
    other.load_state_dict(layer.state_dict())
    assert other.codebook is held
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), other):
        assert torch.equal(twin(x), layer(x))
    half = copy.deepcopy(layer).bfloat16()
    assert torch.equal(half.codebook, layer.codebook) and half(x.bfloat16()).dtype == torch.bfloat16
    state = layer.state_dict()
    state["codes"] = state["codes"][:, :64]
    with pytest.raises(RuntimeError, match=r"codes must be \[rows, 128\]"):
        other.load_state_dict(state)
    assert torch.equal(other(x), layer(x))


def test_compile_and_export():
    layer, x = CodebookLinear.from_dense(dense_layer()).eval(), inputs(5, 150)
    with torch.no_grad():
        assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
        assert torch.equal(torch.export.export(layer, (x,)).module()(x), layer(x))


@pytest.mark.parametrize("layout", ["codebook", "codebook_bfloat16", "codebook_int8"])
def test_files_give_the_same_bits(tmp_path, layout):
    model = nn.Sequential(CodebookLinear.from_dense(dense_layer()).pack(layout), nn.ReLU()).eval()
    tt.save(model, tmp_path / "m.terse")
    x = inputs(5, 150)
    for loaded in (
        tt.load(tmp_path / "m.terse"),
        tt.load(tmp_path / "m.terse", model=nn.Sequential(nn.Linear(150, 37), nn.ReLU()).eval()),
    ):
        assert type(loaded[0]) is CodebookLinear and loaded[0].layout == layout
        with torch.no_grad():
            assert torch.equal(loaded(x), model(x))


def test_convert_makes_it_by_plan_and_fuses_its_relu():
    model = nn.Sequential(dense_layer(), nn.ReLU()).eval()
    fast = tt.convert(model, inputs(2, 150), plan={"0": "codebook_linear"})
    assert type(fast[0]) is CodebookLinear and fast[0].relu
    with torch.no_grad():
        torch.testing.assert_close(fast(inputs(2, 150)), model(inputs(2, 150)), rtol=1e-5, atol=2e-5)


def test_bad_input_is_refused():
    layer = CodebookLinear.from_dense(dense_layer())
    with pytest.raises(ValueError, match=r"input must be \[..., 150\]"):
        layer(inputs(2, 149))
    with pytest.raises(TypeError, match="input must be float32"):
        layer(inputs(2, 150).double())
    with pytest.raises(ValueError, match="at most 256 distinct values"):
        CodebookLinear.from_dense(nn.Linear(100, 100))
    with pytest.raises(TypeError, match=r"module must be an nn\.Linear"):
        CodebookLinear.from_dense(nn.ReLU())
    with pytest.raises(TypeError, match="weight must be a CodebookWeight"):
        CodebookLinear(torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"bias must be \[37\]"):
        CodebookLinear(layer.codebook_weight, torch.zeros(3))
    table = torch.zeros(1, 4)
    with pytest.raises(ValueError, match=r"codes must lie in \[0, 4\), got 4"):
        CodebookWeight.from_codes(torch.full((2, 3), 4, dtype=torch.uint8), table)
    with pytest.raises(ValueError, match="codebook must have 1 or 2 tables, got 3"):
        CodebookWeight.from_codes(torch.zeros(2, 3, dtype=torch.uint8), torch.zeros(3, 4))
    with pytest.raises(TypeError, match="codebook must be float32"):
        CodebookWeight.from_codes(torch.zeros(2, 3, dtype=torch.uint8), table.double())
