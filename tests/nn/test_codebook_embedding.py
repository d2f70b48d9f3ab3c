"""CodebookEmbedding in place of nn.Embedding: the same rows, training, copies, state, files and conversion."""

import copy
import pickle

import pytest
import torch
from torch import nn

import tersetorch as tt
from tersetorch.formats import CodebookWeight
from tersetorch.nn import CodebookEmbedding


def dense_layer(rows=40, columns=150, entries=16, seed=0, **options):
    g = torch.Generator().manual_seed(seed)
    dense = nn.Embedding(rows, columns, **options)
    with torch.no_grad():
        table = torch.randn(entries, generator=g)
        dense.weight.copy_(table[torch.randint(entries, dense.weight.shape, generator=g)])
    return dense


def some(*shape, rows=40, seed=1):
    return torch.randint(rows, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("entries", [3, 16, 32, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_looks_up_what_the_dense_layer_looks_up(entries, dtype):
    dense = dense_layer(entries=entries).to(dtype)
    layer = CodebookEmbedding.from_dense(dense)
    assert torch.equal(layer.weight, dense.weight.float())
    assert torch.equal(layer.to_dense().weight, dense.weight) and layer.to_dense().weight.dtype == dtype
    for shape in ((), (0,), (5,), (2, 3, 4)):
        for x in (some(*shape), some(*shape).int()):
            assert torch.equal(layer(x), dense(x))
            with torch.no_grad():
                assert torch.equal(layer(x), dense(x))


def test_padding_and_gradients():
    dense = dense_layer(padding_idx=-3)
    layer = CodebookEmbedding.from_dense(dense)
    assert layer.padding_idx == layer.to_dense().padding_idx == 37
    x, upstream = some(8, 9), torch.randn(8, 9, 150, generator=torch.Generator().manual_seed(2))
    x[0] = 37
    layer(x).backward(upstream)
    dense(x).backward(upstream)
    codes = layer.codebook_weight.unpacked().int().flatten()
    sums = torch.zeros(16).index_add(0, codes, dense.weight.grad.flatten())
    torch.testing.assert_close(layer.codebook.grad[0], sums, rtol=1e-4, atol=1e-3)
    optimizer, losses = torch.optim.Adam(layer.parameters(), lr=0.02), []
    target = torch.randn(8, 9, 150, generator=torch.Generator().manual_seed(3)) / 3
    for _ in range(20):
        optimizer.zero_grad()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_shared_layers_keep_their_tables():
    for per in ("tensor", "row", 64):
        model = nn.Sequential(nn.Embedding(40, 150))
        tt.quantize.kmeans(model, bits=3, per=per, targets=[nn.Embedding])
        layer = CodebookEmbedding.from_dense(model[0])
        assert layer.codebook.shape[0] == {"tensor": 1, "row": 40, 64: 3}[per]
        assert torch.equal(layer(some(7)), model(some(7)))


def test_copies_state_and_dtypes():
    layer, x = CodebookEmbedding.from_dense(dense_layer(padding_idx=2)), some(5)
    other = CodebookEmbedding.from_dense(dense_layer(entries=200, seed=4, padding_idx=2))
    held = other.codebook
    other.load_state_dict(layer.state_dict())
    assert other.codebook is held
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), other):
        assert torch.equal(twin(x), layer(x)) and twin.padding_idx == 2
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        twin = copy.deepcopy(layer).to(dtype)
        assert torch.equal(twin.codebook, layer.codebook) and torch.equal(twin(x), layer(x).to(dtype))
        assert twin.to_dense().weight.dtype == dtype and twin.float()(x).dtype == torch.float32
    state = layer.state_dict()
    state["codes"] = state["codes"][:, :64]
    with pytest.raises(RuntimeError, match=r"codes must be \[rows, 128\]"):
        other.load_state_dict(state)
    assert torch.equal(other(x), layer(x))


def test_compile_and_export():
    layer, x = CodebookEmbedding.from_dense(dense_layer()).eval(), some(3, 5)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))
        program = torch.export.export(layer, (x,), dynamic_shapes=({1: torch.export.Dim.DYNAMIC},))
        assert torch.equal(program.module()(some(3, 8)), layer(some(3, 8)))


def test_files_give_the_same_bits(tmp_path):
    model = nn.Sequential(CodebookEmbedding.from_dense(dense_layer(padding_idx=4)).bfloat16(), nn.ReLU()).eval()
    model[0].codebook.requires_grad_(False)
    tt.save(model, tmp_path / "m.terse")
    dense = nn.Sequential(nn.Embedding(40, 150, padding_idx=4), nn.ReLU()).eval()
    for loaded in (tt.load(tmp_path / "m.terse"), tt.load(tmp_path / "m.terse", model=dense)):
        assert type(loaded[0]) is CodebookEmbedding and loaded[0].padding_idx == 4
        assert torch.equal(loaded(some(9)), model(some(9))) and not loaded[0].codebook.requires_grad
    with pytest.raises(ValueError, match="CodebookEmbedding"):
        tt.load(tmp_path / "m.terse", model=nn.Sequential(nn.Embedding(41, 150, padding_idx=4), nn.ReLU()))


def test_convert_makes_it_by_plan_and_measured():
    model = nn.Sequential(dense_layer(padding_idx=1), nn.Linear(150, 4)).eval()
    for plan in ({"0": "codebook_embedding"}, "codebook"):
        fast = tt.convert(model, some(2, 5), plan=plan)
        assert type(fast[0]) is CodebookEmbedding and fast[0].padding_idx == 1
        assert torch.equal(fast(some(2, 5)), model(some(2, 5)))
        assert tt.report(fast).layers[0].chosen == "codebook_embedding"
    for x in (some(3, 5), some()):
        fast = tt.convert(model, x, cache=False)
        (trial,) = tt.report(fast).layers[0].trials
        assert trial.format == "codebook_embedding" and trial.rounds
    clipped = nn.Sequential(dense_layer(max_norm=1.0))
    kept = tt.convert(clipped, some(5), plan="codebook")
    assert type(kept[0]) is nn.Embedding and "max_norm" in tt.report(kept).layers[0].reason


def test_a_weight_tied_to_a_linear_layer_stays_dense():
    model = nn.Sequential(dense_layer(), nn.Linear(150, 40, bias=False)).eval()
    model[1].weight = model[0].weight
    for options in ({"plan": "codebook"}, {"cache": False}):
        fast = tt.convert(model, some(2, 5), **options)
        assert fast[1].weight is fast[0].weight
        assert all(layer.chosen == "dense" and layer.reason for layer in tt.report(fast).layers)


def test_bad_input_is_refused():
    layer = CodebookEmbedding.from_dense(dense_layer())
    with pytest.raises(TypeError, match="input must be int64 or int32, got"):
        layer(torch.zeros(3))
    with pytest.raises(TypeError, match="input must be a tensor, got int"):
        layer(3)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"indices must lie in \[0, 40\), got 40 at position 0"):
        layer(torch.tensor([40]))
    with pytest.raises(ValueError, match="at most 256 distinct values"):
        CodebookEmbedding.from_dense(nn.Embedding(40, 50))
    with pytest.raises(TypeError, match=r"module must be an nn\.Embedding"):
        CodebookEmbedding.from_dense(nn.Linear(3, 4))
    for options, sentence in (
        ({"max_norm": 2.0}, "max_norm=2.0, which rescales rows"),
        ({"sparse": True}, "sparse=True, and the gradient of a codebook is dense"),
        ({"scale_grad_by_freq": True}, "scale_grad_by_freq=True"),
    ):
        with pytest.raises(ValueError, match=sentence):
            CodebookEmbedding.from_dense(dense_layer(**options))
    weight = CodebookWeight.from_codes(torch.zeros(2, 3, dtype=torch.uint8), torch.zeros(1, 4))
    with pytest.raises(TypeError, match="weight must be a CodebookWeight"):
        CodebookEmbedding(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="padding_idx must be a row of 2, got 2"):
        CodebookEmbedding(weight, padding_idx=2)
    with pytest.raises(TypeError, match="dtype must be a floating-point dtype"):
        CodebookEmbedding(weight, dtype=torch.int8)
