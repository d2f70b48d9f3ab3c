import copy
import warnings

import pytest
import torch
from torch import nn
from torch.ao import quantization
from torch.ao.nn.quantized import FloatFunctional

from tersetorch.storage import QuantizedWeight, import_quantized, read_quantized

pytestmark = pytest.mark.filterwarnings("ignore")


class Net(nn.Module):
    def __init__(self, groups=1):
        super().__init__()
        self.quant, self.dequant = quantization.QuantStub(), quantization.DeQuantStub()
        self.conv = nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), groups=groups)
        self.relu, self.drop = nn.ReLU(), nn.Dropout()
        self.second = nn.Conv2d(6, 6, 1, bias=False)
        self.add = FloatFunctional()
        self.fc = nn.Linear(6, 5)

    def forward(self, x):
        x = self.relu(self.conv(self.quant(x)))
        x = self.drop(self.add.add(x, self.second(x)))
        return self.dequant(self.fc(x.mean((2, 3))))


def static(qconfig, groups=1):
    torch.manual_seed(0)
    net = Net(groups).eval()
    net.qconfig = qconfig
    net = quantization.fuse_modules(net, [["conv", "relu"]])
    quantization.prepare(net, inplace=True)
    net(torch.randn(2, 4, 9, 9))
    return quantization.convert(net)


PER_TENSOR = quantization.QConfig(
    quantization.MinMaxObserver.with_args(reduce_range=True),
    quantization.MinMaxObserver.with_args(dtype=torch.qint8, qscheme=torch.per_tensor_affine),
)
ASYMMETRIC = quantization.QConfig(
    quantization.MinMaxObserver.with_args(reduce_range=True),
    quantization.PerChannelMinMaxObserver.with_args(dtype=torch.qint8, qscheme=torch.per_channel_affine),
)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("qconfig", [PER_TENSOR, ASYMMETRIC, quantization.get_default_qconfig("x86")])
def test_static_layers(qconfig, groups):
    net = static(qconfig, groups)
    found = read_quantized(net)
    assert set(found) == {"conv.weight", "conv.bias", "second.weight", "fc.weight", "fc.bias"}
    per_channel = qconfig is not PER_TENSOR
    for name in ("conv", "second", "fc"):
        own, weight = getattr(net, name).weight(), found[f"{name}.weight"]
        assert torch.equal(weight.to_dense(), own.dequantize())
        assert torch.equal(weight.codes.int() - 128, own.int_repr().int())
        assert weight.groups == (own.shape[0] if per_channel else 1)
        assert weight.run == (own[0].numel() if per_channel else own.numel())
    floating = import_quantized(net)
    assert torch.equal(floating.conv[0].weight, net.conv.weight().dequantize())
    assert torch.equal(floating.conv[0].bias, net.conv.bias()) and floating.second.bias is None
    x = torch.randn(2, 4, 9, 9)
    expected = static_reference(net, x)
    torch.testing.assert_close(floating(x), expected)
    assert torch.equal(net(x), net(x))  # the quantised one still runs
    assert (floating(x) - net(x)).abs().max() < 0.2


def static_reference(net, x):
    conv, second, fc = net.conv, net.second, net.fc
    weights = [layer.weight().dequantize() for layer in (conv, second, fc)]
    x = nn.functional.conv2d(x, weights[0], conv.bias(), conv.stride, conv.padding, conv.dilation, conv.groups).relu()
    x = x + nn.functional.conv2d(x, weights[1])
    return nn.functional.linear(x.mean((2, 3)), weights[2], fc.bias())


def test_a_state_dict_says_the_same_as_the_model():
    net = static(ASYMMETRIC)
    of_model, of_state = read_quantized(net), read_quantized(net.state_dict())
    assert set(of_model) == set(of_state)
    for name, value in of_model.items():
        other = of_state[name]
        if isinstance(value, QuantizedWeight):
            value, other = value.to_dense(), other.to_dense()
        assert torch.equal(value, other)


@pytest.mark.parametrize("dtype", [torch.qint8, torch.float16])
def test_dynamic_layers(dtype):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3, bias=False)).eval()
    dynamic = quantization.quantize_dynamic(model, {nn.Linear} if dtype == torch.qint8 else {"0"}, dtype=dtype)
    if dtype == torch.float16:
        with pytest.raises(ValueError, match="source must hold quantised weights, got none"):
            read_quantized(dynamic)
        return
    floating = import_quantized(dynamic)
    for place in (0, 2):
        assert torch.equal(floating[place].weight, dynamic[place].weight().dequantize())
    assert torch.equal(floating[0].bias, model[0].bias) and floating[2].bias is None
    assert isinstance(floating[0].weight, nn.Parameter) and floating[0].weight.requires_grad
    assert type(dynamic[0]).__name__ == "Linear" and dynamic[0].weight().is_quantized


def test_embeddings_and_convolutions_of_one_dimension():
    torch.manual_seed(2)
    model = nn.Sequential(nn.EmbeddingBag(9, 6, mode="sum", include_last_offset=True))
    model.qconfig = quantization.float_qparams_weight_only_qconfig
    bag = quantization.convert(quantization.prepare(model))
    floating = import_quantized(bag)
    assert torch.equal(floating[0].weight, bag[0].weight().dequantize())
    indices, offsets = torch.tensor([1, 8, 3, 3]), torch.tensor([0, 1, 4])
    expected = nn.functional.embedding_bag(indices, floating[0].weight, offsets, mode="sum", include_last_offset=True)
    assert torch.equal(floating[0](indices, offsets), expected)
    model = nn.Sequential(quantization.QuantStub(), nn.Conv1d(3, 4, 3, dilation=2), quantization.DeQuantStub()).eval()
    model.qconfig = ASYMMETRIC
    prepared = quantization.prepare(model)
    prepared(torch.randn(1, 3, 9))
    converted = quantization.convert(prepared)
    floating = import_quantized(converted)
    assert torch.equal(floating[1].weight, converted[1].weight().dequantize())
    assert floating(torch.randn(2, 3, 9)).shape == (2, 4, 5)


def test_per_channel_along_another_dimension():
    torch.manual_seed(3)
    weight = torch.randn(5, 4, 3)
    scales, zeros = torch.rand(4, dtype=torch.float64) / 30 + 0.01, torch.tensor([-100, 3, 0, 127])
    tensor = torch.quantize_per_channel(weight, scales, zeros, 1, torch.qint8)
    found = read_quantized({"w": tensor})["w"]
    assert (found.groups, found.run) == (4, 3)
    assert torch.equal(found.to_dense(), tensor.dequantize())


def test_layers_that_share_a_module_go_on_sharing():
    linear = nn.Linear(4, 4)
    model = quantization.quantize_dynamic(nn.Sequential(linear, linear), {nn.Linear})
    model[1] = model[0]
    floating = import_quantized(model)
    assert floating[0] is floating[1] and type(floating[0]) is nn.Linear


def test_what_is_not_read_is_refused():
    model = quantization.quantize_dynamic(nn.Sequential(nn.LSTM(3, 4)), {nn.LSTM})
    with pytest.raises(ValueError, match=r"read_quantized: source must hold linear, .* got .*LSTM as '0'; quantise no"):
        read_quantized(model)
    wide = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint32)
    with pytest.raises(ValueError, match=r"hold 8-bit integers in 'w', got torch\.qint32"):
        read_quantized({"w": wide})
    with pytest.raises(ValueError, match="hold a weight and a bias in 'fc"):
        read_quantized({"fc._packed_params._packed_params": 3})
    with pytest.raises(ValueError, match="hold finite scales of 'w'"):
        read_quantized({"w": torch._make_per_tensor_quantized_tensor(torch.ones(2, dtype=torch.int8), float("inf"), 0)})
    with pytest.raises(ValueError, match="hold tensors beside quantised weights, got str as 'x'"):
        read_quantized({"w": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "x": "y"})


def test_a_graph_is_refused_but_its_weights_are_read():
    from torch.ao.quantization import quantize_fx

    torch.manual_seed(4)
    example = torch.randn(2, 6)
    mapping = quantization.get_default_qconfig_mapping("x86")
    graph = quantize_fx.prepare_fx(nn.Sequential(nn.Linear(6, 4)).eval(), mapping, example)
    graph(example)
    graph = quantize_fx.convert_fx(graph)
    layer = dict(graph.named_modules())["0"]
    assert torch.equal(read_quantized(graph)["0.weight"].to_dense(), layer.weight().dequantize())
    with pytest.raises(ValueError, match="source must be a model of modules, got a graph whose code quantises"):
        import_quantized(graph)


def test_the_copy_is_independent():
    model = quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 3)), {nn.Linear})
    kept = copy.deepcopy(model)
    floating = import_quantized(model)
    with torch.no_grad():
        floating[0].weight.zero_()
        floating[0].bias.zero_()
    x = torch.randn(2, 4)
    with warnings.catch_warnings():
        assert torch.equal(model(x), kept(x))
