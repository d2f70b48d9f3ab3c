"""The four sparse convolutions make the same promises; each test holds all of them to them."""

import copy
import io
import pickle

import pytest
import torch

import tersetorch as tt
from tersetorch.formats import CsrWeight, SparseCodebookWeight
from tersetorch.nn import SparseCodebookConv1d, SparseCodebookConv2d, SparseConv1d, SparseConv2d

LAYERS = [SparseConv2d, SparseConv1d, SparseCodebookConv2d, SparseCodebookConv1d]


def dense_layer(kind, out=12, channels=8, kernel=3, density=0.3, bias=True, seed=0, **sizes):
    g = torch.Generator().manual_seed(seed)
    dense = kind.dense_type(channels, out, kernel, bias=bias, **sizes)
    values = torch.randn(15, generator=g)
    kept = torch.rand(dense.weight.shape, generator=g) < density
    shared = values[torch.randint(15, kept.shape, generator=g)]
    with torch.no_grad():
        dense.weight.copy_(torch.where(kept, shared, 0.0))
        if bias:
            dense.bias.copy_(torch.randn(out, generator=g))
    return dense


def inputs(kind, batch=2, channels=8, size=11, seed=1):
    shape = (batch, channels, *(size + i for i in range(kind.dims)))
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=LAYERS)
def kind(request):
    return request.param


@pytest.fixture(params=["training", "evaluation"])
def layer(request, kind):
    return kind.from_dense(dense_layer(kind, padding=1)).train(request.param == "training")


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("kernel", [1, 2, 3])
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"bias": False, "padding": "valid"},
        {"padding": 1, "stride": 2},
        {"padding": "same"},
        {"padding": "same", "dilation": 2},
        {"padding": 2, "dilation": 3},
        {"groups": 4, "padding": 1},
        {"padding": 2, "padding_mode": "reflect"},
        {"padding": "same", "padding_mode": "circular"},
        {"padding": 1, "padding_mode": "replicate", "stride": 2},
    ],
)
def test_computes_what_the_dense_layer_computes(kind, kernel, sizes):
    dense, x = dense_layer(kind, kernel=kernel, **sizes), inputs(kind)
    for training in (True, False):
        layer = kind.from_dense(dense).train(training)
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                for images in (x, x[0], x[:0]):
                    torch.testing.assert_close(layer(images), dense(images), rtol=1e-5, atol=1e-5)


def test_sizes_of_both_dimensions():
    sizes = {"stride": (1, 2), "padding": (2, 1), "dilation": (2, 1)}
    dense = torch.nn.Conv2d(4, 6, (3, 5), **sizes)
    layer, x = SparseConv2d.from_dense(dense), torch.randn(2, 4, 12, 15)
    torch.testing.assert_close(layer(x), dense(x), rtol=1e-5, atol=1e-5)
    for name in ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"):
        assert getattr(layer, name) == getattr(dense, name) == getattr(layer.to_dense(), name)


def test_inference_mode_equals_training_mode_to_the_bit(kind, layer):
    x = inputs(kind)
    with torch.inference_mode():
        inferred = layer(x)
    assert torch.equal(inferred, layer(x))


@pytest.mark.parametrize("kind", [SparseConv2d, SparseCodebookConv2d])
def test_keeps_the_memory_format(kind):
    dense = dense_layer(kind, padding=1)
    layer, x = kind.from_dense(dense).eval(), inputs(kind)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            y = layer(x.contiguous(memory_format=torch.channels_last))
            assert layer(x).is_contiguous() and y.is_contiguous(memory_format=torch.channels_last)
            torch.testing.assert_close(y, dense(x), rtol=1e-5, atol=1e-5)
    layer.to(memory_format=torch.channels_last)
    torch.testing.assert_close(layer(x), dense(x), rtol=1e-5, atol=1e-5)


def test_dense_form_and_weight_are_exact(kind):
    dense = dense_layer(kind, groups=2, padding=1, stride=2)
    layer = kind.from_dense(dense)
    assert torch.equal(layer.weight, dense.weight) and torch.equal(layer.to_dense().weight, dense.weight)
    assert torch.equal(layer.to_dense().bias, dense.bias)
    assert torch.equal(layer.to_dense()(inputs(kind)), dense(inputs(kind)))
    assert (layer.in_channels, layer.out_channels) == (8, 12)


def test_layer_does_not_share_memory_with_its_source(kind):
    dense = dense_layer(kind)
    layer = kind.from_dense(dense)
    before = layer(inputs(kind))
    with torch.no_grad():
        dense.weight.zero_()
        dense.bias.zero_()
    assert torch.equal(layer(inputs(kind)), before)


def test_gradients_equal_those_of_the_dense_layer(kind, layer):
    dense, x = dense_layer(kind, padding=1), inputs(kind)
    dense_x, sparse_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    upstream = torch.randn_like(dense(x))
    dense(dense_x).backward(upstream)
    layer(sparse_x).backward(upstream)
    torch.testing.assert_close(sparse_x.grad, dense_x.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.bias.grad, dense.bias.grad, rtol=1e-4, atol=1e-4)
    at_stored = dense.weight.grad.flatten(1)[layer.sparse_weight.rows, layer.col_indices.long()]
    if layer.parameter_field == "values":
        torch.testing.assert_close(layer.values.grad, at_stored, rtol=1e-4, atol=1e-4)
    else:
        sums = torch.zeros(layer.codebook.shape[1]).index_add(0, layer.codes.int(), at_stored)
        torch.testing.assert_close(layer.codebook.grad[0], sums, rtol=1e-4, atol=1e-3)


def test_fine_tuning_lowers_the_loss_keeps_the_sparsity_and_reaches_the_packed_layout(kind, layer):
    x = inputs(kind, batch=8)
    target = torch.randn_like(layer(x))
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    pattern, losses = layer.weight == 0, []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    assert torch.equal(layer.weight == 0, pattern)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), layer.to_dense()(x), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(layer.eval()(x), layer.to_dense()(x), rtol=1e-4, atol=1e-4)


def test_the_packed_layout_is_evaluations_own(kind):
    layer = kind.from_dense(dense_layer(kind))
    state = set(layer.state_dict())
    packed = {"packed_blocks", "packed_segments", "packed_indices", "packed_numbers"}
    assert not packed & {name for name, _ in layer.named_buffers()}
    assert packed <= {name for name, _ in layer.eval().named_buffers()}
    assert set(layer.state_dict()) == state
    assert not packed & {name for name, _ in layer.train().named_buffers()}


def test_copies_and_state(kind, layer):
    x = inputs(kind)
    denser = kind.from_dense(dense_layer(kind, density=0.5, seed=5, padding=1)).eval()
    denser.load_state_dict(layer.state_dict())
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    restored = kind.from_dense(dense_layer(kind, density=0.0, padding=1))
    restored.load_state_dict(torch.load(file, weights_only=True))
    with torch.no_grad():
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), denser, restored):
            assert torch.equal(other(x), layer(x))


def test_a_change_in_place_reaches_a_copy(kind):
    layer, x = kind.from_dense(dense_layer(kind)).eval(), inputs(kind)
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin(x)
        getattr(twin, twin.parameter_field).mul_(2)
        torch.testing.assert_close(twin(x), twin.to_dense()(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(layer(x), layer.to_dense()(x), rtol=1e-5, atol=1e-5)


def test_functional_call_uses_the_lent_tensor(kind):
    layer, x = kind.from_dense(dense_layer(kind)).eval(), inputs(kind)
    name = layer.parameter_field
    with torch.no_grad():
        y = torch.func.functional_call(layer, {name: 2 * getattr(layer, name), "bias": 2 * layer.bias}, (x,))
        torch.testing.assert_close(y, 2 * layer(x), rtol=1e-5, atol=1e-5)


def test_loading_keeps_the_parameter_an_optimizer_holds(kind):
    layer = kind.from_dense(dense_layer(kind))
    parameter = getattr(layer, layer.parameter_field)
    layer.load_state_dict(kind.from_dense(dense_layer(kind, density=0.5)).state_dict())
    assert getattr(layer, layer.parameter_field) is parameter


def test_a_damaged_state_is_refused_and_changes_nothing(kind, layer):
    x = inputs(kind)
    before = layer(x)
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    state["col_indices"][3] = 1000
    with pytest.raises(RuntimeError, match=r"col_indices must lie in \[0, \d+\), got values from \d to 1000"):
        layer.load_state_dict(state)
    assert torch.equal(layer(x), before)
    with pytest.raises(RuntimeError, match="size mismatch for row_offsets"):
        layer.load_state_dict(kind.from_dense(dense_layer(kind, out=11)).state_dict())


def test_bfloat16(kind, layer):
    dense, x = dense_layer(kind, padding=1), inputs(kind)
    before = layer.weight
    layer.bfloat16()
    if layer.parameter_field == "codebook":
        assert layer.codebook.dtype == torch.float32 and torch.equal(layer.weight, before)
    else:
        assert layer.values.dtype == torch.bfloat16
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            y = layer(x.bfloat16())
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), dense(x), rtol=0.05, atol=0.2)
    torch.testing.assert_close(layer.to_dense().float()(x), dense(x), rtol=0.05, atol=0.2)


def test_autocast_computes_in_float32_and_casts_the_output(kind, layer):
    x = inputs(kind)
    for grad in (True, False):
        with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        assert torch.equal(y, layer(x).bfloat16())


@pytest.mark.parametrize("grad", [True, False])
def test_compiles_without_a_graph_break(kind, layer, grad):
    torch.compiler.reset()  # forward is one function to it, however many classes and modes it has
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    with torch.set_grad_enabled(grad):
        for batch in (3, 5):
            x = inputs(kind, batch=batch)
            torch.testing.assert_close(compiled(x), layer(x))


def test_exports_with_a_dynamic_batch(kind, layer):
    batch = {"input": {0: torch.export.Dim("batch")}}
    with torch.no_grad():
        exported = torch.export.export(layer, (inputs(kind, batch=3),), dynamic_shapes=batch)
        assert torch.equal(exported.module()(inputs(kind, batch=7)), layer(inputs(kind, batch=7)))


def test_tied_parameters_stay_tied(kind):
    first = kind.from_dense(dense_layer(kind))
    second = kind(first.sparse_weight, first.bias, kernel_size=3)
    assert getattr(second, kind.parameter_field) is getattr(first, kind.parameter_field)
    assert second.bias is first.bias


def test_weight_is_read_only(kind):
    layer = kind.from_dense(dense_layer(kind))
    with pytest.raises((AttributeError, KeyError)):
        layer.weight = torch.nn.Parameter(torch.zeros(1))


@pytest.mark.parametrize("grad", [True, False])
def test_forward_mode_is_refused_not_zero(kind, layer, grad):
    x = inputs(kind)
    with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match="must not carry a forward-mode tangent"):
        torch.func.jvp(layer, (x,), (torch.ones_like(x),))


def test_counts_as_the_dense_layer_does(kind):
    dense, x = dense_layer(kind, groups=2), inputs(kind)
    layer = kind.from_dense(dense)
    want, got = tt.costs.count(dense, x), tt.costs.count(layer, x)
    assert (got.macs, got.effective_macs, got.parameters) == (want.macs, want.effective_macs, want.parameters)


def test_rejects_inputs(kind, layer):
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            for shape in ((), (8,), (2, 7, *(11,) * kind.dims)):
                with pytest.raises(ValueError, match=r"input must be \[N, 8, .*\] or \[8, .*\], got shape"):
                    layer(torch.zeros(shape))
            with pytest.raises(TypeError, match="input must be a tensor, got str"):
                layer("x")
            with pytest.raises(TypeError, match=r"input must be float32 or bfloat16, got torch\.int64"):
                layer(inputs(kind).long())


def test_rejects_weights_and_sizes(kind):
    layer = kind.from_dense(dense_layer(kind))
    for bias in ("bias", torch.zeros(12).double(), torch.zeros(12).int()):
        with pytest.raises(TypeError, match="bias must be float32 or bfloat16, got"):
            kind(layer.sparse_weight, bias, kernel_size=3)
    with pytest.raises(TypeError, match=rf"module must be an nn\.{kind.dense_type.__name__}, got Linear"):
        kind.from_dense(torch.nn.Linear(3, 4))
    with pytest.raises(TypeError, match=f"weight must be a {kind.format.__name__}, got Tensor"):
        kind(torch.zeros(3, 4), kernel_size=1)
    with pytest.raises(ValueError, match=r"bias must be \[12\].*got shape \(11,\)"):
        kind(layer.sparse_weight, torch.zeros(11), kernel_size=3)
    with pytest.raises(TypeError, match=r"must be float32 or bfloat16, got torch\.float64"):
        kind.from_dense(dense_layer(kind).double())
    for bad, error, match in (
        ({"kernel_size": 5}, ValueError, "weight must have a multiple of"),
        ({"kernel_size": 0}, ValueError, "kernel_size must be at least 1, got 0"),
        ({"kernel_size": (3, 3, 3)}, TypeError, "kernel_size must be an int or"),
        ({"stride": 0}, ValueError, "stride must be at least 1, got 0"),
        ({"stride": 2, "padding": "same"}, ValueError, "padding must be numbers, 'valid', or 'same' for a stride of 1"),
        ({"padding": "full"}, ValueError, "padding must be numbers, 'valid', or 'same'"),
        ({"padding": -1}, ValueError, "padding must be at least 0, got -1"),
        ({"padding_mode": "mirror"}, ValueError, "padding_mode must be one of"),
        ({"groups": 5}, ValueError, "groups must divide out_channels, got 5 for 12"),
        ({"groups": 0}, ValueError, "groups must divide out_channels, got 0"),
    ):
        with pytest.raises(error, match=match):
            kind(layer.sparse_weight, **{"kernel_size": 3} | bad)


@pytest.mark.parametrize("kind", [SparseCodebookConv2d, SparseCodebookConv1d])
def test_an_unshared_weight_is_refused_by_the_codebook_layer(kind):
    with pytest.raises(ValueError, match="at most 255 distinct non-zero values"):
        kind.from_dense(kind.dense_type(64, 64, 3))


def test_formats_are_the_layers_own():
    for kind, format in ((SparseConv2d, CsrWeight), (SparseCodebookConv2d, SparseCodebookWeight)):
        assert isinstance(kind.from_dense(dense_layer(kind)).sparse_weight, format)


def test_called_by_the_name_that_nn_conv_gives_its_argument(kind, layer):
    assert torch.equal(layer(input=inputs(kind)), layer(inputs(kind)))


def test_lent_positions_and_other_memory_are_noticed():
    dense = [torch.nn.Conv2d(2, 4, 3).eval() for _ in range(2)]
    for seed, layer in enumerate(dense):
        weight = torch.zeros(4, 18)
        for row in weight:
            row[torch.randperm(18, generator=torch.Generator().manual_seed(seed))[:5]] = 0.5
            seed += 10
        layer.weight.data = weight.view(4, 2, 3, 3)
    ours, other = map(SparseConv2d.from_dense, dense)
    x = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours(x)
        got = torch.func.functional_call(ours, other.state_dict(), (x,))
        torch.testing.assert_close(got, dense[1](x), rtol=1e-5, atol=1e-5)
        ours.values.data = 3 * ours.values.data
        expected = torch.nn.functional.conv2d(x, 3 * dense[0].weight, dense[0].bias)
        torch.testing.assert_close(ours(x), expected, rtol=1e-5, atol=1e-5)
        copy.copy(ours).train()
        torch.testing.assert_close(ours(x), expected, rtol=1e-5, atol=1e-5)


# ---- rounded layouts


@pytest.fixture(params=["direct_int8", "direct_bfloat16"])
def layout(request):
    return request.param


def test_a_rounded_layout_computes_without_gradients_what_its_mode_computes(kind, layout):
    layer = kind.from_dense(dense_layer(kind, padding=1, stride=2, groups=2)).eval()
    x = inputs(kind)
    with torch.no_grad():
        exact = layer(x)
        assert layer.pack(layout) is layer
        y = layer(x)
        assert layer.layout == layout and f"layout={layout}" in repr(layer)
        assert 0 < (y - exact).abs().max() < 0.02 * exact.abs().max()
        packed = layer.packed_weight
        assert packed.words.dtype == (torch.int8 if layout == "direct_int8" else torch.bfloat16)
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(other(x), y)
        torch.compiler.reset()  # layers compiled before count towards the limit of one forward()
        assert torch.equal(torch.compile(copy.deepcopy(layer), fullgraph=True)(x), y)
        assert torch.equal(torch.export.export(layer, (x,)).module()(x), y)
        layer.relu = True
        assert torch.equal(layer(x), y.relu())
        layer.relu = False
        assert torch.equal(layer.pack("direct")(x), exact)


def test_a_rounded_layout_trains_exactly_and_follows_the_weight(kind, layout):
    layer = kind.from_dense(dense_layer(kind, padding=1)).eval().pack(layout)
    x, state = inputs(kind), set(layer.state_dict())
    exact = layer(x)  # with gradients
    exact.sum().backward()
    torch.testing.assert_close(exact, layer.to_dense()(x), rtol=1e-5, atol=1e-5)
    assert not any("packed" in name for name in state)
    with torch.no_grad():
        before = layer(x)
        getattr(layer, layer.parameter_field).mul_(2)
        layer.bias.mul_(2)
        assert torch.equal(layer(x), 2 * before)
        layer.train()
        assert layer.packed_weight is None and layer.layout == layout
        assert torch.equal(layer.eval()(x), 2 * before)
        assert torch.equal(layer.bfloat16()(x.bfloat16()), layer(x.bfloat16()))


def test_a_rounded_layout_refuses_what_it_cannot_hold(kind):
    dense = dense_layer(kind)
    dense.weight.data.flatten()[dense.weight.flatten().nonzero()[0]] = float("inf")
    layer = kind.from_dense(dense).eval()
    with pytest.raises(ValueError, match="values must be finite in mode 'int8'"):
        layer.pack("direct_int8")
    assert layer.layout == "direct" and layer.packed_weight is not None
    with pytest.raises(TypeError, match="layout 'direct_int8' takes no options, got samples"):
        layer.pack("direct_int8", samples=3)
    with pytest.raises(ValueError, match=r"layout must be one of \['direct', 'direct_int8', 'direct_bfloat16'\]"):
        layer.pack("int8")


def test_a_rounded_layout_comes_back_from_a_file(kind, layout, tmp_path):
    model = torch.nn.Sequential(kind.from_dense(dense_layer(kind, padding=1)).eval().pack(layout))
    tt.save(model, tmp_path / "m.terse")
    loaded = tt.load(tmp_path / "m.terse")
    assert loaded[0].layout == layout
    with torch.no_grad():
        assert torch.equal(loaded(inputs(kind)), model(inputs(kind)))


def test_a_plan_may_name_a_rounded_layout(layout):
    dense = torch.nn.Sequential(dense_layer(SparseConv2d)).eval()
    name = layout.replace("direct", "sparse_conv2d")
    fast = tt.convert(dense, plan={"0": name})
    assert fast[0].layout == layout and tt.report(fast).plan == {"0": name}
    again = tt.convert(dense, plan=tt.report(fast).plan)
    with torch.no_grad():
        assert torch.equal(again(inputs(SparseConv2d)), fast(inputs(SparseConv2d)))
