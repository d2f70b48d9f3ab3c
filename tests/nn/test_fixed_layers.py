"""FixedPointLinear and FixedPointConv2d: their numbers, copies and state, the compiler, and what they refuse."""

import copy

import pytest
import torch
from torch import nn

from tersetorch.formats import FixedFormat, FixedFormats, FixedWeight
from tersetorch.formats.fixed_format import note_formats
from tersetorch.nn import FixedPointConv2d, FixedPointLinear

FORMATS = ("<2,12>", "<6,8>", "<8,10>")
CONVS = [
    {"kernel_size": 3},
    {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0), "dilation": (1, 2), "groups": 2},
    {"kernel_size": 3, "padding": "same", "padding_mode": "reflect", "bias": False},
    {"kernel_size": (2, 4), "padding": "same", "groups": 4},
]


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rounded(x, format):
    integer_bits, fraction_bits = (int(bits) for bits in format.strip("<>").split(","))
    end = 2.0 ** (integer_bits - 1 + fraction_bits)
    return (x.double() * 2**fraction_bits + 0.5).floor().clamp(-end, end - 1) / 2**fraction_bits


def dense(kind, **sizes):
    torch.manual_seed(0)
    return kind(**sizes).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("formats", [FORMATS, ("<1,7>", "<3,5>", "<4,4>"), ("<1,7>", "<4,12>", "<4,16>")])
def test_linear_is_the_rounded_product_of_rounded_numbers(formats, dtype):
    module = dense(nn.Linear, in_features=70, out_features=30)
    layer = FixedPointLinear.from_dense(module, *formats)
    x = numbers(4, 3, 70).to(dtype)
    weight, bias = rounded(module.weight.detach(), formats[0]), rounded(module.bias.detach(), "<8,24>")
    assert torch.equal(layer.weight.double(), weight) and layer.weight.dtype == torch.float32
    bits = int(formats[0].strip("<>").split(",")[1]) + int(formats[1].strip("<>").split(",")[1])
    bias = rounded(module.bias.detach(), f"<8,{bits}>")
    want = rounded(rounded(x, formats[1]) @ weight.T + bias, formats[2])
    y = layer(x)
    assert y.dtype == dtype and torch.equal(y, want.float().to(dtype))
    assert torch.equal(layer(x[0, 0]), y[0, 0]) and not layer(x.requires_grad_()).requires_grad
    narrow = formats[1] == "<3,5>"
    assert layer.steps.dtype == (torch.int8 if narrow else torch.int16)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("sizes", CONVS)
def test_conv_is_the_rounded_product_of_rounded_numbers(sizes, memory_format):
    module = dense(nn.Conv2d, in_channels=8, out_channels=12, **sizes)
    layer = FixedPointConv2d.from_dense(module, *FORMATS)
    exact = layer.to_dense().double()
    assert torch.equal(exact.weight, rounded(module.weight.detach(), FORMATS[0]))
    with torch.no_grad():
        exact.bias = None if module.bias is None else nn.Parameter(rounded(module.bias.detach(), "<8,20>"))
    x = numbers(5, 8, 9, 7).to(memory_format=memory_format)
    want = rounded(exact(rounded(x, FORMATS[1])), FORMATS[2]).float().detach()
    y = layer(x)
    assert torch.equal(y, want) and y.is_contiguous(memory_format=memory_format)
    assert torch.equal(layer(x[0]), want[0])
    assert torch.equal(layer(x.bfloat16()), layer(x.bfloat16().float()).bfloat16())


def test_saturates_instead_of_overflowing():
    module = dense(nn.Linear, in_features=1000, out_features=3)
    with torch.no_grad():
        module.weight.fill_(-2)
    layer = FixedPointLinear.from_dense(module, "<2,14>", "<2,14>", "<4,12>")
    x = torch.full((1, 1000), -2.0)
    assert layer(x).tolist() == [[8 - 2**-12] * 3] and layer(-x).tolist() == [[-8.0] * 3]
    assert layer(x.fill_(torch.inf)).tolist() == [[-8.0] * 3]


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_copies_state_and_dense(kind):
    if kind == "linear":
        layer = FixedPointLinear.from_dense(dense(nn.Linear, in_features=9, out_features=5), *FORMATS)
        x, same = numbers(2, 9), FixedPointLinear.of_sizes
    else:
        layer = FixedPointConv2d.from_dense(dense(nn.Conv2d, in_channels=3, out_channels=4, kernel_size=2), *FORMATS)
        x, same = numbers(2, 3, 5, 5), FixedPointConv2d.of_sizes
    y = layer(x)
    other = same(**layer.sizes)
    assert repr(other) == repr(layer) and layer.sizes == other.sizes
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), y) and torch.equal(copy.deepcopy(layer)(x), y)
    again = type(layer).from_dense(layer.to_dense(), *FORMATS)
    assert torch.equal(again.steps, layer.steps) and torch.equal(again(x), y)
    layer.half().double().bfloat16()
    assert torch.equal(layer(x), y) and not list(layer.parameters())
    assert torch.equal(torch.compile(layer, fullgraph=True)(x), y)
    assert torch.equal(torch.export.export(layer, (x,)).module()(x), y)
    layer.validate()
    layer.steps.zero_()
    assert not (layer(x) - layer(x * 0)).any()  # packed anew


def test_formats_left_at_a_layer_are_taken():
    module = dense(nn.Linear, in_features=9, out_features=5)
    formats = [FixedFormat(2, 12), FixedFormat(6, 8), FixedFormat(8, 10)]
    note_formats(module, FixedFormats(*formats))
    layer = FixedPointLinear.from_dense(copy.deepcopy(module), output_format="<2,2>")
    assert [layer.weight_format, layer.input_format, str(layer.output_format)] == [*formats[:2], "<2,2>"]


def test_the_format_of_a_weight():
    weight = FixedWeight.from_dense(torch.tensor([[0.3, -5.0, 1.75]]), FixedFormat(2, 2))
    assert weight.steps.tolist() == [[1, -8, 7]] and weight.steps.dtype == torch.int8
    assert weight.to_dense().tolist() == [[0.25, -2.0, 1.75]]
    assert (weight.shape, weight.nnz, weight.nbytes) == ((1, 3), 3, 3)
    weight.validate()
    with pytest.raises(ValueError, match=r"steps must lie in \[-8, 8\) for <2,2>"):
        FixedWeight(torch.tensor([[8]], dtype=torch.int8), FixedFormat(2, 2)).validate()
    with pytest.raises(TypeError, match="steps must be int8 or int16"):
        FixedWeight(torch.tensor([[1]]), FixedFormat(2, 2)).validate()
    with pytest.raises(ValueError, match="weight must be finite"):
        FixedWeight.from_dense(torch.tensor([[float("nan")]]), FixedFormat(2, 2))
    with pytest.raises(ValueError, match="format must have at most 16 bits, got <4,16>"):
        FixedWeight.from_dense(torch.ones(1, 1), FixedFormat(4, 16))
    with pytest.raises(TypeError, match="format must be a FixedFormat, got '<2,2>'"):
        FixedWeight.from_dense(torch.ones(1, 1), "<2,2>")
    with pytest.raises(TypeError, match=r"dtype must be int8 or int16, got torch\.int32"):
        FixedWeight.from_dense(torch.ones(1, 1), FixedFormat(2, 2), torch.int32)


def test_refuses():
    module = dense(nn.Linear, in_features=9, out_features=5)
    with pytest.raises(TypeError, match=r"module must be an nn\.Linear, got Conv2d"):
        FixedPointLinear.from_dense(nn.Conv2d(1, 1, 1), *FORMATS)
    with pytest.raises(ValueError, match="input_format must be given for a layer without formats, got None"):
        FixedPointLinear.from_dense(module, "<2,12>")
    with pytest.raises(ValueError, match="weight_format: a format must be <IL,FL>"):
        FixedPointLinear.from_dense(module, "<0,8>", "<2,6>", "<2,6>")
    with pytest.raises(ValueError, match="input_format must have at most 16 bits, got <4,16>"):
        FixedPointLinear.from_dense(module, "<2,12>", "<4,16>", "<4,16>")
    with pytest.raises(TypeError, match="weight must be a FixedWeight, got Tensor"):
        FixedPointLinear(torch.ones(2, 2), input_format="<2,6>", output_format="<2,6>")
    layer = FixedPointLinear.from_dense(module, *FORMATS)
    with pytest.raises(TypeError, match="bias must be int64"):
        FixedPointLinear(layer.fixed_weight, torch.ones(5), input_format="<2,6>", output_format="<2,6>")
    with pytest.raises(TypeError, match="input must be float32 or bfloat16"):
        layer(torch.ones(2, 9).double())
    with pytest.raises(RuntimeError, match="x must not hold NaN, which is no whole number"):
        layer(torch.full((2, 9), float("nan")))
    with pytest.raises(TypeError, match="FixedPointConv2d: input must be a tensor, got NoneType"):
        FixedPointConv2d.from_dense(nn.Conv2d(1, 1, 1), *FORMATS)(None)
    with pytest.raises(ValueError, match=r"FixedPointLinear: input must be \[\.\.\., 9\], got shape \(2, 8\)"):
        layer(torch.ones(2, 8))
    state = layer.state_dict()
    state["steps"] = torch.full_like(layer.steps, 2**14)
    with pytest.raises(RuntimeError, match="steps must lie in"):
        layer.load_state_dict(state)
    conv = FixedPointConv2d.from_dense(dense(nn.Conv2d, in_channels=3, out_channels=4, kernel_size=3), *FORMATS)
    with pytest.raises(RuntimeError, match="x must be as large as the kernel"):
        conv(torch.ones(1, 3, 2, 2))
    with pytest.raises(ValueError, match=r"input must be \[N, 3, H, W\]"):
        conv(torch.ones(1, 4, 5, 5))
    with torch.no_grad():
        module.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="bias must be finite"):
        FixedPointLinear.from_dense(module, *FORMATS)
