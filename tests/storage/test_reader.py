"""Whole models: what comes back, into what, and what is refused."""

import contextlib
import copy
import itertools
import json
import os
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune as torch_prune

import tersetorch as tt
from tersetorch.nn import (
    SparseCodebookConv1d,
    SparseCodebookConv2d,
    SparseCodebookLinear,
    SparseConv1d,
    SparseConv2d,
    SparseLinear,
)
from tersetorch.storage import TerseFileError, container, inspect, load, register_module, save


class Custom(nn.Module):
    def __init__(self, hidden=12, stride=1):
        super().__init__()
        self.conv = nn.Conv1d(1, 2, 3, stride=stride, padding=1)
        self.fc1 = nn.Linear(16, hidden)
        self.fc2 = nn.Linear(hidden, 4)
        self.order = [self.fc1, self.fc2]  # plain references, which have to follow a swap
        self.register_buffer("scale", torch.tensor(2.0))
        self.register_buffer("mask", torch.ones(16), persistent=False)

    def forward(self, x):
        x = self.conv(x[:, None])[..., : x.shape[1]].mean(1) * self.scale * self.mask
        for layer in self.order:
            x = layer(x).relu()
        return x


class Registered(nn.Module):
    def __init__(self, sizes, eps=1e-6):
        super().__init__()
        self.sizes = tuple(sizes)
        self.eps = eps
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        self.inner = Inner(sizes[-1])
        self.register_buffer("offsets", torch.arange(sizes[0]) * 0.5, persistent=False)

    def forward(self, x):
        x = x + self.offsets
        for layer in self.layers:
            x = layer(x).relu()
        return self.inner(x) + self.eps


class Attentive(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.lstm = nn.LSTM(8, 3)

    def forward(self, x):
        return self.lstm(self.encoder(x))[0]


class Inner(nn.Module):
    """Not registered: the constructor of Registered makes it."""

    def __init__(self, size):
        super().__init__()
        self.size = size
        self.proj = nn.Linear(size, size)

    def forward(self, x):
        return self.proj(x) / self.size


register_module("tests.Attentive", Attentive, lambda m: {})
register_module("tests.Registered", Registered, lambda m: {"sizes": m.sizes, "eps": m.eps})


def x(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def prune_(layer, density, seed=0, levels=None):
    weight = layer.weight.detach()
    if levels:
        weight = (weight / weight.abs().max() * levels).round() / levels
    kept = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)) < density
    with torch.no_grad():
        layer.weight.copy_(torch.where(kept, weight, 0))
    return layer


def swapped(model):
    """A copy of Custom that runs its linear layers sparse."""
    model = copy.deepcopy(model)
    model.fc1 = SparseLinear.from_dense(prune_(model.fc1, 0.3))
    model.fc2 = SparseCodebookLinear.from_dense(prune_(model.fc2, 0.5, levels=3))
    model.order = [model.fc1, model.fc2]
    return model


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_a_mixed_network(round_trip, small_model):
    loaded = round_trip(small_model, x(5, 24))
    assert [type(layer) for layer in loaded] == [type(layer) for layer in small_model]


def test_convolutions_and_batch_norm(round_trip):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
    model(x(4, 3, 8, 8))  # running statistics that are no round numbers
    prune_(model[0], 0.2)
    round_trip(model, x(2, 3, 8, 8))


def test_channels_last_weights(round_trip):
    model = nn.Sequential(nn.Conv2d(16, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).to(memory_format=torch.channels_last)
    round_trip(model, x(2, 16, 8, 8).to(memory_format=torch.channels_last))


def test_sparse_layers_inside_a_transformer(round_trip):
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    for layer in model.layers:
        layer.linear1 = SparseLinear.from_dense(prune_(layer.linear1, 0.2))
        layer.activation_relu_or_gelu = 0
    model.use_nested_tensor = model.enable_nested_tensor = False
    loaded = round_trip(model, x(2, 3, 8))
    assert loaded.layers[0].activation_relu_or_gelu == 0
    assert loaded.use_nested_tensor is loaded.enable_nested_tensor is False


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes(dtype, round_trip):
    model = nn.Sequential(prune_(nn.Linear(20, 30), 0.1), nn.LayerNorm(30), nn.LSTM(30, 5)).to(dtype)
    round_trip(model, x(3, 20).to(dtype))


def test_a_bfloat16_sparse_layer(round_trip):
    round_trip(SparseLinear.from_dense(prune_(nn.Linear(20, 30), 0.1).bfloat16()), x(3, 20).bfloat16())


def test_tied_embeddings_are_stored_once(round_trip, tmp_path):
    model = nn.ModuleDict({"embed": nn.Embedding(50, 16), "head": nn.Linear(16, 50, bias=False)})
    model["head"].weight = model["embed"].weight
    loaded = round_trip(model)
    assert loaded["head"].weight is loaded["embed"].weight
    assert inspect(tmp_path / "model.terse").file_bytes < 50 * 16 * 4 + 600


def test_tied_sparse_layers_share_their_tensors(round_trip):
    first = SparseLinear.from_dense(prune_(nn.Linear(8, 8), 0.5))
    second = SparseLinear(first.sparse_weight, torch.ones(8))
    loaded = round_trip(nn.Sequential(first, second), x(2, 8))
    assert loaded[0].values is loaded[1].values
    assert loaded[0].bias is not loaded[1].bias


@pytest.mark.parametrize("layer", [SparseLinear, SparseCodebookLinear])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("model", [False, True])
@pytest.mark.parametrize(
    "layout,options",
    [("csr16", {}), ("bitmap", {}), ("bitmap_int8", {}), ("blocked", {"column_block": 16})],
)
def test_a_layout_comes_back(round_trip, layer, training, model, layout, options):
    """Another layout would sum in another order and give other bits."""
    dense = prune_(nn.Linear(70, 300), 0.4, levels=2)
    first = layer.from_dense(dense).pack(layout, **options)
    second = layer(first.sparse_weight, torch.ones(300)).pack("blocked", column_block=8)
    network = nn.ModuleList([first, second]).train(training)
    instance = nn.ModuleList([copy.deepcopy(dense), copy.deepcopy(dense)]) if model else None
    loaded = round_trip(network, model=instance)
    for ours, theirs in zip(network, loaded, strict=True):
        assert (theirs.layout, theirs.layout_options) == (ours.layout, ours.layout_options)
        assert (theirs.packed_weight is None) is training
        with torch.no_grad():
            assert torch.equal(theirs.eval()(x(9, 70)), ours.eval()(x(9, 70)))


@pytest.mark.parametrize("model", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_sparse_convolutions(round_trip, model, training):
    plain = nn.Sequential(
        prune_(nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=2, groups=2), 0.3, levels=2),
        prune_(nn.Conv2d(6, 5, 3, padding="same", padding_mode="reflect", bias=False), 0.3),
        nn.Flatten(2),
        prune_(nn.Conv1d(5, 4, 3, stride=2), 0.4, levels=2),
        prune_(nn.Conv1d(4, 4, 1), 0.4),
    )
    network = nn.Sequential(
        SparseCodebookConv2d.from_dense(plain[0]),
        SparseConv2d.from_dense(plain[1]),
        nn.Flatten(2),
        SparseCodebookConv1d.from_dense(plain[3]),
        SparseConv1d.from_dense(plain[4]),
    ).train(training)
    loaded = round_trip(network, x(2, 4, 11, 9), model=copy.deepcopy(plain) if model else None)
    for ours, theirs in zip(network, loaded, strict=True):
        assert repr(ours) == repr(theirs)
    dense = copy.deepcopy(plain).eval()
    torch.testing.assert_close(loaded.eval()(x(2, 4, 11, 9)), dense(x(2, 4, 11, 9)), rtol=1e-4, atol=1e-5)


def test_tied_convolutions_may_step_differently(round_trip):
    first = SparseConv2d.from_dense(prune_(nn.Conv2d(3, 4, 3), 0.3))
    second = SparseConv2d(first.sparse_weight, first.bias, kernel_size=3, stride=2)
    loaded = round_trip(nn.ModuleList([first, second]))
    assert loaded[0].values is loaded[1].values
    assert (loaded[0].stride, loaded[1].stride) == ((1, 1), (2, 2))


def test_a_layout_out_of_date_is_stored_as_it_will_run(round_trip):
    layer = SparseLinear.from_dense(prune_(nn.Linear(70, 300), 0.4)).eval().pack("blocked")
    with torch.no_grad():
        layer.values.mul_(2)
    round_trip(layer, x(9, 70))
    round_trip(copy.deepcopy(layer), x(9, 70))


def test_shared_modules_stay_shared(round_trip):
    layer, norm = nn.Linear(8, 8), nn.LayerNorm(8)
    loaded = round_trip(nn.Sequential(layer, norm, nn.Sequential(layer), norm), x(2, 8))
    assert loaded[0] is loaded[2][0]
    assert loaded[1] is loaded[3]


def test_flags_of_training_and_gradients(round_trip):
    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(3)))
    model[0].weight.requires_grad_(False)
    model[1][1].eval()
    round_trip(model)
    round_trip(model.eval())


def test_none_in_the_place_of_a_module(round_trip):
    model = nn.Sequential(nn.Linear(2, 2))
    model.register_module("nothing", None)
    assert round_trip(model)._modules["nothing"] is None


def test_the_network_of_a_registered_class(round_trip):
    model = Registered([6, 5, 4], eps=1e-3)
    model.layers[0] = SparseLinear.from_dense(prune_(model.layers[0], 0.4))
    loaded = round_trip(model, x(2, 6))
    assert loaded.sizes == (6, 5, 4)
    assert torch.equal(loaded.offsets, model.offsets)


@pytest.mark.parametrize("instance", [None, Attentive()], ids=["built", "adopted"])
def test_what_a_registered_constructor_makes(instance, round_trip):
    model = Attentive()
    model.encoder.linear2 = SparseLinear.from_dense(prune_(model.encoder.linear2, 0.2))
    model.encoder.activation_relu_or_gelu = 0
    loaded = round_trip(model, x(2, 3, 8), model=instance)
    assert loaded.encoder.activation_relu_or_gelu == 0
    assert loaded.lstm._flat_weights[0] is loaded.lstm.weight_ih_l0


def test_a_weight_of_a_product_with_a_mask(round_trip, tmp_path):
    layer = nn.Linear(300, 200)
    torch_prune.random_unstructured(layer, "weight", amount=0.9)
    torch_prune.remove(layer, "weight")
    assert bool((layer.weight.signbit() & (layer.weight == 0)).any())
    round_trip(layer, x(2, 300))
    size = inspect(tmp_path / "model.terse").file_bytes
    with torch.no_grad():
        layer.weight.copy_(torch.where(layer.weight == 0, 0, layer.weight))
    save(layer, tmp_path / "clean.terse")
    # remove() leaves weight behind bias, which the order of the header shows.
    assert abs(size - inspect(tmp_path / "clean.terse").file_bytes) < 16
    assert size < 0.15 * layer.weight.nbytes


def negative_zeros(*shape):
    return torch.where(torch.rand(shape) < 0.5, -0.0, torch.rand(shape))


@pytest.mark.parametrize(
    "module,kept",
    [
        (nn.Linear(6, 5), False),
        (nn.ConvTranspose1d(3, 4, 2), False),
        (nn.Bilinear(2, 3, 4), False),
        (nn.GRU(4, 3), False),
        (nn.LSTMCell(4, 3), False),
        (nn.MultiheadAttention(4, 2), False),
        (nn.Embedding(6, 5), True),
        (nn.ParameterList([torch.zeros(6, 5)]), True),
        (nn.LayerNorm([6, 5]), True),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_sign_of_zero_is_kept_where_it_may_show(module, kept, round_trip):
    for parameter in module.parameters():
        parameter.data = negative_zeros(*parameter.shape)
    loaded = round_trip(module)
    signs = [bool(((p == 0) & p.signbit()).any()) for p in loaded.parameters() if p.dim() > 1]
    assert signs == [kept] * len(signs)


def test_the_sign_of_zero_is_kept_in_a_weight_that_is_tied_to_an_embedding(round_trip):
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Embedding(6, 4))
    model[0].weight = model[1].weight = nn.Parameter(negative_zeros(6, 4))
    assert bool((round_trip(model)[0].weight.signbit()).any())


def test_another_activation_is_another_model(tmp_path):
    path = tmp_path / "m.terse"
    save(nn.TransformerEncoderLayer(4, 2, 8, activation=F.silu), path)
    assert load(path).activation is F.silu
    with pytest.raises(ValueError, match=r"must have TransformerEncoderLayer\(.*activation='silu'"):
        load(path, model=nn.TransformerEncoderLayer(4, 2, 8, activation=F.gelu))


def test_loading_leaves_the_random_state_alone(tmp_path, small_model):
    path = tmp_path / "m.terse"
    model = nn.Sequential(small_model, Registered([3, 2]))
    before = torch.get_rng_state()
    save(model, path)
    load(path)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_custom_class_needs_an_instance(tmp_path):
    path = tmp_path / "m.terse"
    save(nn.Sequential(nn.ReLU(), Custom()), path)
    with pytest.raises(TerseFileError) as caught:
        load(path)
    assert str(caught.value) == (
        f"load: {path} must consist of modules that tt.load can rebuild by itself, got {Custom.__module__}.Custom at 1 "
        "(its class is not registered); pass model=, an instance of the network's class, or "
        "--network to a command"
    )


def test_an_instance_of_a_custom_class(round_trip):
    fast, instance = swapped(Custom()), Custom()
    before = {name: tensor.clone() for name, tensor in instance.state_dict().items()}
    loaded = round_trip(fast, x(3, 16), model=instance)
    assert loaded.order == [loaded.fc1, loaded.fc2]
    assert all(torch.equal(tensor, before[name]) for name, tensor in instance.state_dict().items())
    assert type(instance.fc1) is nn.Linear
    assert loaded.mask is not instance.mask


def test_an_instance_that_is_one_layer_itself(round_trip):
    layer = SparseLinear.from_dense(prune_(nn.Linear(8, 4), 0.5))
    round_trip(layer, x(2, 8), model=nn.Linear(8, 4))


def test_an_instance_that_was_swapped_already(round_trip):
    round_trip(swapped(Custom()), x(3, 16), model=swapped(Custom()))


def test_an_instance_on_the_meta_device(round_trip):
    with torch.device("meta"):
        instance = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    round_trip(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), x(4, 3), model=instance)


def test_ties_are_those_of_the_file(round_trip):
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    round_trip(tied, x(2, 4), model=nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))


def with_dropout(p):
    encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=p, batch_first=True)
    rnn = nn.LSTM(8, 8, num_layers=2, dropout=p)
    return nn.ModuleDict({"a": nn.Dropout(p), "b": nn.AlphaDropout(p), "encoder": encoder, "rnn": rnn})


@pytest.mark.parametrize("before,after", [(0.5, 0.1), (0.1, 0.5), (0.0, 0.25)])
def test_a_file_has_the_rates_of_dropout_that_pruning_left(before, after, tmp_path):
    save(with_dropout(after), tmp_path / "m.terse")
    instance = with_dropout(before)
    loaded = load(tmp_path / "m.terse", model=instance)
    layer, rnn = loaded["encoder"], loaded["rnn"]
    rates = [loaded["a"].p, loaded["b"].p, layer.dropout.p, layer.dropout1.p, layer.dropout2.p]
    assert [*rates, layer.self_attn.dropout, rnn.dropout] == [after] * 7
    assert instance["a"].p == before and instance["rnn"].dropout == before
    assert str(loaded) == str(with_dropout(after))


def test_a_registered_dropout_keeps_its_own_arguments(tmp_path):
    class Slow(nn.Dropout):
        def __init__(self, rate):
            super().__init__(rate / 2)
            self.rate = rate

    register_module("tests.Slow", Slow, lambda module: {"rate": module.rate})
    save(nn.Sequential(Slow(0.25)), tmp_path / "m.terse")
    assert load(tmp_path / "m.terse", model=nn.Sequential(Slow(0.25)))[0].p == 0.125
    with pytest.raises(ValueError, match="load: model must have"):
        load(tmp_path / "m.terse", model=nn.Sequential(Slow(0.5)))


@pytest.mark.parametrize("rate", [1.5, -0.1, float("nan"), True, "0.5", None, [0.5]])
@pytest.mark.parametrize(
    "make,name",
    [
        (lambda: nn.Dropout(0.25), "p"),
        (lambda: nn.MultiheadAttention(4, 2, dropout=0.25), "dropout"),
        (lambda: nn.TransformerEncoderLayer(4, 2, 4, dropout=0.25), "dropout"),
    ],
)
def test_a_rate_of_dropout_must_be_one(make, name, rate, tmp_path):
    path = tmp_path / "m.terse"
    save(nn.Sequential(make()), path)
    header, data, _, _ = container.unpack(path.read_bytes())
    header["m"]["m"]["0"]["c"][name] = rate
    lengths = [stream[1] for entry in header["t"] for stream in entry["x"]]
    path.write_bytes(container.pack(header, container.split(data, lengths)))
    for model in (None, nn.Sequential(make())):
        with pytest.raises(TerseFileError, match=rf"must have a number in \[0, 1\] as {name} of a \w+, got"):
            load(path, model=model)


class WithDropout(nn.Module):
    """A network of one's own, which loads only into an instance."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=True)
        self.encoder, self.drop, self.out = nn.TransformerEncoder(layer, 2), nn.Dropout(0.5), nn.Linear(8, 2)

    def forward(self, x):
        return self.out(self.drop(self.encoder(x)))


def test_a_network_of_ones_own_trains_on_with_the_rates_that_pruning_left(tmp_path):
    pruned = WithDropout()
    tt.prune.rescale_dropout(tt.finalize(tt.prune.magnitude(pruned, 0.8)))
    rates = [module.p for module in pruned.modules() if isinstance(module, nn.Dropout)]
    assert len(set(rates)) > 1 and pruned.drop.p < 0.5
    save(pruned, tmp_path / "m.terse")
    instance = WithDropout()
    loaded = load(tmp_path / "m.terse", model=instance).train()
    assert [module.p for module in loaded.modules() if isinstance(module, nn.Dropout)] == rates
    assert instance.drop.p == 0.5
    x = torch.randn(3, 5, 8)
    outputs = []
    for model in (pruned.train(), loaded):
        torch.manual_seed(1)
        outputs.append(model(x))
    assert outputs[0].equal(outputs[1])
    outputs[1].sum().backward()
    assert loaded.out.weight.grad is not None
    instance.drop = nn.Dropout1d(0.5)
    with pytest.raises(ValueError, match="must have Dropout"):
        load(tmp_path / "m.terse", model=instance)


def drop_fc2(model):
    del model.fc2


def add_layer(model):
    model.more = nn.Linear(1, 1)


def add_buffer(model):
    model.register_buffer("more", torch.zeros(1))


@pytest.mark.parametrize(
    "instance,change,match",
    [
        (Custom(hidden=13), None, r"a layer with a weight of shape \[12, 16\] at fc1, got Linear"),
        (Custom(stride=2), None, r"Conv1d\(in_channels=1, out_channels=2, kernel_size=\[3\], stride=\[1\], .* at conv"),
        (Custom(), drop_fc2, r"children \['conv', 'fc1', 'fc2'\] at its root, got \['conv', 'fc1'\]"),
        (Custom(), add_layer, r"children .* got \['conv', 'fc1', 'fc2', 'more'\]"),
        (Custom(), add_buffer, r"tensors \['scale'\] at its root, got \['more', 'scale'\]"),
        (Custom().double(), None, r"torch.float32 for scale at its root, got torch.float64"),
        (nn.Linear(2, 2), None, r"children .* at its root, got \[\]"),
        (Custom(), lambda m: setattr(m, "fc1", nn.Linear(16, 12, bias=False)), "a layer with a bias at fc1"),
        (Custom(), lambda m: setattr(m, "fc2", None), "a module at fc2, got NoneType"),
        (Custom(), lambda m: setattr(m, "fc2", m.fc1), "a module of its own at fc2"),
    ],
)
def test_an_instance_that_does_not_fit_is_refused(tmp_path, instance, change, match):
    path = tmp_path / "m.terse"
    save(swapped(Custom()), path)
    instance = copy.deepcopy(instance)
    if change:
        change(instance)
    before = {name: tensor.clone() for name, tensor in instance.state_dict().items()}
    with pytest.raises(ValueError, match=match) as caught:
        load(path, model=instance)
    assert str(caught.value).startswith("load: model must have ")
    assert all(torch.equal(tensor, before[name]) for name, tensor in instance.state_dict().items())


def test_an_instance_that_cannot_be_copied_is_refused(tmp_path):
    path = tmp_path / "m.terse"
    save(nn.Sequential(), path)
    model = nn.Sequential()
    model.lock = (value for value in ())
    with pytest.raises(ValueError, match=r"load: model must be copyable with copy\.deepcopy, got TypeError"):
        load(path, model=model)


@pytest.mark.parametrize(
    "arguments,error,match",
    [
        ({"model": nn.Linear}, TypeError, r"model must be an nn\.Module, got type"),
        ({"max_bytes": 1.5}, TypeError, "max_bytes must be an integer, got float"),
        ({"max_bytes": True}, TypeError, "max_bytes must be an integer, got bool"),
        ({"max_bytes": 0}, ValueError, "max_bytes must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_refused(tmp_path, arguments, error, match):
    with pytest.raises(error, match=match):
        load(tmp_path / "m.terse", **arguments)


def test_paths(tmp_path):
    with pytest.raises(TypeError, match="load: path must be a string or a path, got int"):
        load(3)
    with pytest.raises(TerseFileError, match="must be a terse file, got a folder"):
        load(tmp_path)
    (tmp_path / "file").write_bytes(b"")
    for read in (load, inspect):
        for name, error in (("none", FileNotFoundError), ("file/x", NotADirectoryError), ("x" * 300, OSError)):
            rule = rf"{read.__name__}: path must name a file that can be read, got '.*/{name}' \(.*\); check the name"
            with pytest.raises(error, match=rule):
                read(tmp_path / name)
        with pytest.raises(ValueError, match=f"{read.__name__}: path must name a file, got ''"):
            read("")
        with pytest.raises(
            ValueError, match=rf"{read.__name__}: path must be a name that a file can have, got 'a\\x00b"
        ):
            read("a\0b")


def test_what_is_no_regular_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "m.terse")
    for read in (load, inspect):
        with pytest.raises(TerseFileError, match="must be a terse file, got a device or pipe"):
            read(tmp_path / "m.terse")


@pytest.mark.parametrize("start", [b"", b"\2" + bytes(7) + b"{}", None], ids=["zeros", "head", "terse"])
def test_a_large_file_is_not_read_before_its_start_is_checked(tmp_path, start):
    path = tmp_path / "m.terse"
    save(nn.ReLU(), path)
    if start is not None:
        path.write_bytes(start)
    os.truncate(path, 1 << 30)  # a hole: it takes no disk
    tracemalloc.start()
    try:
        for read in (load, inspect):
            with pytest.raises(TerseFileError, match=r"m\.terse must "):
                read(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_what_decodes_to_too_much_is_refused_before_anything_is_allocated(tmp_path):
    path = tmp_path / "m.terse"
    model = nn.Linear(5000, 4000, bias=False)
    with torch.no_grad():
        model.weight.zero_()
    save(model, path)
    assert path.stat().st_size < 400
    with pytest.raises(TerseFileError, match=r"decode to at most 67108864 bytes, got 80000000; pass max_bytes="):
        load(path)
    assert torch.equal(load(path, max_bytes=80_000_000).weight, model.weight)
    with pytest.raises(TerseFileError, match="decode to at most 79999999 bytes, got 80000000"):
        load(path, max_bytes=79_999_999)


def refused(path, damaged, *readers):
    path.write_bytes(damaged)
    for read in readers:
        with pytest.raises(TerseFileError, match=r"m\.terse must "):
            read(path)


def test_every_byte_and_every_length_of_a_file_counts(tmp_path):
    path = tmp_path / "m.terse"
    layer = SparseLinear.from_dense(prune_(nn.Linear(9, 8), 0.3))
    save(nn.Sequential(layer, nn.Tanh()), path)
    raw = path.read_bytes()
    assert len(raw) < 600
    load(path)
    for position in range(len(raw)):
        refused(path, raw[:position] + bytes([raw[position] ^ 1 << position % 8]) + raw[position + 1 :], load)
        refused(path, raw[:position], load)
    for tail in (b"\0", b"{}", raw):
        refused(path, raw + tail, load, inspect)


@pytest.mark.slow
def test_every_bit_of_a_file_counts(tmp_path, small_model):
    path = tmp_path / "m.terse"
    save(small_model, path)
    raw = path.read_bytes()
    for position in range(len(raw)):
        for bit in range(8):
            flipped = raw[:position] + bytes([raw[position] ^ 1 << bit]) + raw[position + 1 :]
            refused(path, flipped, load, inspect)
        refused(path, raw[:position], inspect)
        refused(path, raw[:position] + raw[position + 1 :], load)
        refused(path, raw[:position] + b"\0" + raw[position:], load)


def reachable(value, path=()):
    """Every path into a JSON value."""
    yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from reachable(value[key], (*path, key))


def changed(value, path, change):
    if not path:
        return change(value)
    copied = copy.copy(value)
    copied[path[0]] = changed(value[path[0]], path[1:], change)
    return copied


NUMBERS = [-1, 0, 1, 2, 7, 16, 1 << 20, 1 << 47, 1 << 70, 1.5]
WORDS = [
    "",
    "raw",
    "numbers",
    "planes",
    "contexts",
    "rans",
    "gaps-rans",
    "sparse",
    "huffman",
    "Linear",
    "a.b",
    "tersetorch.SparseLinear",
    "f32",
    "f64",
]
NODES = [{"k": "Linear"}, {"k": "LSTM", "c": {"num_layers": 1 << 40}}]
ODD = st.sampled_from([None, True, False, [], {}, [0], *NUMBERS, *WORDS, *NODES])


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_header_that_says_something_else_is_refused_or_harmless(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("odd") / "m.terse"
    header, streams = _parts(tmp_path_factory)
    for _ in range(data.draw(st.integers(1, 3))):
        where = data.draw(st.sampled_from(list(reachable(header))))
        action = data.draw(st.sampled_from(["replace", "drop", "add", "nudge"]))
        odd = data.draw(ODD)

        def change(value, action=action, odd=odd):
            if action == "add" and isinstance(value, dict):
                return value | {data.draw(st.sampled_from("kcatmeosdfnvx01")): odd}
            if action == "drop" and isinstance(value, dict | list) and value:
                return type(value)(list(value.items())[1:]) if isinstance(value, dict) else value[1:]
            if action == "nudge" and type(value) is int:
                return value + data.draw(st.sampled_from([-1, 1, 8]))
            return odd

        header = changed(header, where, change)
    path.write_bytes(container.pack(header, streams))
    for read in (load, inspect):
        with contextlib.suppress(TerseFileError):
            read(path)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_streams_that_hold_something_else_are_refused_or_harmless(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("odd") / "m.terse"
    header, streams = _parts(tmp_path_factory)
    number = data.draw(st.integers(0, len(streams) - 1))
    size = len(streams[number])
    streams[number] = data.draw(st.binary(min_size=size, max_size=size))
    path.write_bytes(container.pack(header, streams))
    with contextlib.suppress(TerseFileError):
        load(path)


def _parts(tmp_path_factory):
    """Header and streams of a file with every form and a few kinds of module."""
    path = tmp_path_factory.getbasetemp() / "parts.terse"
    if not path.exists():
        torch.manual_seed(0)
        shared = nn.ReLU()
        model = nn.Sequential(
            SparseLinear.from_dense(prune_(nn.Linear(9, 8), 0.3)),
            shared,
            SparseCodebookLinear.from_dense(prune_(nn.Linear(8, 40), 0.5, levels=2)),
            nn.Sequential(shared, prune_(nn.Linear(40, 40), 0.1), prune_(nn.Linear(40, 40), 0.1, levels=2)),
            nn.LSTM(40, 3),
            prune_(nn.Linear(40, 20), 1.0, levels=2),
            SparseCodebookConv2d.from_dense(prune_(nn.Conv2d(6, 9, 3), 0.3, levels=20)),
            prune_(nn.Linear(120, 80), 0.3, levels=20),
        )
        with torch.no_grad():
            model[3][1].weight *= torch.where(x(40, 40) > 0, 1, -1)
        save(model, path)
    header, data, _, _ = container.unpack(path.read_bytes())
    lengths = [stream[1] for entry in header["t"] for stream in entry["x"]]
    return json.loads(json.dumps(header)), container.split(data, lengths)


@pytest.mark.parametrize(
    "change,match",
    [
        (lambda h: h | {"x": 1}, "have only known fields in the header, got x"),
        (lambda h: h["m"]["m"]["1"].update(k="Nothing"), "consist of kinds that are registered, got Nothing"),
        (lambda h: h["m"]["m"]["1"].update(a={"inplace": True}), "set only known attributes of a ReLU, got inplace"),
        (
            lambda h: h["m"]["m"]["3"]["m"].update({"2": {"a": {"x": 1}}}),
            "only known fields in a module without a kind",
        ),
        (lambda h: h["m"]["m"]["0"].update(m={}), r"only known fields in a tersetorch\.SparseLinear, got m"),
        (lambda h: h["m"]["m"]["1"].update(c={"wrong": 1}), "hold arguments that ReLU takes, got TypeError"),
        (lambda h: h["m"]["m"]["4"].update(t={}), "hold arguments that LSTM takes|tensors"),
        (lambda h: h["m"]["m"]["4"]["c"].update(num_layers=1 << 40), "hold the tensors of LSTM"),
        (lambda h: h["m"]["m"].update({"train": {"k": "ReLU"}}), "name children as nn.Module allows, got 'train'"),
        (lambda h: h["m"]["m"].update({"9": 99}), "have an integer in .* as the number of a module, got 99"),
        (lambda h: h["m"]["m"].update({"9": 0}), "share modules that are complete, got module 0 inside itself at 9"),
        (lambda h: h["m"]["m"]["3"]["m"].update({"9": 4}), r"share modules that are complete, .* at 3\.9"),
        (lambda h: h["m"]["m"].update({"9": {}}), "name the kind of every module that no constructor makes, got 9"),
        (lambda h: h["t"].append(h["t"][1] | {"s": [0], "x": [["raw", 0]]}), "exactly the streams of its header"),
        (lambda h: h["m"]["m"]["5"]["t"].update(weight=0), "use sparse weights in sparse layers, and only there"),
        (lambda h: h["m"]["m"]["0"]["t"].update(bias=3), r"have a bias of 8 numbers in a tersetorch\.SparseLinear"),
        (
            lambda h: h["m"]["m"]["0"].update(c={"layout": "round"}),
            "hold the weight and the settings of a tersetorch.SparseLinear, got .*'round'",
        ),
        (
            lambda h: h["m"]["m"]["0"].update(k="tersetorch.SparseConv2d", c={"kernel_size": [2, 2]}),
            "hold the weight and the settings of a tersetorch.SparseConv2d, got .*multiple of 4 columns",
        ),
        (
            lambda h: h["m"]["m"]["0"].update(k="tersetorch.SparseConv2d", c={"kernel_size": [1, 1], "stride": "1"}),
            "hold the weight and the settings of a tersetorch.SparseConv2d, got .*stride must be",
        ),
        (lambda h: h["m"]["m"]["0"].update(k="tersetorch.SparseConv1d"), "got .*missing 1 required keyword-only"),
        (lambda h: h["m"]["m"]["0"].update(c={"layout": 3}), "name a layout and whole numbers for its options"),
        (lambda h: h["m"]["m"]["0"].update(c={"layout": "blocked", "column_block": 0}), "at least 1, got 0"),
        (lambda h: h["m"]["m"]["0"].update(c={"layout": "blocked", "column_block": True}), "whole numbers"),
        (lambda h: h["m"]["m"]["0"].update(c={"layout": "blocked", "depth": 3}), "unexpected keyword argument"),
        (lambda h: h["m"]["m"]["5"]["c"].update(out_features=21), r"shape \[20, 40\] for weight at 5"),
    ],
)
def test_headers_that_contradict_themselves_are_refused(change, match, tmp_path, tmp_path_factory):
    header, streams = _parts(tmp_path_factory)
    header = change(header) or header
    path = tmp_path / "m.terse"
    path.write_bytes(container.pack(header, streams))
    with pytest.raises(TerseFileError, match=match):
        load(path)


def test_a_tensor_that_no_module_uses_is_refused(tmp_path, tmp_path_factory):
    header, streams = _parts(tmp_path_factory)
    header["t"].append({"s": [1], "d": "f32", "f": "raw", "x": [["raw", 4]]})
    path = tmp_path / "m.terse"
    path.write_bytes(container.pack(header, [*streams, b"1234"]))
    with pytest.raises(TerseFileError, match="store the tensors of its modules only, got 1 more"):
        load(path)
    with pytest.raises(TerseFileError, match=r"inspect: .* must use every tensor it stores"):
        inspect(path)


@pytest.mark.parametrize("depth", [3_000, 100_000])
def test_modules_nested_beyond_reason_are_refused(tmp_path, depth):
    text = ('{"t":[],"m":' + '{"k":"Sequential","m":{"0":' * depth + "null" + "}}" * depth + "}").encode()
    deflated = zlib.compress(text, 0)[2:-4]
    packed = struct.pack("<I", zlib.crc32(deflated)) + deflated
    path = tmp_path / "m.terse"
    path.write_bytes(container._head(0, len(packed)) + packed)
    for read in (load, inspect):
        with pytest.raises(TerseFileError, match=r"must nest less deeply|must hold JSON"):
            read(path)


def test_numbers_come_back_exactly(tmp_path):
    path = tmp_path / "m.terse"
    layer = nn.Linear(3, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[np.pi, -1e-42, np.inf]]))
    save(layer, path)
    assert load(path).weight.view(torch.int32).tolist() == layer.weight.view(torch.int32).tolist()
