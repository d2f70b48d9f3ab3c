import copy

import pytest
import torch
from torch import nn

import tersetorch as tt
from tersetorch.costs import COEFFICIENTS, energy


def one(layer, x, **options):
    (found,) = energy(layer, x, **options).layers
    return found


def test_the_figures_of_the_papers():
    # Han et al. (2015), figure 1: relative to an int32 addition.
    add = COEFFICIENTS["add int32"].picojoules
    published = {
        "add float32": 9,
        "register": 10,
        "multiply int32": 31,
        "multiply float32": 37,
        "sram": 50,
        "dram": 6400,
    }
    assert {name: COEFFICIENTS[name].picojoules / add for name in published} == pytest.approx(published)
    assert all(coefficient.source and coefficient.picojoules > 0 for coefficient in COEFFICIENTS.values())
    assert COEFFICIENTS["multiply int16"].inferred and not COEFFICIENTS["multiply float16"].inferred


def test_a_billion_connections_from_memory():
    # Han et al. (2016), section 1: 20 frames a second of 1 billion connections are 12.8 W of DRAM alone.
    layer = nn.Linear(50_000, 20_000, bias=False, device="meta")
    found = one(layer, torch.empty(1, 50_000, device="meta"), cache_bytes=2**30)
    assert 20 * found.picojoules["dram"] * 1e-12 == pytest.approx(12.8, rel=1e-3)


def test_a_dense_layer_by_hand():
    found = one(nn.Linear(5, 3), torch.zeros(2, 5), cache_bytes=0)
    assert found.operations == {"multiply float32": 30, "add float32": 36}
    weight, handed = 32 * (15 + 3), 32 * (10 + 6)
    assert found.bits == {"register": 2 * 32 * 30, "sram": weight + handed, "dram": weight + handed}
    assert found.total == pytest.approx(30 * 3.7 + 36 * 0.9 + 60 + (34) * 5 + 34 * 640)
    assert found.arithmetic == pytest.approx(30 * 3.7 + 36 * 0.9)
    assert found.name == "" and found.kind == "Linear"


@pytest.mark.parametrize(
    ("dtype", "operations"),
    [
        (torch.float16, {"multiply float16": 12, "add float32": 12, "add float16": 3}),
        (torch.bfloat16, {"multiply bfloat16": 12, "add float32": 15}),
        (torch.float64, {"multiply float64": 12, "add float64": 15}),
    ],
)
def test_a_dense_layer_of_another_dtype(dtype, operations):
    found = one(nn.Linear(4, 3, dtype=dtype), torch.zeros(1, 4, dtype=dtype))
    assert found.operations == operations
    assert found.bits["register"] == 2 * 8 * dtype.itemsize * 12


def test_a_convolution_and_a_batch_norm():
    model = nn.Sequential(nn.Conv2d(2, 4, 3, groups=2, bias=False), nn.BatchNorm2d(4), nn.ReLU())
    conv, norm = energy(model, torch.zeros(1, 2, 5, 5)).layers
    macs = 9 * 4 * 9
    assert conv.operations == {"multiply float32": macs, "add float32": macs}
    assert norm.operations == {"multiply float32": 36, "add float32": 36}


@pytest.mark.parametrize(
    ("layer", "multiplies", "adds"),
    [
        (nn.BatchNorm2d(4, track_running_stats=False), 3, 4),
        (nn.InstanceNorm2d(4), 2, 3),
        (nn.InstanceNorm2d(4, track_running_stats=True), 1, 1),
        (nn.LayerNorm(5), 3, 4),
        (nn.LayerNorm(5, bias=False), 3, 3),
        (nn.GroupNorm(2, 4, affine=False), 2, 3),
        (nn.RMSNorm(5), 3, 1),
    ],
)
def test_normalisation_counts_what_its_statistics_take(layer, multiplies, adds):
    x = torch.randn(2, 4, 5, 5)
    found = one(layer, x)
    assert found.operations == {"multiply float32": multiplies * 200, "add float32": adds * 200}
    assert found.bits["register"] == 64 * (multiplies + adds) * 200
    held = sum(t.nbytes for t in (*layer.parameters(), *layer.buffers()) if t.dim())
    assert found.bits["sram"] == 8 * (held + 2 * x.nbytes)


def test_what_is_not_counted_is_named():
    model = nn.Sequential(nn.EmbeddingBag(10, 4), nn.Linear(4, 2))
    assert energy(model, torch.zeros(3, 5, dtype=torch.long)).uncounted == ("0",)


def test_weights_stay_on_the_chip_where_all_of_them_fit():
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    x, weights = torch.zeros(1, 8), 2 * 64 * 4
    at = {room: energy(model, x, cache_bytes=room) for room in (weights - 1, weights, weights + 63, weights + 64)}
    dram = {room - weights: [layer.bits["dram"] // 8 for layer in found.layers] for room, found in at.items()}
    # 32 bytes in and 32 out fit beside the weights at the last; a cache that keeps no weights has room for them.
    assert dram == {-1: [256, 256], 0: [64, 64], 63: [64, 64], 64: [0, 0]}
    assert {found.weight_bytes for found in at.values()} == {weights}


def test_a_weight_that_layers_share_is_held_once():
    model = nn.Sequential(nn.Embedding(10, 6), nn.Linear(6, 10), nn.Linear(10, 10))
    model[1].weight = model[0].weight
    found = energy(model, torch.tensor([1]))
    assert found.weight_bytes == sum(parameter.nbytes for parameter in model.parameters())
    assert found.layers[1].bits["sram"] == 32 * (60 + 10 + 6 + 10)


def test_a_sparse_layer_passes_over_zeros_and_reads_its_format():
    layer = nn.Linear(64, 32)
    with torch.no_grad():
        layer.weight[:, ::2] = 0
    sparse = tt.nn.SparseLinear.from_dense(layer).eval()
    dense, found = one(layer, torch.zeros(1, 64), cache_bytes=0), one(sparse, torch.zeros(1, 64), cache_bytes=0)
    assert dense.operations["multiply float32"] == 2048 and found.operations["multiply float32"] == 1024
    handed = 32 * (64 + 32)
    assert found.bits["dram"] == 8 * sparse.sparse_weight.nbytes + 32 * 32 + handed
    packed = sparse.pack("bitmap")
    assert (
        one(packed, torch.zeros(1, 64), cache_bytes=0).bits["dram"]
        == 8 * packed.packed_weight.nbytes + 32 * 32 + handed
    )


@pytest.mark.parametrize("layout", ["direct", "direct_int8", "direct_bfloat16"])
def test_sparse_convolutions_read_their_layout(layout):
    layer = nn.Conv2d(4, 8, 3)
    with torch.no_grad():
        layer.weight[:, ::2] = 0
    sparse = tt.nn.SparseConv2d.from_dense(layer).pack(layout).eval()
    found = one(sparse, torch.zeros(1, 4, 5, 5), cache_bytes=0)
    kind = layout.removeprefix("direct_") if layout != "direct" else "float32"
    assert found.operations[f"multiply {kind}"] >= 9 * 8 * 2 * 9
    buffers = [tensor for name, tensor in sparse.named_buffers() if name.startswith("packed_")]
    assert found.bits["dram"] == 8 * sum(tensor.nbytes for tensor in buffers) + 32 * (8 + 100 + 72)


@pytest.mark.parametrize("stages", [1, 2])
def test_a_flattened_convolution_is_its_three_or_six(stages):
    """In layout "chain" to the bit; fused only what goes in and comes out is moved."""
    torch.manual_seed(0)
    layer = tt.nn.FlattenedConv2d(6, 16, (3, 5), stride=(2, 1), padding=(1, 2), stages=stages).eval()
    convs = []
    for s in range(stages):
        of = {"groups": 16, "padding": (1, 0), "stride": (1 if s else 2, 1)}
        convs += [nn.Conv2d(16 if s else 6, 16, 1), nn.Conv2d(16, 16, (3, 1), **of)]
        convs.append(nn.Conv2d(16, 16, (1, 5), groups=16, padding=(0, 2)))
    with torch.no_grad():
        for model in (layer, *convs):
            for parameter in model.parameters():
                parameter.flatten()[1:].fill_(1)
                parameter.flatten()[:1].zero_()
    x = torch.randn(2, 6, 9, 8)
    for room in (0, 2**15, 2**30):
        whole, parts = one(layer, x, cache_bytes=room), energy(nn.Sequential(*convs), x, cache_bytes=room).layers
        for name in ("operations", "bits", "picojoules"):
            for key, value in getattr(whole, name).items():
                assert value == pytest.approx(sum(getattr(part, name).get(key, 0) for part in parts))
    counted, of_parts = tt.costs.count(layer, x), tt.costs.count(nn.Sequential(*convs), x)
    for name in ("parameters", "nonzeros", "bytes", "macs", "effective_macs", "uncounted"):
        assert getattr(counted, name) == getattr(of_parts, name)
    fused = one(layer.pack("fused"), x, cache_bytes=0)
    assert fused.operations == whole.operations
    assert fused.bits["sram"] == 8 * (sum(p.nbytes for p in layer.parameters()) + x.nbytes + layer(x).nbytes)


def test_int8_layouts_multiply_bytes():
    table = torch.tensor([-1.0, -0.5, 0.5, 1.0])
    layer = nn.Linear(64, 32, bias=False)
    layer.weight.data = table[torch.randint(4, (32, 64), generator=torch.Generator().manual_seed(0))]
    codes = tt.nn.CodebookLinear.from_dense(layer).pack("codebook_int8").eval()
    found = one(codes, torch.zeros(2, 64))
    assert found.operations == {"multiply int8": 4096, "add int32": 4096, "multiply float32": 64}
    assert found.bits["register"] == 2 * 8 * 4096


def test_products_are_looked_up_where_that_is_less():
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(4, (100, 8), dtype=torch.uint8, generator=generator)
    weight = tt.formats.ProductWeight.from_codes(codes, torch.randn(1, 8, 4, 4, generator=generator), 32)
    found = one(tt.nn.ProductLinear(weight), torch.zeros(1, 32))
    tables, adds = 8 * 4 * 4, 100 * 8
    assert found.operations == {"multiply float32": tables, "add float32": tables + adds}
    few = tt.formats.ProductWeight.from_codes(codes[:2], weight.codebooks, 32)
    assert one(tt.nn.ProductLinear(few), torch.zeros(1, 32)).operations == {"multiply float32": 64, "add float32": 64}


def test_signs_compare_bits_or_add():
    layer = nn.Linear(64, 8)
    with torch.no_grad():
        layer.weight.copy_(layer.weight.sign())
    signs = tt.nn.BinaryLinear.from_dense(layer)
    assert one(signs, torch.randn(1, 64)).operations["compare and count 1 bit"] == 512
    real = tt.nn.BinaryLinear.from_dense(layer, inputs="real")
    assert one(real, torch.randn(1, 64)).operations == {"add float32": 512 + 8}
    assert one(real, torch.randn(1, 64)).total < one(layer, torch.randn(1, 64)).total


def test_an_embedding_reads_rows_only():
    found = one(nn.Embedding(100_000, 16), torch.tensor([[1, 2, 3]]), cache_bytes=0)
    assert found.operations == {} and found.bits == {
        "register": 0,
        "sram": 8 * (192 + 24 + 192),
        "dram": 8 * (192 + 24 + 192),
    }


def test_a_model_adds_up_and_is_left_as_it_was():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.Linear(4, 2)).train()
    before = copy.deepcopy(model.state_dict())
    found = energy(model, (torch.randn(3, 4),))
    assert (
        found.total
        == pytest.approx(sum(found.picojoules.values()))
        == pytest.approx(sum(layer.total for layer in found.layers))
    )
    assert [layer.name for layer in found.layers] == ["0", "2"] and found.inferred == () and found.uncounted == ()
    assert model.training and all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert energy(nn.LSTM(3, 4), torch.randn(5, 2, 3)).uncounted == ("",)


def test_layers_called_twice_fetch_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4, bias=False)

        def forward(self, x):
            return self.inner(self.inner(x))

    once, twice = (
        one(nn.Linear(4, 4, bias=False), torch.zeros(4), cache_bytes=0),
        one(Twice(), torch.zeros(4), cache_bytes=0),
    )
    assert {name: 2 * bits for name, bits in once.bits.items()} == dict(twice.bits)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "sentence"),
    [
        ((3, torch.zeros(1)), {}, TypeError, "energy: model must be a torch.nn.Module, got int"),
        ((nn.Linear(1, 1), 3), {}, TypeError, "energy: example_inputs must be a tensor"),
        ((nn.LazyLinear(1), torch.zeros(1)), {}, ValueError, "energy: model must know its shapes"),
        (
            (nn.Linear(1, 1, dtype=torch.complex64), torch.zeros(1, dtype=torch.complex64)),
            {},
            ValueError,
            "energy: layers must be of int8, float16, bfloat16, float32, float64, got one of complex64",
        ),
        ((nn.Linear(1, 1), torch.zeros(1)), {"cache_bytes": -1}, ValueError, "cache_bytes must be at least 0, got -1"),
        ((nn.Linear(1, 1), torch.zeros(1)), {"cache_bytes": 1.5}, TypeError, "cache_bytes must be an int, got float"),
    ],
)
def test_bad_arguments_get_their_sentence(arguments, options, error, sentence):
    with pytest.raises(error, match=sentence):
        energy(*arguments, **options)


def test_fixed_point_multiplies_whole_numbers():
    x = torch.randn(2, 64)
    for bits, kinds in ((8, ("int8", "int32")), (16, ("int16", "int64"))):
        format = f"<2,{bits - 2}>"
        layer = tt.nn.FixedPointLinear.from_dense(nn.Linear(64, 32), format, format, format)
        (found,) = tt.energy(layer, x).layers
        macs = 2 * 64 * 32
        assert found.operations == {f"multiply {kinds[0]}": macs, f"add {kinds[1]}": macs + 2 * 2 * 32}
        assert found.bits["register"] == 2 * bits * macs
        assert found.bits["sram"] == 8 * (layer.steps.nbytes + layer.bias.nbytes + x.nbytes + 4 * 2 * 32)
