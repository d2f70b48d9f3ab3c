"""Chains of a lateral, a vertical and a horizontal convolution as other libraries compute them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tersetorch.nn import FlattenedConv2d

from .cases import Case, Flat
from .engines import onnxruntime_graph, openvino_graph
from .implementations import Implementation, Packed

_NCHW, _NHWC = torch.contiguous_format, torch.channels_last


def layer_of(case: Flat, weight: Tensor) -> FlattenedConv2d:
    """The layer with such a weight, in torch's convolutions."""
    channels = case.in_channels
    layer = FlattenedConv2d(channels, channels, case.kernel, padding=case.padding, stages=case.stages)
    names = ("lateral", "vertical", "horizontal", "lateral_bias", "vertical_bias", "bias")
    for s, parts in enumerate(case.parts(weight)):
        for name, part in zip(names, parts, strict=True):
            setattr(layer, f"{name}_{s}", nn.Parameter(part.clone()))
    return layer.eval()


class _Chain(nn.Module):
    """Plain convolutions, as a user writes them."""

    def __init__(self, case: Flat, weight: Tensor) -> None:
        super().__init__()
        channels, kernel, ends = case.in_channels, case.kernel, case.padding
        convs: list[nn.Conv2d] = []
        for stage in case.parts(weight):
            made = (
                nn.Conv2d(channels, channels, 1),
                nn.Conv2d(channels, channels, (kernel, 1), padding=(ends, 0), groups=channels),
                nn.Conv2d(channels, channels, (1, kernel), padding=(0, ends), groups=channels),
            )
            for conv, filters, bias in zip(made, stage[:3], stage[3:], strict=True):
                conv.weight = nn.Parameter(filters.reshape(conv.weight.shape).clone())
                conv.bias = nn.Parameter(bias.clone())
            convs += made
        self.convs = nn.Sequential(*convs)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.convs(x)
        return y


def _torch(
    dtype: torch.dtype, order: torch.memory_format, compiled: bool = False
) -> Callable[[Case, Tensor, int, int], Packed]:
    def pack(case: Case, weight: Tensor, batch: int, threads: int) -> Packed:
        assert isinstance(case, Flat)
        chain = _Chain(case, weight).eval().to(dtype)
        chain = chain.to(memory_format=order)  # type: ignore[call-overload]
        run: Callable[[Tensor], Tensor] = torch.compile(chain) if compiled else chain

        def bind(x: Tensor) -> Callable[[], Tensor]:
            samples = x.to(dtype).contiguous(memory_format=order)
            return lambda: run(samples)

        return Packed(bind, weight.numel() * dtype.itemsize)

    return pack


def _openvino(case: Case, weight: Tensor, batch: int, threads: int) -> Packed:
    import openvino
    from openvino import opset13

    assert isinstance(case, Flat)
    parameter = y = opset13.parameter([batch, *case.samples(1).shape[1:]], openvino.Type.f32)
    ones = [1, 1]
    for conv in _Chain(case, weight).convs:
        assert isinstance(conv, nn.Conv2d) and conv.bias is not None and not isinstance(conv.padding, str)
        filters, ends = conv.weight.detach(), list(conv.padding)
        if conv.groups == 1:
            y = opset13.convolution(y, opset13.constant(filters.numpy()), ones, ends, ends, ones)
        else:
            y = opset13.group_convolution(y, opset13.constant(filters[:, None].numpy()), ones, ends, ends, ones)
        y = opset13.add(y, opset13.constant(conv.bias.detach().view(1, -1, 1, 1).numpy()))
    return Packed(openvino_graph(parameter, y, threads), weight.nbytes)


def _onnxruntime(case: Case, weight: Tensor, batch: int, threads: int) -> Packed:
    from onnx import helper

    assert isinstance(case, Flat)
    convs = list(_Chain(case, weight).convs)
    names = ["x", *(f"y{i}" for i in range(1, len(convs))), "y"]
    nodes: list[object] = []
    weights: dict[str, Tensor] = {}
    for i, conv in enumerate(convs):
        assert isinstance(conv, nn.Conv2d) and conv.bias is not None and not isinstance(conv.padding, str)
        inputs, pads = [names[i], f"w{i}", f"b{i}"], [*conv.padding] * 2
        nodes.append(helper.make_node("Conv", inputs, [names[i + 1]], pads=pads, group=conv.groups))
        weights |= {f"w{i}": conv.weight.detach(), f"b{i}": conv.bias.detach()}
    shape = [batch, *case.samples(1).shape[1:]]
    return Packed(onnxruntime_graph(nodes, weights, shape, threads), weight.nbytes)


FLAT = (
    Implementation("torch chain float32", "dense", "float32", _torch(torch.float32, _NCHW)),
    Implementation("torch chain float32 channels_last", "dense", "float32", _torch(torch.float32, _NHWC)),
    Implementation("torch chain bfloat16 channels_last", "dense", "bfloat16", _torch(torch.bfloat16, _NHWC)),
    Implementation("torch.compile chain channels_last", "dense", "float32", _torch(torch.float32, _NHWC, True)),
    Implementation("openvino chain", "dense", "float32", _openvino, needs=("openvino",)),
    Implementation("onnxruntime chain", "dense", "float32", _onnxruntime, needs=("onnxruntime", "onnx")),
)
