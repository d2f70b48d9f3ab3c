"""Chains of a lateral, a vertical and a horizontal convolution as other libraries compute them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tersetorch.nn import FlattenedConv2d

from .cases import Case, Flat
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


class Chain(nn.Module):
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
        """One convolution after the other."""
        y: Tensor = self.convs(x)
        return y


def _torch(
    dtype: torch.dtype, order: torch.memory_format, compiled: bool = False
) -> Callable[[Case, Tensor, int, int], Packed]:
    def pack(case: Case, weight: Tensor, batch: int, threads: int) -> Packed:
        assert isinstance(case, Flat)
        chain = Chain(case, weight).eval().to(dtype)
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
    for conv in Chain(case, weight).convs:
        assert isinstance(conv, nn.Conv2d) and conv.bias is not None and not isinstance(conv.padding, str)
        filters, ends = conv.weight.detach(), list(conv.padding)
        if conv.groups == 1:
            y = opset13.convolution(y, opset13.constant(filters.numpy()), ones, ends, ends, ones)
        else:
            y = opset13.group_convolution(y, opset13.constant(filters[:, None].numpy()), ones, ends, ends, ones)
        y = opset13.add(y, opset13.constant(conv.bias.detach().view(1, -1, 1, 1).numpy()))
    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": 1}
    request = openvino.compile_model(openvino.Model([y], [parameter]), "CPU", settings).create_infer_request()

    def bind(x: Tensor) -> Callable[[], Any]:
        feed = [x.numpy()]
        return lambda: request.infer(feed, share_inputs=True, share_outputs=True)[0]

    return Packed(bind, weight.nbytes)


def _onnxruntime(case: Case, weight: Tensor, batch: int, threads: int) -> Packed:
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    assert isinstance(case, Flat)
    nodes, constants = [], []
    for i, conv in enumerate(Chain(case, weight).convs):
        assert isinstance(conv, nn.Conv2d) and conv.bias is not None and not isinstance(conv.padding, str)
        inputs = [f"x{i}", f"w{i}", f"b{i}"]
        nodes.append(helper.make_node("Conv", inputs, [f"x{i + 1}"], pads=[*conv.padding] * 2, group=conv.groups))
        held = zip(inputs[1:], (conv.weight, conv.bias), strict=True)
        constants += [numpy_helper.from_array(tensor.detach().numpy(), name) for name, tensor in held]
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x0", TensorProto.FLOAT, [batch, *case.samples(1).shape[1:]])],
        [helper.make_tensor_value_info(f"x{len(nodes)}", TensorProto.FLOAT, None)],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")  # its threads would disturb the next call
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def bind(x: Tensor) -> Callable[[], Any]:
        feed = {"x0": x.numpy()}
        return lambda: session.run(None, feed)[0]

    return Packed(bind, weight.nbytes)


FLAT = (
    Implementation("torch chain float32", "dense", "float32", _torch(torch.float32, _NCHW)),
    Implementation("torch chain float32 channels_last", "dense", "float32", _torch(torch.float32, _NHWC)),
    Implementation("torch chain bfloat16 channels_last", "dense", "bfloat16", _torch(torch.bfloat16, _NHWC)),
    Implementation("torch.compile chain channels_last", "dense", "float32", _torch(torch.float32, _NHWC, True)),
    Implementation("openvino chain", "dense", "float32", _openvino, needs=("openvino",)),
    Implementation("onnxruntime chain", "dense", "float32", _onnxruntime, needs=("onnxruntime", "onnx")),
)
