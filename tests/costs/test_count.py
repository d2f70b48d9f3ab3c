import copy

import pytest
import torch
from torch import nn

import tersetorch as tt
from tersetorch.costs import count


def by_name(counted):
    return {layer.name: layer for layer in counted.layers}


@pytest.mark.parametrize(
    ("layer", "shape", "macs"),
    [
        (nn.Linear(5, 3), (5,), 15),
        (nn.Linear(5, 3), (2, 7, 5), 14 * 15),
        (nn.Linear(5, 3), (0, 5), 0),
        (nn.Conv1d(4, 6, 3), (2, 4, 10), 2 * 8 * 6 * 4 * 3),
        (nn.Conv1d(4, 6, 3), (4, 10), 8 * 6 * 4 * 3),
        (nn.Conv2d(4, 6, 3, stride=2, padding=1), (1, 4, 7, 9), 4 * 5 * 6 * 4 * 9),
        (nn.Conv2d(4, 6, (1, 3), dilation=2), (1, 4, 7, 9), 7 * 5 * 6 * 4 * 3),
        (nn.Conv2d(4, 6, 3, groups=2), (3, 4, 5, 5), 3 * 9 * 6 * 2 * 9),
        (nn.Conv2d(4, 8, 3, groups=4), (1, 4, 5, 5), 9 * 8 * 1 * 9),
        (nn.Conv3d(2, 3, 2), (1, 2, 4, 5, 6), 3 * 4 * 5 * 3 * 2 * 8),
        (nn.ConvTranspose2d(4, 6, 3, stride=2), (1, 4, 5, 5), 25 * 6 * 4 * 9),
        (nn.ConvTranspose1d(4, 6, 3, groups=2), (1, 4, 5), 5 * 4 * 3 * 3),
    ],
)
def test_one_layer(layer, shape, macs):
    (found,) = count(layer, torch.randn(shape)).layers
    values = sum(parameter.numel() for parameter in layer.parameters())
    assert (found.name, found.kind, found.calls) == ("", type(layer).__name__, 1)
    assert (found.macs, found.parameters, found.bytes) == (macs, values, 4 * values)
    assert found.effective_macs == macs and found.nonzeros == values and found.effective == 1.0


def multiplied(layer, x):
    """Products that a layer makes, counted by letting it add one for each: weights, inputs and no bias all 1."""
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.weight.fill_(1)
        if twin.bias is not None:
            twin.bias.fill_(0)
        return int(twin.double()(torch.ones(x.shape, dtype=torch.float64)).sum())


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_agrees_with_products_that_are_counted_where_nothing_is_padded(groups):
    layer, x = nn.Conv2d(4, 8, 3, 2, groups=groups), torch.zeros(2, 4, 9, 8)
    assert count(layer, x).macs == multiplied(layer, x)


def test_adds_up_a_model_and_passes_over_zeros():
    model = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    with torch.no_grad():
        model[0].weight[1] = 0
        model[4].weight[:, ::2] = 0
        model[4].bias[0] = 0
    counted = count(model, torch.randn(2, 1, 4, 4))
    layers = by_name(counted)
    assert list(layers) == ["0", "1", "4"]
    assert (layers["0"].macs, layers["0"].effective_macs) == (2 * 4 * 36, 2 * 4 * 27)
    assert (layers["1"].macs, layers["1"].parameters) == (0, 8)
    assert layers["1"].bytes == 4 * 4 * 4 + 8  # weight, bias, running mean and variance, and the count of batches
    assert (layers["4"].macs, layers["4"].effective_macs, layers["4"].nonzeros) == (2 * 48, 2 * 24, 24 + 2)
    assert counted.parameters == 36 + 8 + 51
    assert counted.nonzeros == 27 + 4 + 26  # the normalisation's biases are 0
    assert counted.macs == 288 + 96 and counted.effective_macs == 216 + 48
    assert counted.effective == pytest.approx(264 / 384)
    assert counted.bytes == sum(layer.bytes for layer in counted.layers)


def test_a_layer_that_runs_twice_counts_its_weight_once_and_its_work_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.same = self.layer
            self.unused = nn.Linear(4, 2)

        def forward(self, x):
            return self.same(self.layer(x))

    layers = by_name(count(Twice(), torch.randn(3, 4)))
    assert list(layers) == ["layer", "unused"]
    assert (layers["layer"].calls, layers["layer"].macs, layers["layer"].parameters) == (2, 2 * 3 * 16, 20)
    assert (layers["unused"].calls, layers["unused"].macs, layers["unused"].parameters) == (0, 0, 10)


def test_a_shared_parameter_counts_at_the_first_layer():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    first, second = count(model, torch.randn(1, 4)).layers
    assert (first.parameters, second.parameters) == (20, 4)
    assert (first.bytes, second.bytes) == (80, 16)
    assert first.macs == second.macs == 16


@pytest.mark.parametrize("cls", [tt.nn.SparseLinear, tt.nn.SparseCodebookLinear])
def test_sparse_layers_count_by_what_they_store(cls):
    dense = nn.Linear(40, 30)
    with torch.no_grad():
        dense.weight.copy_((dense.weight * 20).round() * (torch.rand(30, 40) < 0.2))
    stored = int(dense.weight.count_nonzero())
    layer = cls.from_dense(dense)
    (found,) = count(layer, torch.randn(5, 40)).layers
    assert (found.kind, found.parameters, found.nonzeros) == (cls.__name__, 1230, stored + 30)
    assert (found.macs, found.effective_macs) == (5 * 1200, 5 * stored)
    assert found.bytes == layer.sparse_weight.nbytes + 30 * 4


def shared(dense, levels=5):
    with torch.no_grad():
        dense.weight.copy_((dense.weight * 2).round().clamp(-levels // 2, levels // 2))
    return dense


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_layers_of_codes_count_by_the_weight_they_stand_for(device):
    quantised = nn.Sequential(nn.Linear(40, 30))
    tt.quantize.residual(quantised, stages=2, entries=4)
    parts = tt.nn.ProductLinear.from_codes(
        torch.randint(16, (30, 10)).to(torch.uint8), torch.randn(1, 10, 4, 16), torch.randn(30), in_features=40
    )
    for layer, shape, positions in (
        (tt.nn.CodebookLinear.from_dense(shared(nn.Linear(40, 30))), (5, 40), 5),
        (parts, (5, 40), 5),
        (tt.nn.ResidualLinear.from_dense(quantised[0]), (5, 40), 5),
        (tt.nn.CodebookConv2d.from_dense(shared(nn.Conv2d(4, 6, 3, padding=1))), (2, 4, 5, 7), 70),
    ):
        held = sum(tensor.nbytes for tensor in (*layer.parameters(), *layer.buffers()))
        size, kept = layer.weight.numel(), int(layer.weight.count_nonzero())
        kept = size if device == "meta" else kept
        bias = layer.bias.numel()
        (found,) = count(layer.to(device), torch.randn(shape, device=device)).layers
        assert (found.parameters, found.nonzeros) == (size + bias, kept + bias)
        assert (found.macs, found.effective_macs) == (positions * size, positions * kept)
        assert found.bytes == held


def test_an_embedding_of_codes_counts_its_weight_and_no_work():
    layer = tt.nn.CodebookEmbedding.from_dense(shared(nn.Embedding(40, 30)))
    counted = count(layer, torch.zeros(3, dtype=torch.long))
    (found,) = counted.layers
    assert (found.parameters, found.nonzeros) == (1200, int(layer.weight.count_nonzero()))
    assert (found.macs, found.bytes, counted.uncounted) == (0, layer.codebook_weight.nbytes, ())


def test_a_sparse_layer_without_gradients_counts_too():
    dense = nn.Linear(8, 4, bias=False)
    layer = tt.nn.SparseLinear.from_dense(dense)
    values = layer.values.detach()
    del layer.values
    layer.register_buffer("values", values)
    (found,) = count(layer, torch.randn(1, 8)).layers
    assert (found.parameters, found.nonzeros) == (32, 32)


def test_pruning_and_sharing_count_as_the_weight_they_give():
    model = nn.Sequential(nn.Linear(20, 10), nn.ReLU(), nn.Linear(10, 4))
    x = torch.randn(1, 20)
    tt.prune.magnitude(model, sparsity=0.5)
    tt.quantize.kmeans(model, bits=3)
    live = count(model, x)
    assert [layer.name for layer in live.layers] == ["0", "2"]
    assert [layer.kind for layer in live.layers] == ["Linear", "Linear"]
    done = count(tt.finalize(copy.deepcopy(model)), x)
    for ours, plain in zip(live.layers, done.layers, strict=True):
        assert (ours.parameters, ours.nonzeros, ours.effective_macs) == (
            plain.parameters,
            plain.nonzeros,
            plain.effective_macs,
        )
    assert (live.parameters, live.effective_macs) == (254, 120)


def test_says_what_it_does_not_count():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(4, 4))
            self.recurrent = nn.GRU(4, 4, batch_first=True)
            self.attention = nn.MultiheadAttention(4, 1, batch_first=True)
            self.table = nn.Embedding(5, 4)

        def forward(self, words):
            x = self.table(words) @ self.matrix
            return self.attention(*[self.recurrent(x)[0]] * 3)[0]

    counted = count(Own(), torch.zeros(1, 3, dtype=torch.long))
    assert counted.uncounted == ("", "recurrent", "attention")
    assert counted.macs == 0 and counted.effective == 1.0
    assert by_name(counted)["table"].parameters == 20


def test_transformer_layers_run_in_full():
    # Its fast path in evaluation would read the weights without calling the layers.
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    layers = by_name(count(layer, torch.randn(1, 5, 8)))
    assert (layers["linear1"].macs, layers["linear2"].macs) == (5 * 128, 5 * 128)


def test_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).train()
    model[2].eval()
    before = copy.deepcopy(model.state_dict())
    fast = torch.backends.mha.get_fastpath_enabled()
    count(model, torch.randn(3, 4))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        count(model, torch.randn(3, 5))
    assert [module.training for module in model.modules()] == [True, True, True, False]
    assert torch.backends.mha.get_fastpath_enabled() == fast
    assert not any(module._forward_hooks for module in model.modules())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize(
    "inputs", [(torch.ones(2, 3), torch.ones(2, 3)), {"x": torch.ones(2, 3), "y": torch.ones(2, 3)}]
)
def test_takes_arguments_and_keywords(inputs):
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x, y):
            return self.layer(x + y)

    assert count(Sum(), inputs).macs == 18


def test_nothing_is_computed_on_device_meta():
    with torch.device("meta"):
        model = nn.Linear(1 << 20, 1 << 20)
    counted = count(model, torch.empty(1, 1 << 20, device="meta"))
    assert (counted.macs, counted.nonzeros, counted.bytes) == (1 << 40, (1 << 40) + (1 << 20), (1 << 42) + (1 << 22))


@pytest.mark.parametrize(
    ("model", "inputs", "error", "sentence"),
    [
        (3, torch.ones(1), TypeError, "count: model must be a torch.nn.Module, got int"),
        (nn.Linear(1, 1), [torch.ones(1)], TypeError, "example_inputs must be a tensor, a tuple .* got list"),
        (nn.Linear(1, 1), {1: torch.ones(1)}, TypeError, "example_inputs must be a tensor, a tuple .* got dict"),
    ],
)
def test_bad_arguments_are_refused(model, inputs, error, sentence):
    with pytest.raises(error, match=sentence):
        count(model, inputs)


def test_lazy_parameters_are_refused():
    with pytest.raises(ValueError, match="model must know its shapes, got lazy weight; run it once on an input"):
        count(nn.LazyLinear(3), torch.ones(1, 2))


@pytest.mark.parametrize("layout", ["chain", "fused"])
def test_flattened_convolutions_on_meta(layout):
    layer, x = tt.nn.FlattenedConv2d(3, 8, 3, stride=2, stages=2, rank=2).pack(layout), torch.zeros(2, 3, 12, 11)
    here, meta = count(layer, x), count(copy.deepcopy(layer).to("meta"), x.to("meta"))
    assert here.macs == meta.macs > 0 and here.parameters == meta.parameters
