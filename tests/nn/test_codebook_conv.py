"""CodebookConv2d in place of nn.Conv2d: the same numbers, training, copies, state, files and conversion."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import tersetorch as tt
from tersetorch.formats import CodebookWeight
from tersetorch.nn import CodebookConv2d

CASES = {
    "plain": (dict(kernel_size=3, padding=1), (2, 8, 7, 7)),
    "steps": (dict(kernel_size=(3, 2), stride=2, padding=(2, 0), dilation=(1, 2), groups=2), (3, 8, 9, 10)),
    "same": (dict(kernel_size=(4, 3), padding="same"), (1, 8, 6, 5)),
    "reflect": (dict(kernel_size=3, padding=2, padding_mode="reflect", bias=False), (2, 8, 6, 6)),
    "circular": (dict(kernel_size=3, padding=(0, 2), padding_mode="circular"), (8, 6, 6)),
    "point": (dict(kernel_size=1), (2, 8, 5, 5)),
}


def dense_layer(entries=16, seed=0, **sizes):
    g = torch.Generator().manual_seed(seed)
    dense = nn.Conv2d(8, 12, **sizes)
    with torch.no_grad():
        table = torch.randn(entries, generator=g)
        dense.weight.copy_(table[torch.randint(entries, dense.weight.shape, generator=g)])
        if dense.bias is not None:
            dense.bias.copy_(torch.randn(12, generator=g))
    return dense


def inputs(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def layer():
    return CodebookConv2d.from_dense(dense_layer(**CASES["plain"][0]))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("entries", [3, 200])
def test_computes_what_the_dense_layer_computes(case, entries):
    sizes, shape = CASES[case]
    dense = dense_layer(entries, **sizes)
    layer = CodebookConv2d.from_dense(dense)
    back = layer.to_dense()
    assert torch.equal(layer.weight, dense.weight) and torch.equal(back.weight, dense.weight)
    assert back.extra_repr() == dense.extra_repr()
    x = inputs(*shape)
    for images in (x, x.contiguous(memory_format=torch.channels_last)) if x.dim() == 4 else (x,):
        recorded = layer(images)
        torch.testing.assert_close(recorded, dense(images), rtol=1e-5, atol=1e-4)
        with torch.no_grad():
            assert torch.equal(layer(images), recorded)
            torch.testing.assert_close(back(images), recorded, rtol=1e-5, atol=1e-4)


def test_rounding_layouts_stay_near_and_train_exactly(layer):
    dense, x = layer.to_dense(), inputs(2, 8, 7, 7)
    for layout, error in (("codebook_bfloat16", 0.02), ("codebook_int8", 0.03)):
        with torch.no_grad():
            got = layer.pack(layout)(x)
            assert not torch.equal(got, dense(x))
            assert (got - dense(x)).abs().max() < error * dense(x).abs().max()
        torch.testing.assert_close(layer(x), dense(x), rtol=1e-5, atol=1e-4)
    with pytest.raises(ValueError, match="layout must be one of"):
        layer.pack("direct")


def test_gradients_and_fine_tuning(layer):
    dense, x, upstream = layer.to_dense(), inputs(2, 8, 7, 7), inputs(2, 12, 7, 7, seed=2)
    dense(x).backward(upstream)
    layer(x).backward(upstream)
    torch.testing.assert_close(layer.bias.grad, dense.bias.grad)
    codes = layer.codebook_weight.unpacked().int().flatten()
    sums = torch.zeros(16).index_add(0, codes, dense.weight.grad.flatten())
    torch.testing.assert_close(layer.codebook.grad[0], sums, rtol=1e-4, atol=1e-3)
    optimizer, losses = torch.optim.Adam(layer.parameters(), lr=0.01), []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (layer(x) - upstream).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]


def test_shared_layers_keep_their_tables():
    for per in ("tensor", "row", 24):
        model = nn.Sequential(nn.Conv2d(8, 12, 3, groups=2))
        tt.quantize.kmeans(model, bits=3, per=per)
        layer = CodebookConv2d.from_dense(model[0])
        assert layer.codebook.shape[0] == {"tensor": 1, "row": 12, 24: 2}[per]
        assert torch.equal(layer.weight, model[0].weight)
        x = inputs(2, 8, 6, 6)
        torch.testing.assert_close(layer(x), model(x), rtol=1e-5, atol=1e-5)


def test_copies_state_and_dtypes(layer):
    x = inputs(2, 8, 7, 7)
    other = CodebookConv2d.from_dense(dense_layer(200, 4, **CASES["plain"][0]))
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
    state["codes"] = state["codes"][:, :32]
    with pytest.raises(RuntimeError, match=r"codes must be \[rows, 64\]"):
        other.load_state_dict(state)
    assert torch.equal(other(x), layer(x))


def test_compile_and_export(layer):
    layer, x = layer.eval(), inputs(2, 8, 7, 7)
    with torch.no_grad():
        assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
        assert torch.equal(torch.export.export(layer, (x,)).module()(x), layer(x))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", ["codebook", "codebook_int8"])
def test_files_give_the_same_bits(tmp_path, case, layout):
    sizes, shape = CASES[case]
    model = nn.Sequential(CodebookConv2d.from_dense(dense_layer(**sizes)).pack(layout), nn.ReLU()).eval()
    tt.save(model, tmp_path / "m.terse")
    x = inputs(*shape)
    for loaded in (
        tt.load(tmp_path / "m.terse"),
        tt.load(tmp_path / "m.terse", model=nn.Sequential(nn.Conv2d(8, 12, **sizes), nn.ReLU()).eval()),
    ):
        assert type(loaded[0]) is CodebookConv2d and loaded[0].layout == layout
        assert repr(loaded) == repr(model)
        with torch.no_grad():
            assert torch.equal(loaded(x), model(x))


def test_convert_makes_it_by_plan_and_fuses_its_relu():
    model = nn.Sequential(dense_layer(kernel_size=3, padding=1), nn.ReLU()).eval()
    x = inputs(2, 8, 7, 7)
    fast = tt.convert(model, x, plan={"0": "codebook_conv2d"})
    assert type(fast[0]) is CodebookConv2d and fast[0].relu
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-4)
    assert tt.convert(model, x, plan={"0": "codebook_conv2d_int8"})[0].layout == "codebook_int8"
    narrow = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8)).eval()
    with pytest.raises(ValueError, match="fewer than 16 weights in a filter"):
        tt.convert(narrow, x, plan={"0": "codebook_conv2d"})


def test_bad_input_is_refused(layer):
    with pytest.raises(ValueError, match=r"input must be \[N, 8, HW\]|input must be \[N, 8, H, W\]"):
        layer(inputs(2, 7, 7, 7))
    with pytest.raises(TypeError, match="input must be float32"):
        layer(inputs(2, 8, 7, 7).double())
    with pytest.raises(ValueError, match="at most 256 distinct values"):
        CodebookConv2d.from_dense(nn.Conv2d(16, 16, 3))
    with pytest.raises(TypeError, match=r"module must be an nn\.Conv2d"):
        CodebookConv2d.from_dense(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="weight must be a CodebookWeight"):
        CodebookConv2d(torch.zeros(2, 2), kernel_size=1)
    weight = CodebookWeight.from_codes(torch.zeros(4, 18, dtype=torch.uint8), torch.zeros(1, 4))
    with pytest.raises(ValueError, match="weight must have a multiple of 4 columns"):
        CodebookConv2d(weight, kernel_size=2)
    with pytest.raises(ValueError, match="groups must divide out_channels"):
        CodebookConv2d(weight, kernel_size=3, groups=3)
    with pytest.raises(ValueError, match="padding_mode must be one of"):
        CodebookConv2d(weight, kernel_size=3, padding_mode="zero")
    with pytest.raises(ValueError, match=r"bias must be \[4\]"):
        CodebookConv2d(weight, torch.zeros(3), kernel_size=3)
