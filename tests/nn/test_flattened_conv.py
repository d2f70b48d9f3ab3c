"""FlattenedConv2d: its formula, both layouts, its dense form, training, copies and state."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call

from tersetorch.nn import FlattenedConv2d, flattened_conv

SIZES = [
    ((5, 8, 3), {"padding": "same"}),
    ((6, 20, (3, 5)), {"padding": "full", "stages": 2}),
    ((4, 7, (3, 2)), {"stride": (2, 1), "padding": (1, 0), "rank": 3}),
    ((3, 16, 5), {"stride": 2, "padding": 2, "stages": 2, "rank": 2, "bias": False}),
]


def seeded(sizes, **options):
    torch.manual_seed(0)
    layer = FlattenedConv2d(*sizes, **options)
    for parameter in layer.parameters():  # inner biases begin at 0
        parameter.data += 0.1 * torch.randn_like(parameter)
    return layer


def images(layer, size=11, batch=2):
    return torch.randn(batch, layer.in_channels, size, size + 2, generator=torch.Generator().manual_seed(1))


def rank_one(channels=6, out=9, kernel=(3, 5), bias=True, **options):
    torch.manual_seed(3)
    dense = nn.Conv2d(channels, out, kernel, bias=bias, **options)
    factors = torch.randn(out, channels), torch.randn(out, kernel[0]), torch.randn(out, kernel[1])
    dense.weight.data = torch.einsum("fc,fi,fj->fcij", *factors)
    return dense


@pytest.mark.parametrize("sizes,options", SIZES)
def test_layouts_compute_the_same(sizes, options):
    layer = seeded(sizes, **options)
    x = images(layer)
    want = layer(x)
    layer.pack("fused").eval()
    with torch.no_grad():
        for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 2e-2)):
            for memory_format in (torch.contiguous_format, torch.channels_last):
                got = layer(x.to(dtype).contiguous(memory_format=memory_format))
                assert got.dtype == dtype and got.is_contiguous(memory_format=memory_format)
                assert (got.float() - want).abs().max() <= tolerance * want.abs().max()
        assert torch.equal(layer(x[0]), layer(x)[0])
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == layer.pack("chain")(x).dtype == torch.bfloat16
    assert layer.get_parameter("lateral_0").requires_grad and layer(x).requires_grad


@pytest.mark.parametrize("sizes,options", SIZES[1:3])
def test_relu(sizes, options):
    layer = seeded(sizes, **options)
    fused = copy.deepcopy(layer).pack("fused").eval()
    x = images(layer)
    x[0, 0, 0, 0] = torch.nan
    want = layer(x).relu()
    with torch.no_grad():
        inferred = fused(x).relu()
        layer.relu = fused.relu = True
        assert torch.equal(fused(x).nan_to_num(-1), inferred.nan_to_num(-1)) and (inferred == 0).any()
        assert torch.equal(torch.compile(fused, fullgraph=True, backend="aot_eager")(x[1:]), inferred[1:])
    got = layer(x)
    assert torch.equal(got.nan_to_num(-1), want.nan_to_num(-1)) and got.isnan().any()
    grads = [torch.autograd.grad(y[1].square().sum(), layer.lateral_0)[0] for y in (got, want)]
    assert torch.equal(*(grad.nan_to_num(-1) for grad in grads))
    assert "relu=True" in repr(layer) and FlattenedConv2d.of_sizes(**fused.sizes).relu


def test_the_papers_identity():
    """A filter that is a product of three equals lateral, vertical, horizontal in sequence, biases 0 but the last."""
    dense = rank_one(padding=(1, 2))
    layer = FlattenedConv2d.from_dense(dense)
    x = images(layer)
    torch.testing.assert_close(layer(x), dense(x), rtol=1e-4, atol=1e-4)
    assert not layer.lateral_bias_0.any() and not layer.vertical_bias_0.any() and torch.equal(layer.bias_0, dense.bias)
    torch.testing.assert_close(layer.weight, dense.weight.detach(), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(layer.eval().pack("fused")(x), dense(x), rtol=1e-4, atol=1e-4)
    assert sum(p.numel() for p in layer.parameters()) == 9 * (6 + 3 + 5) + 3 * 9


@pytest.mark.parametrize(
    "options",
    [{}, {"stages": 3}, {"rank": 2, "stride": 2, "stages": 2}, {"padding": "full", "stages": 2, "bias": False}],
)
def test_to_dense_is_what_the_stages_compose_to(options):
    layer = seeded((4, 6, (3, 2)), **options)
    x = images(layer, 14)
    torch.testing.assert_close(layer.to_dense()(x), layer(x), rtol=1e-3, atol=1e-4)


def test_to_dense_refuses_what_borders_make_another():
    for layer, reason in (
        (seeded((4, 6, 3), padding="same"), "padding beside biases inside"),
        (seeded((4, 6, 3), padding="same", stages=2, bias=False), r"padding \(1, 1\) between stages"),
    ):
        with pytest.raises(ValueError, match=reason):
            layer.to_dense()
    assert layer.weight.shape == (6, 4, 5, 5)


def test_begins_with_the_variance_of_a_convolution():
    torch.manual_seed(0)
    x = torch.randn(8, 64, 16, 16)
    dense = nn.Conv2d(64, 64, 5)(x).std()
    for options in ({}, {"stages": 2}, {"rank": 4}):
        assert 0.5 < FlattenedConv2d(64, 64, 5, **options)(x).std() / dense < 2


def test_trains():
    torch.manual_seed(0)
    layer = FlattenedConv2d(3, 8, 3, padding="same", stages=2)
    model = nn.Sequential(layer, nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    x, y = torch.randn(32, 3, 6, 6), torch.arange(32) % 4
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        losses.append(nn.functional.cross_entropy(model(x), y))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("sizes,options", [*SIZES, ((4, 6, 5), {"padding": "same", "bias": False})])
def test_gradients_are_those_of_torchs_own(monkeypatch, sizes, options):
    layer = seeded(sizes, **options)
    parameters = list(layer.parameters())
    found = []
    for own in (False, True):
        with monkeypatch.context() as patch:
            if not own:
                patch.setattr(flattened_conv, "_trains", lambda x: False)
            for memory_format in (torch.contiguous_format, torch.channels_last):
                x = images(layer).contiguous(memory_format=memory_format).requires_grad_()
                y = layer(x)
                assert not own or y.is_contiguous(memory_format=memory_format)
                first = torch.autograd.grad(y.square().sum(), [x, *parameters], create_graph=True)
                second = torch.autograd.grad(sum(g.square().sum() for g in first), [x, *parameters])
                alone = torch.autograd.grad(layer(x.detach()).square().sum(), layer.horizontal_0)
                found.append([*first, *second, *alone])
    for got in found[1:]:
        for tensor, want in zip(got, found[0], strict=True):
            assert (tensor - want).abs().max() <= 1e-4 * want.abs().max()


def test_what_differentiates_otherwise_agrees():
    layer = seeded((4, 6, 3), padding="same", stages=2)
    x, values = images(layer), dict(layer.named_parameters())

    def loss(values, x):
        return functional_call(layer, values, (x,)).square().sum()

    want = torch.autograd.grad(layer(x).square().sum(), list(values.values()))
    by_function = torch.func.grad(loss)(values, x)
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(values, x)
    _, slope = torch.func.jvp(lambda x: loss(values, x), (x,), (torch.ones_like(x),))
    for name, gradient in zip(values, want, strict=True):
        torch.testing.assert_close(by_function[name], gradient, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(each[name].sum(0), gradient, rtol=1e-3, atol=1e-3)
    x.requires_grad_()
    (of_x,) = torch.autograd.grad(layer(x).square().sum(), x)
    torch.testing.assert_close(slope, of_x.sum(), rtol=1e-3, atol=1e-3)
    (nothing,) = torch.autograd.grad(layer(x[:0]).sum(), layer.horizontal_0)
    assert not nothing.any()


def test_changes_reach_the_packed_stages():
    layer = seeded(*SIZES[1][:1], **SIZES[1][1]).pack("fused")
    x = images(layer)
    with torch.no_grad():
        assert layer(x).shape and not hasattr(layer, "packed_0")  # training mode keeps to the chain
        layer.eval()
        before = layer(x)
        assert layer.packed_0 is not None
        layer.vertical_1.mul_(2)
        torch.testing.assert_close(layer(x), copy.deepcopy(layer).pack("chain")(x), rtol=1e-3, atol=1e-3)
        assert not torch.allclose(layer(x), before)
        lent = {name: torch.zeros_like(p) for name, p in layer.named_parameters()}
        assert not functional_call(layer, lent, x).any()
        layer.load_state_dict({name: torch.zeros_like(p) for name, p in layer.state_dict().items()})
        assert not layer(x).any()
    assert not any("packed" in name for name in layer.state_dict())
    assert not any("packed" in name for name, _ in layer.train().named_buffers())


@pytest.mark.parametrize("make", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies(make):
    layer = seeded(*SIZES[2][:1], **SIZES[2][1]).pack("fused").eval()
    x = images(layer)
    with torch.no_grad():
        twin = make(layer)
        assert twin.layout == "fused" and torch.equal(twin(x), layer(x))
        twin.lateral_0.zero_()
        assert not torch.equal(twin(x), layer(x))
        half = make(layer).bfloat16()
        assert half(x.bfloat16()).dtype == torch.bfloat16
        torch.testing.assert_close(half(x), layer(x), rtol=0.05, atol=0.1)
    other = FlattenedConv2d.of_sizes(**layer.sizes)
    assert other.layout == "fused"
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x)) and torch.equal(layer.bias, layer.bias_0)


@pytest.mark.parametrize("layout", ["chain", "fused"])
def test_compile_and_export(layout):
    layer = seeded(*SIZES[1][:1], **SIZES[1][1]).pack(layout).eval()
    x = images(layer)
    with torch.no_grad():
        want = layer(x)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), want)
        program = torch.export.export(layer, (x,))
        torch.testing.assert_close(program.module()(x), want)
    ops_used = {str(node.target) for node in program.graph.nodes}
    assert ("tersetorch.flat_conv2d_inference.default" in ops_used) == (layout == "fused")


def test_bad_input_is_refused():
    for arguments, options, error, sentence in (
        ((0, 8, 3), {}, ValueError, "in_channels must be from 1"),
        ((3.0, 8, 3), {}, TypeError, "in_channels must be an int"),
        ((3, 8, (3, 3, 3)), {}, TypeError, "kernel_size must be an int or 2 of them"),
        ((3, 8, 3), {"stages": 9}, ValueError, "stages must be from 1 to 8, got 9"),
        ((3, 8, 3), {"rank": 0}, ValueError, "rank must be from 1"),
        ((3, 8, 4), {"padding": "same"}, ValueError, "'same' for odd kernels"),
        ((3, 8, 3), {"padding": "same", "stride": 2}, ValueError, "a stride of 1"),
        ((3, 8, 3), {"padding": "reflect"}, ValueError, "padding must be numbers"),
        ((3, 8, 3), {"padding": -1}, ValueError, "padding must be at least 0"),
        ((3, 8, 3), {"bias": 1}, TypeError, "bias must be True or False"),
        ((3, 8, 3), {"relu": 1}, TypeError, "relu must be True or False"),
    ):
        with pytest.raises(error, match=sentence):
            FlattenedConv2d(*arguments, **options)
    layer, fused = FlattenedConv2d(3, 8, 3), FlattenedConv2d(3, 8, 3).eval().pack("fused")
    for x, error, sentence in (
        (None, TypeError, "input must be a tensor"),
        (torch.ones(1, 3, 5, 5).double(), TypeError, "input must be float32 or bfloat16"),
        (torch.ones(1, 4, 5, 5), ValueError, r"input must be \[N, 3, H, W\]"),
    ):
        with pytest.raises(error, match=sentence):
            layer(x)
        with torch.no_grad(), pytest.raises(error, match=sentence):
            fused(x)
    with pytest.raises(ValueError, match="layout must be one of"):
        layer.pack("direct")
    with pytest.raises(ValueError, match="kernel_size must be at most 63"):
        FlattenedConv2d(3, 8, (64, 1)).pack("fused")
    for module, error, sentence in (
        (nn.Linear(3, 4), TypeError, "module must be an nn.Conv2d"),
        (nn.Conv2d(4, 4, 3, groups=2), ValueError, "2 groups"),
        (nn.Conv2d(4, 4, 3, dilation=2), ValueError, "dilation"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), ValueError, "padding_mode 'circular'"),
        (nn.Conv2d(4, 4, 2, padding="same"), ValueError, "even kernel"),
        (nn.Conv2d(4, 4, 3).double(), TypeError, "weight must be float32 or bfloat16"),
        (nn.Conv2d(4, 4, 3), ValueError, "each filter of module must be a product"),
    ):
        with pytest.raises(error, match=sentence):
            FlattenedConv2d.from_dense(module)
