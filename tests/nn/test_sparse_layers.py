"""SparseLinear and SparseCodebookLinear make the same promises; each test holds both to them."""

import copy
import io
import pickle

import pytest
import torch

from tersetorch.formats import CsrWeight, SparseCodebookWeight
from tersetorch.nn import SparseCodebookLinear, SparseLinear

LAYERS = [SparseLinear, SparseCodebookLinear]


def dense_layer(out_features, in_features, density=0.2, bias=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    dense = torch.nn.Linear(in_features, out_features, bias=bias)
    values = torch.randn(15, generator=g)
    kept = torch.rand(out_features, in_features, generator=g) < density
    shared = values[torch.randint(15, kept.shape, generator=g)]
    with torch.no_grad():
        dense.weight.copy_(torch.where(kept, shared, 0.0))
        if bias:
            dense.bias.copy_(torch.randn(out_features, generator=g))
    return dense


def inputs(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=LAYERS)
def kind(request):
    return request.param


@pytest.mark.parametrize("shape", [(100,), (1, 100), (17, 100), (2, 3, 100), (0, 100), (2, 0, 100)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_computes_what_the_dense_layer_computes(kind, shape, bias, grad):
    dense = dense_layer(37, 100, bias=bias)
    x = inputs(*shape)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(kind.from_dense(dense)(x), dense(x), rtol=1e-5, atol=1e-5)


def test_inference_mode_equals_training_mode_to_the_bit(kind):
    layer = kind.from_dense(dense_layer(37, 100))
    x = inputs(5, 100)
    with torch.inference_mode():
        inferred = layer(x)
    assert torch.equal(inferred, layer(x))


def test_dense_form_and_weight_are_exact(kind):
    dense = dense_layer(37, 100)
    layer = kind.from_dense(dense)
    assert torch.equal(layer.weight, dense.weight) and torch.equal(layer.to_dense().weight, dense.weight)
    assert torch.equal(layer.to_dense().bias, dense.bias)
    assert (layer.in_features, layer.out_features) == (100, 37)


def test_layer_does_not_share_memory_with_its_source(kind):
    dense = dense_layer(37, 100)
    layer = kind.from_dense(dense)
    before = layer(inputs(5, 100))
    with torch.no_grad():
        dense.weight.zero_()
        dense.bias.zero_()
    assert torch.equal(layer(inputs(5, 100)), before)


def test_gradients_equal_those_of_the_dense_layer(kind):
    dense, x = dense_layer(37, 100), inputs(5, 100)
    layer = kind.from_dense(dense)
    dense_x, sparse_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    upstream = inputs(5, 37, seed=2)
    dense(dense_x).backward(upstream)
    layer(sparse_x).backward(upstream)
    torch.testing.assert_close(sparse_x.grad, dense_x.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.bias.grad, dense.bias.grad, rtol=1e-4, atol=1e-5)
    at_stored = dense.weight.grad[layer.sparse_weight.rows, layer.col_indices.long()]
    if kind is SparseLinear:
        torch.testing.assert_close(layer.values.grad, at_stored, rtol=1e-4, atol=1e-4)
    else:
        sums = torch.zeros(layer.codebook.shape[1]).index_add(0, layer.codes.int(), at_stored)
        torch.testing.assert_close(layer.codebook.grad[0], sums, rtol=1e-4, atol=1e-4)


def test_fine_tuning_lowers_the_loss_and_keeps_the_sparsity(kind):
    layer, x = kind.from_dense(dense_layer(10, 20)), inputs(64, 20)
    target = inputs(64, 10, seed=3)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
    pattern, losses = layer.weight == 0, []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    assert torch.equal(layer.weight == 0, pattern)


def test_copies_and_state(kind):
    layer, x = kind.from_dense(dense_layer(37, 100)), inputs(5, 100)
    denser = kind.from_dense(dense_layer(37, 100, density=0.5, seed=5))
    denser.load_state_dict(layer.state_dict())
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    restored = kind.from_dense(dense_layer(37, 100, density=0.0))
    restored.load_state_dict(torch.load(file, weights_only=True))
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), denser, restored):
        assert torch.equal(other(x), layer(x))


def test_loading_keeps_the_parameter_an_optimizer_holds(kind):
    layer = kind.from_dense(dense_layer(37, 100))
    parameter = getattr(layer, layer.parameter_field)
    layer.load_state_dict(kind.from_dense(dense_layer(37, 100, density=0.5)).state_dict())
    assert getattr(layer, layer.parameter_field) is parameter


def test_a_damaged_state_is_refused_and_changes_nothing(kind):
    layer, x = kind.from_dense(dense_layer(37, 100)), inputs(5, 100)
    before = layer(x)
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    state["col_indices"][3] = 1000
    with pytest.raises(RuntimeError, match=r"col_indices must lie in \[0, 100\), got values from 0 to 1000"):
        layer.load_state_dict(state)
    assert torch.equal(layer(x), before)
    with pytest.raises(RuntimeError, match="size mismatch for row_offsets"):
        layer.load_state_dict(kind.from_dense(dense_layer(36, 100)).state_dict())


def test_bfloat16(kind):
    dense = dense_layer(37, 100)
    layer = kind.from_dense(dense).bfloat16()
    if kind is SparseCodebookLinear:
        assert layer.codebook.dtype == torch.float32
        assert torch.equal(layer.codebook, kind.from_dense(dense).codebook)
    else:
        assert layer.values.dtype == torch.bfloat16
    y = layer(inputs(5, 100).bfloat16())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), dense(inputs(5, 100)), rtol=0.05, atol=0.2)


def test_autocast_computes_in_float32_and_casts_the_output(kind):
    layer, x = kind.from_dense(dense_layer(37, 100)), inputs(5, 100)
    for grad in (True, False):
        with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        assert torch.equal(y, layer(x).bfloat16())


def test_compiles_without_a_graph_break(kind, fresh_compiler):
    layer = kind.from_dense(dense_layer(37, 100))
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for batch in (3, 5):
        torch.testing.assert_close(compiled(inputs(batch, 100)), layer(inputs(batch, 100)))


def test_exports_with_a_dynamic_batch(kind):
    layer = kind.from_dense(dense_layer(37, 100))
    batch = {"input": {0: torch.export.Dim("batch")}}
    exported = torch.export.export(layer, (inputs(3, 100),), dynamic_shapes=batch)
    assert torch.equal(exported.module()(inputs(11, 100)), layer(inputs(11, 100)))


def test_tied_parameters_stay_tied(kind):
    first = kind.from_dense(dense_layer(37, 100))
    second = kind(first.sparse_weight, first.bias)
    assert getattr(second, kind.parameter_field) is getattr(first, kind.parameter_field)
    assert second.bias is first.bias


def test_weight_is_read_only(kind):
    layer = kind.from_dense(dense_layer(37, 100))
    with pytest.raises((AttributeError, KeyError)):
        layer.weight = torch.nn.Parameter(torch.zeros(37, 100))


def test_rejects(kind):
    layer = kind.from_dense(dense_layer(37, 100))
    for x in (torch.zeros(3, 99), torch.zeros(())):
        with pytest.raises(ValueError, match=r"input must be \[\.\.\., 100\], got shape"):
            layer(x)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            with pytest.raises(TypeError, match="input must be a tensor, got str"):
                layer("x")
            with pytest.raises(TypeError, match=r"input must be float32 or bfloat16, got torch\.int64"):
                layer(torch.ones(3, 100, dtype=torch.int64))
    for bias in ("bias", torch.zeros(37).double(), torch.zeros(37).int()):
        with pytest.raises(TypeError, match="bias must be float32 or bfloat16, got"):
            kind(layer.sparse_weight, bias)
    with pytest.raises(TypeError, match=r"module must be an nn\.Linear, got Conv2d"):
        kind.from_dense(torch.nn.Conv2d(1, 1, 1))
    with pytest.raises(TypeError, match=f"weight must be a {kind.format.__name__}, got Tensor"):
        kind(torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"bias must be \[37\].*got shape \(36,\)"):
        kind(layer.sparse_weight, torch.zeros(36))
    with pytest.raises(TypeError, match=r"must be float32 or bfloat16, got torch\.float64"):
        kind.from_dense(dense_layer(3, 4).double())


def test_an_unshared_weight_is_refused_by_the_codebook_layer():
    with pytest.raises(ValueError, match="at most 255 distinct non-zero values"):
        SparseCodebookLinear.from_dense(torch.nn.Linear(100, 37))


def test_formats_are_the_layers_own():
    dense = dense_layer(37, 100)
    assert isinstance(SparseLinear.from_dense(dense).sparse_weight, CsrWeight)
    assert isinstance(SparseCodebookLinear.from_dense(dense).sparse_weight, SparseCodebookWeight)


def test_called_by_the_name_that_nn_linear_gives_its_argument(kind):
    layer = kind.from_dense(dense_layer(37, 100))
    assert torch.equal(layer(input=inputs(3, 100)), layer(inputs(3, 100)))


@pytest.mark.parametrize("grad", [True, False])
def test_forward_mode_is_refused_not_zero(kind, grad):
    layer, x = kind.from_dense(dense_layer(37, 100)), inputs(3, 100)
    with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match="must not carry a forward-mode tangent"):
        torch.func.jvp(layer, (x,), (torch.ones_like(x),))


@pytest.mark.parametrize("bias", [True, False])
def test_the_dense_form_of_a_bfloat16_layer_runs(kind, bias):
    layer = kind.from_dense(dense_layer(37, 100, bias=bias).bfloat16())
    dense = layer.to_dense()
    x = inputs(3, 100).bfloat16()
    y = dense(x.to(dense.weight.dtype))
    torch.testing.assert_close(y.float(), layer(x).float(), rtol=0.02, atol=0.05)
    if bias:
        assert dense.weight.dtype == dense.bias.dtype == torch.bfloat16


def test_the_codebook_and_its_gradient_keep_their_dtype():
    layer = SparseCodebookLinear.from_dense(dense_layer(37, 100))
    layer(inputs(3, 100)).sum().backward()
    before = layer.codebook.grad.clone()
    layer.bfloat16()
    assert layer.codebook.dtype == layer.codebook.grad.dtype == torch.float32
    assert torch.equal(layer.codebook.grad, before)
