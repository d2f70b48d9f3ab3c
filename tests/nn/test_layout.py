"""What a sparse layer computes from, beside the format that it trains and is stored in."""

import copy
import io
import pickle
import re
from dataclasses import replace

import pytest
import torch
from torch import nn

from tersetorch.formats import BlockedCodebookWeight, BlockedWeight
from tersetorch.nn import SparseCodebookLinear, SparseLinear
from tersetorch.nn.layout import LAYOUTS

PACKED = {SparseLinear: BlockedWeight, SparseCodebookLinear: BlockedCodebookWeight}
# One row for each layout: its options, and those that the layer keeps.
OPTIONS = {
    "csr16": ({}, {}),
    "bitmap": ({}, {}),
    "bitmap_int8": ({}, {}),
    "bitmap_columns": ({}, {}),
    "blocked": ({"column_block": 48}, {"column_block": 48}),
    "blocked_int8": ({"column_block": 48}, {"column_block": 48}),
    "blocked_bfloat16": ({"column_block": 48}, {"column_block": 48}),
}
# How far a layout's product may lie from the dense one, as a share of the largest output.
ERRORS = {"bitmap_int8": 2e-2, "blocked_int8": 2e-2, "blocked_bfloat16": 1e-2}


def assert_near(got, expected, layout):
    assert got.shape == expected.shape and got.dtype == expected.dtype
    if got.numel():
        allowed = ERRORS.get(layout, 1e-5) * float(expected.abs().max())
        assert float((got - expected).abs().max()) <= allowed


def dense_layer(out_features, in_features, bias=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    dense = torch.nn.Linear(in_features, out_features, bias=bias)
    kept = torch.rand(out_features, in_features, generator=g) < 0.2
    shared = torch.randn(15, generator=g)[torch.randint(15, kept.shape, generator=g)]
    with torch.no_grad():
        dense.weight.copy_(torch.where(kept, shared, 0.0))
        if bias:
            dense.bias.copy_(torch.randn(out_features, generator=g))
    return dense.eval()


def inputs(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=[SparseLinear, SparseCodebookLinear])
def kind(request):
    return request.param


@pytest.fixture(params=list(LAYOUTS))
def layout(request):
    return request.param


def count_calls(monkeypatch, layout):
    """How often a layer that computes for the first time, or only once, computed from the layout."""
    calls = []
    row = LAYOUTS[layout]

    def arguments(layer):
        calls.append(layout)
        return row.arguments(layer)

    monkeypatch.setitem(LAYOUTS, layout, replace(row, arguments=arguments))
    return calls


def test_every_layout_has_its_test():
    assert OPTIONS.keys() == LAYOUTS.keys()


@pytest.mark.parametrize("shape", [(100,), (1, 100), (17, 100), (2, 3, 100), (0, 100), (2, 0, 100)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_computes_what_the_dense_layer_computes(kind, layout, shape, bias, mode, monkeypatch):
    dense = dense_layer(300, 100, bias)
    layer = kind.from_dense(dense).pack(layout)
    calls = count_calls(monkeypatch, layout)
    with mode():
        assert_near(layer(inputs(*shape)), dense(inputs(*shape)), layout)
    assert len(calls) == 1


def test_options_say_how_to_pack_another_layer_alike(kind, layout):
    given, kept = OPTIONS[layout]
    layer = kind.from_dense(dense_layer(300, 100)).pack(layout, **given)
    assert (layer.layout, layer.layout_options) == (layout, kept)
    assert f"layout={layout}" in repr(layer)
    again = kind.from_dense(dense_layer(300, 100)).pack(layer.layout, **layer.layout_options)
    x = inputs(9, 100)
    with torch.no_grad():
        assert torch.equal(again(x), layer(x))


def test_the_packed_weight_is_the_weight(kind):
    layer = kind.from_dense(dense_layer(300, 100)).pack("blocked", column_block=64)
    packed = layer.packed_weight
    assert isinstance(packed, PACKED[kind]) and packed.column_block == 64
    packed.validate()
    assert torch.equal(packed.to_dense(), layer.weight)
    assert layer.pack("csr").packed_weight is None
    assert layer.layout == "csr"


def test_is_in_no_state_and_changes_no_parameter(kind, layout):
    plain = kind.from_dense(dense_layer(300, 100))
    packed = copy.deepcopy(plain).pack(layout)
    assert packed.state_dict().keys() == plain.state_dict().keys()
    assert dict(packed.named_parameters()).keys() == dict(plain.named_parameters()).keys()
    assert len(list(packed.buffers())) > len(list(plain.buffers()))
    packed.pack("csr")
    assert len(list(packed.buffers())) == len(list(plain.buffers()))


def test_gradients_come_from_the_rows(kind, layout, monkeypatch):
    layer = kind.from_dense(dense_layer(300, 100)).pack(layout)
    calls = count_calls(monkeypatch, layout)
    x = inputs(5, 100).requires_grad_()
    layer(x).sum().backward()
    assert not calls
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(5, 100), rtol=1e-4, atol=1e-4)


def test_training_drops_it_and_evaluation_builds_it_anew(kind, layout):
    layer = kind.from_dense(dense_layer(300, 100)).pack(layout)
    layer.train()
    assert layer.packed_weight is None and layer.layout == layout
    x = inputs(5, 100)
    with torch.no_grad():
        getattr(layer, layer.parameter_field).mul_(2)
        expected = layer(x)
        layer.eval()
        assert layer.packed_weight is not None
        assert_near(layer(x), expected, layout)


def test_packing_in_training_mode_waits_for_evaluation(kind, layout):
    layer = kind.from_dense(dense_layer(300, 100)).train().pack(layout)
    assert layer.packed_weight is None and layer.layout == layout
    assert layer.eval().packed_weight is not None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_change_in_place_is_noticed(kind, layout, mode):
    layer, x = kind.from_dense(dense_layer(300, 100)).pack(layout), inputs(5, 100)
    field = layer.packed_field
    with mode():
        before = layer(x)
    with torch.no_grad():
        changed = getattr(layer, field)
        changed.copy_(changed.flip(0))
        expected = torch.nn.functional.linear(x, layer.weight, layer.bias)
    with mode():
        assert not torch.allclose(layer(x), before, rtol=0.1)
        assert_near(layer(x), expected, layout)


def test_the_codebook_trains_without_packing_anew():
    layer, x = SparseCodebookLinear.from_dense(dense_layer(300, 100)).pack("blocked"), inputs(5, 100)
    codes = layer.packed_codes
    with torch.no_grad():
        layer.codebook.mul_(2)
        expected = torch.nn.functional.linear(x, layer.weight, layer.bias)
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    assert layer.packed_codes is codes


def test_numbers_held_in_common_are_not_packed_twice():
    dense = dense_layer(300, 100)
    layer = SparseLinear.from_dense(dense).pack("bitmap")
    packed = layer.packed_weight
    assert packed.values is layer.values and packed.row_offsets is layer.row_offsets
    assert [name for name, _ in layer.named_buffers()] == ["row_offsets", "col_indices", "packed_bitmap"]
    shared = SparseCodebookLinear.from_dense(dense).pack("csr16").packed_weight
    assert shared.col_indices.dtype == torch.int16
    assert torch.equal(shared.to_dense(), dense.weight)


def test_a_trained_codebook_is_rounded_anew():
    layer, x = SparseCodebookLinear.from_dense(dense_layer(300, 100)).pack("bitmap_int8"), inputs(5, 100)
    with torch.no_grad():
        layer.codebook.mul_(2)
        assert_near(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias), "bitmap_int8")


def test_what_a_layout_cannot_hold_is_refused_and_changes_nothing():
    wide = SparseLinear.from_dense(torch.nn.Linear(65_537, 2))
    with pytest.raises(ValueError, match="columns must be at most 65536 for 16-bit indices, got 65537"):
        wide.pack("csr16")
    assert wide.layout == "csr"
    with torch.no_grad():
        wide.values[0] = torch.inf
    with pytest.raises(ValueError, match="weight must be finite to be rounded"):
        wide.eval().pack("bitmap_int8")
    assert wide.layout == "csr" and wide.packed_weight is None


def test_loading_a_state_packs_it(kind, layout):
    layer = kind.from_dense(dense_layer(300, 100)).pack(layout)
    other, x = kind.from_dense(dense_layer(300, 100, seed=5)), inputs(5, 100)
    for assign in (False, True):
        layer.load_state_dict(other.state_dict(), assign=assign)
        with torch.no_grad():
            assert_near(layer(x), other(x), layout)
        assert_near(layer.packed_weight.to_dense().float(), other.weight, layout)


def test_a_lent_weight_is_used(kind, layout):
    layer, x = kind.from_dense(dense_layer(300, 100)).pack(layout), inputs(5, 100)
    field = layer.parameter_field
    lent = {field: getattr(layer, field).detach() * 2}
    with torch.no_grad():
        got = torch.func.functional_call(layer, lent, (x,))
        expected = torch.nn.functional.linear(x, 2 * layer.weight, layer.bias)
    assert_near(got, expected, layout)


def test_copies_compute_the_same_bits(kind, layout, monkeypatch):
    layer, x = kind.from_dense(dense_layer(300, 100)).pack(layout), inputs(5, 100)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    copies = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)
    with torch.no_grad():
        expected = layer(x)
        calls = count_calls(monkeypatch, layout)
        for other in copies:
            assert torch.equal(other(x), expected)
            for name, buffer in layer.named_buffers():
                assert dict(other.named_buffers())[name] is not buffer
    assert len(calls) == len(copies)


def test_a_copy_does_not_take_its_own_changes_for_the_originals():
    layer = SparseLinear.from_dense(dense_layer(300, 100)).pack("blocked")
    with torch.no_grad():
        layer.values.mul_(1.0)
        layer.values.mul_(1.0)
        layer(inputs(5, 100))
        other = copy.deepcopy(layer)
        for _ in range(layer.values._version):
            other.values.mul_(2)
        expected = torch.nn.functional.linear(inputs(5, 100), other.weight, other.bias)
        torch.testing.assert_close(other(inputs(5, 100)), expected, rtol=1e-5, atol=1e-5)


def test_bfloat16_and_back(kind, layout):
    layer, x = kind.from_dense(dense_layer(300, 100)).pack(layout), inputs(5, 100)
    with torch.no_grad():
        expected = layer(x)
        y = layer.bfloat16()(x.bfloat16())
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.2)
        assert_near(layer.float()(x), torch.nn.functional.linear(x, layer.weight, layer.bias), layout)


def test_compiles_and_exports(kind, layout, fresh_compiler):
    layer = kind.from_dense(dense_layer(300, 100)).pack(layout)
    batch = {"input": {0: torch.export.Dim("batch")}}
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, dynamic=True)
        for rows in (3, 5):
            assert torch.equal(compiled(inputs(rows, 100)), layer(inputs(rows, 100)))
        exported = torch.export.export(layer, (inputs(3, 100),), dynamic_shapes=batch)
        assert "csr_matmul" not in str(exported.graph) or "packed_col_indices" in str(exported.graph)
        assert torch.equal(exported.module()(inputs(11, 100)), layer(inputs(11, 100)))


def test_parameters_born_in_inference_mode_can_be_packed(layout):
    with torch.inference_mode():
        layer = SparseLinear.from_dense(torch.nn.Linear(20, 30)).eval().pack(layout)
        x = inputs(3, 20)
        assert_near(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias), layout)


def test_a_parametrized_layer_still_runs():
    layer, x = SparseLinear.from_dense(dense_layer(300, 100)), inputs(5, 100)

    class Double(torch.nn.Module):
        def forward(self, bias):
            return 2 * bias

    expected = torch.nn.functional.linear(x, layer.weight, 2 * layer.bias)
    torch.nn.utils.parametrize.register_parametrization(layer, "bias", Double())
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_unknown_layouts_are_refused(kind):
    layer = kind.from_dense(dense_layer(3, 4))
    with pytest.raises(
        ValueError,
        match=re.escape(
            "layout must be one of ['csr', 'csr16', 'bitmap', 'bitmap_int8', 'bitmap_columns', 'blocked', "
        ),
    ):
        layer.pack("diagonal")
    with pytest.raises(TypeError, match="'csr' takes no options, got samples"):
        layer.pack("csr", samples=8)


def test_refused_options_change_nothing(kind):
    layer = kind.from_dense(dense_layer(300, 100)).pack("blocked", column_block=64)
    for options, error, match in (
        ({"column_block": 0}, ValueError, "column_block must be at least 1, got 0"),
        ({"samples": "many"}, TypeError, "samples must be an int, got str"),
        ({"width": 3}, TypeError, "unexpected keyword argument 'width'"),
    ):
        with pytest.raises(error, match=match):
            layer.pack("blocked", **options)
    assert layer.layout_options == {"column_block": 64} and layer.packed_weight.column_block == 64


def other_positions(kind):
    """Two layers of the same shapes and with non-zeros at other places."""
    layers = []
    for seed in (1, 2):
        dense = torch.nn.Linear(64, 8).eval()
        weight = torch.zeros(8, 64)
        for row in weight:
            row[torch.randperm(64, generator=torch.Generator().manual_seed(seed))[:4]] = 0.5
            seed += 10
        dense.weight.data = weight
        layers.append(kind.from_dense(dense))
    return layers


def test_lent_positions_are_used(kind, layout):
    ours, other = other_positions(kind)
    ours.pack(layout)
    x = inputs(5, 64)
    with torch.no_grad():
        assert_near(torch.func.functional_call(ours, other.state_dict(), (x,)), other(x), layout)
        for name, tensor in other.state_dict(keep_vars=True).items():
            setattr(ours, name, tensor)
        assert_near(ours(x), other(x), layout)


def test_positions_are_packed_though_another_layer_could_not_be_loaded(kind, layout):
    ours, other = other_positions(kind)
    network = torch.nn.Sequential(torch.nn.Linear(3, 3), ours.pack(layout)).eval()
    state = {"0.weight": torch.zeros(2, 2), "0.bias": torch.zeros(3)}
    with pytest.raises(RuntimeError, match=r"size mismatch for 0\.weight"):
        network.load_state_dict(state | {f"1.{name}": tensor for name, tensor in other.state_dict().items()})
    with torch.no_grad():
        assert_near(ours(inputs(5, 64)), other(inputs(5, 64)), layout)


def test_another_memory_behind_the_same_parameter_is_noticed(layout):
    ours, _ = other_positions(SparseLinear)
    ours.pack(layout)
    with torch.no_grad():
        ours(inputs(5, 64))
        vector = torch.nn.utils.parameters_to_vector(ours.parameters()) * 3
        torch.nn.utils.vector_to_parameters(vector, ours.parameters())
        assert_near(ours(inputs(5, 64)), torch.nn.functional.linear(inputs(5, 64), ours.weight, ours.bias), layout)


def test_a_state_that_the_layout_cannot_hold_is_an_error_of_the_state():
    ours, _ = other_positions(SparseLinear)
    ours.pack("blocked_int8")
    state = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    state["values"][0] = torch.inf
    with pytest.raises(RuntimeError, match="weight must be finite to be rounded"):
        ours.load_state_dict(state)


def test_a_parametrized_codebook_is_used(layout):
    ours, _ = other_positions(SparseCodebookLinear)

    class Double(torch.nn.Module):
        def forward(self, codebook):
            return 2 * codebook

    ours.pack(layout)
    expected = torch.nn.functional.linear(inputs(5, 64), 2 * ours.weight, ours.bias)
    torch.nn.utils.parametrize.register_parametrization(ours, "codebook", Double())
    with torch.no_grad():
        assert_near(ours.eval()(inputs(5, 64)), expected, layout)


def test_a_toggled_relu_and_a_new_bias_are_noticed(kind, layout):
    layer, x = kind.from_dense(dense_layer(300, 100)).pack(layout), inputs(5, 100)
    with torch.no_grad():
        y = layer(x)
        layer.relu = True
        assert torch.equal(layer(x), y.relu())
        layer.relu = False
        layer.bias = torch.nn.Parameter(layer.bias + 1)
        torch.testing.assert_close(layer(x), y + 1)
        layer.bias = None
        assert_near(layer(x), torch.nn.functional.linear(x, layer.weight), layout)


def test_other_memory_behind_a_codebook_is_noticed(layout):
    layer, x = SparseCodebookLinear.from_dense(dense_layer(300, 100)).pack(layout), inputs(5, 100)
    with torch.no_grad():
        layer(x)
        layer.codebook.data = 3 * layer.codebook.data
        assert_near(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias), layout)


@pytest.mark.parametrize("layout", ["bitmap_int8", "blocked_int8"])
def test_evaluating_a_weight_that_the_layout_cannot_hold_waits_for_the_call(kind, layout):
    layers = [kind.from_dense(dense_layer(300, 100)).pack(layout) for _ in range(3)]
    model, x = torch.nn.Sequential(*layers).train(), inputs(5, 100)
    bad, number = layers[1], getattr(layers[1], layers[1].parameter_field).data.view(-1)
    good = number[-1].clone()
    number[-1] = torch.nan
    model.eval()
    assert not any(module.training for module in model.modules())
    assert layers[2].packed_weight is not None and bad.packed_weight is None
    sentence = f"{kind.__name__}: weight must be one that its layout '{layout}' can hold, got one refused as '.*finite"
    with torch.no_grad():
        for layer in (bad, copy.deepcopy(bad)):
            with pytest.raises(ValueError, match=sentence):
                layer(x)
        number[-1] = good
        assert torch.equal(bad(x), layers[0](x))
    number[-1] = torch.inf
    bad.train().eval().to(torch.float32)
    with torch.no_grad(), pytest.raises(ValueError, match=sentence):
        bad(x)
    assert bad.pack("csr")(x).isfinite().logical_not().any()


def test_values_can_be_parametrized(layout, fresh_compiler):
    layer, x = SparseLinear.from_dense(dense_layer(300, 100)).pack(layout), inputs(5, 100)

    class Double(torch.nn.Module):
        def forward(self, values):
            return 2 * values

    keys = layer.state_dict().keys()
    expected = torch.nn.functional.linear(x, 2 * layer.weight, layer.bias)
    torch.nn.utils.parametrize.register_parametrization(layer, "values", Double())
    for other in (layer, copy.deepcopy(layer)):
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                torch.testing.assert_close(other.eval()(x), expected, rtol=1e-5, atol=1e-5)
    names = set(dict(layer.named_parameters()))
    assert names == {"bias", "parametrizations.values.original"}
    with torch.no_grad():
        lent = {name: 2 * parameter for name, parameter in layer.named_parameters()}
        y = torch.func.functional_call(layer, lent, (x,))
        torch.testing.assert_close(y, 2 * expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), expected, rtol=1e-5, atol=1e-5)
    layer(x).sum().backward()
    assert layer.parametrizations["values"].original.grad is not None
    torch.nn.utils.parametrize.remove_parametrizations(layer, "values")
    assert layer.state_dict().keys() == keys
    with torch.no_grad():
        assert_near(layer.eval()(x), expected, layout)


@pytest.mark.parametrize("layout", ["csr16", "bitmap", "bitmap_columns", "blocked", "blocked_int8", "blocked_bfloat16"])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_a_fused_step_in_evaluation_mode_is_noticed(layout, optimizer):
    """Fused steps change numbers without counting versions."""
    torch.manual_seed(0)
    layer = SparseLinear.from_dense(nn.Linear(40, 30)).eval().pack(layout)
    x = torch.randn(5, 40)
    stepper = optimizer(layer.parameters(), lr=0.1, fused=True)
    with torch.no_grad():
        before = layer(x)
    for _ in range(2):
        layer(x).square().sum().backward()
        stepper.step()
        with torch.no_grad():
            after = layer(x)
        again = copy.deepcopy(layer).pack(layout)
        with torch.no_grad():
            assert torch.equal(after, again(x)) and not torch.equal(after, before)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("layout", ["csr", "csr16", "bitmap", "blocked"])
def test_a_fresh_layer_traces(layout):
    layer = SparseLinear.from_dense(nn.Linear(10, 5)).eval()
    if layout != "csr":
        layer.pack(layout)
    x = torch.randn(3, 10)
    with torch.no_grad():
        assert torch.equal(torch.jit.trace(layer, x)(x), layer(x))
