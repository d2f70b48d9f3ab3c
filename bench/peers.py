"""What a user could run instead: dense products in their strongest forms, and other sparse ones."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from .cases import Case, Conv
from .engines import onnxruntime_graph, openvino_graph
from .implementations import Implementation, Packed

_mkldnn: Any = torch.ops.mkldnn
_quantized: Any = torch.ops.quantized
# torch announces here that its quantized tensors will go, and that its sparse ones are young.
_QUIET = r"torch.quantize_per|Sparse CSR tensor support|.*non-writable|.*TypedStorage"


def _torch_linear(case: Case, weight: Tensor, batch: int, threads: int) -> Packed:
    return Packed(lambda x: lambda: functional.linear(x, weight), weight.nbytes)


def _packed_linear(dtype: torch.dtype) -> Callable[[Case, Tensor, int, int], Packed]:
    def pack(case: Case, weight: Tensor, batch: int, threads: int) -> Packed:
        converted = weight.to(dtype)
        packed = _mkldnn._reorder_linear_weight(converted, batch)

        def bind(x: Tensor) -> Callable[[], Tensor]:
            samples = x.to(dtype)
            return lambda: _mkldnn._linear_pointwise(samples, packed, None, "none", [], "")

        return Packed(bind, converted.nbytes)

    return pack


def _dynamic_int8(engine: str) -> Callable[[Case, Tensor, int, int], Packed]:
    def pack(case: Case, weight: Tensor, batch: int, threads: int) -> Packed:
        with _engine(engine):
            packed = _quantized.linear_prepack(per_row_int8(weight), None)

        def bind(x: Tensor) -> Callable[[], Tensor]:
            return lambda: _quantized.linear_dynamic(x, packed, False)

        return Packed(bind, weight.numel() + 4 * len(weight))

    return pack


def _torch_csr(case: Case, weight: Tensor, batch: int, threads: int) -> Packed:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", _QUIET)
        csr = weight.to_sparse_csr()
    row_offsets, col_indices = csr.crow_indices().int(), csr.col_indices().int()
    csr = torch.sparse_csr_tensor(row_offsets, col_indices, csr.values(), weight.shape, check_invariants=True)
    nbytes = row_offsets.nbytes + col_indices.nbytes + csr.values().nbytes
    return Packed(lambda x: lambda: (csr @ x.T).T, nbytes)


def _scipy_csr(case: Case, weight: Tensor, batch: int, threads: int) -> Packed:
    from scipy.sparse import csr_array

    csr = csr_array(weight.numpy())
    nbytes = csr.data.nbytes + csr.indices.nbytes + csr.indptr.nbytes

    def bind(x: Tensor) -> Callable[[], Any]:
        samples = x.numpy()
        return lambda: (csr @ samples.T).T

    return Packed(bind, nbytes)


def _onnxruntime(case: Case, weight: Tensor, batch: int, threads: int) -> Packed:
    from onnx import helper

    if isinstance(case, Conv):
        node = helper.make_node(
            "Conv", ["x", "w"], ["y"], pads=[case.padding] * 4, strides=[case.stride] * 2, group=case.groups
        )
        stored = weight
    else:
        node = helper.make_node("MatMul", ["x", "w"], ["y"])
        stored = weight.T.contiguous()
    shape = [batch, *case.samples(1).shape[1:]]
    return Packed(onnxruntime_graph([node], {"w": stored}, shape, threads), weight.nbytes)


def _openvino(case: Case, weight: Tensor, batch: int, threads: int) -> Packed:
    import openvino
    from openvino import opset13

    x = opset13.parameter([batch, *case.samples(1).shape[1:]], openvino.Type.f32)
    if isinstance(case, Conv):
        ends, steps = [case.padding] * 2, [case.stride] * 2
        if case.groups == 1:
            y = opset13.convolution(x, opset13.constant(weight.numpy()), steps, ends, ends, [1, 1])
        else:
            grouped = weight.reshape(case.groups, -1, *weight.shape[1:]).numpy()
            y = opset13.group_convolution(x, opset13.constant(grouped), steps, ends, ends, [1, 1])
    else:
        y = opset13.matmul(x, opset13.constant(weight.numpy()), False, True)
    return Packed(openvino_graph(x, y, threads), weight.nbytes)


def _litert(case: Case, weight: Tensor, batch: int, threads: int) -> Packed:
    """One layer of LiteRT, which XNNPACK computes; images are channels last in it."""
    from ai_edge_litert.interpreter import Interpreter

    stored = weight
    shape, out_shape = [batch, *case.samples(1).shape[1:]], [batch, len(weight)]
    if isinstance(case, Conv):
        if case.stride != 1 or not case.padded:
            raise RuntimeError("its padding is that of TensorFlow")
        stored = weight.permute(0, 2, 3, 1).contiguous()
        shape = [batch, case.size, case.size, case.in_channels]
        out_shape = [batch, case.out_size, case.out_size, case.out_channels]
    model = _flatbuffer(stored.numpy(), shape, out_shape)
    interpreter = Interpreter(model_content=model, num_threads=threads)
    interpreter.allocate_tensors()
    first, last = (d()[0]["index"] for d in (interpreter.get_input_details, interpreter.get_output_details))

    def bind(x: Tensor) -> Callable[[], Any]:
        samples = (x.permute(0, 2, 3, 1).contiguous() if x.dim() == 4 else x).numpy()

        def run() -> Any:
            interpreter.set_tensor(first, samples)
            interpreter.invoke()
            y = interpreter.get_tensor(last)
            return y.transpose(0, 3, 1, 2) if y.ndim == 4 else y

        return run

    return Packed(bind, weight.nbytes)


def _flatbuffer(weight: NDArray[np.float32], shape: list[int], out_shape: list[int]) -> bytes:
    """A LiteRT model of one fully connected layer, or of one convolution with the output as large as the input."""
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    def tensor(name: str, shape: list[int], buffer: int) -> Any:
        made = schema.TensorT()
        made.name, made.shape, made.buffer, made.type = name, shape, buffer, schema.TensorType.FLOAT32
        return made

    def buffer(values: NDArray[np.float32]) -> Any:
        made = schema.BufferT()
        made.data = values.reshape(-1).view(np.uint8)
        return made

    operator, code, graph, model = schema.OperatorT(), schema.OperatorCodeT(), schema.SubGraphT(), schema.ModelT()
    if weight.ndim == 2:
        code.builtinCode = schema.BuiltinOperator.FULLY_CONNECTED
        operator.builtinOptionsType = schema.BuiltinOptions.FullyConnectedOptions
        operator.builtinOptions = schema.FullyConnectedOptionsT()
    else:
        code.builtinCode = schema.BuiltinOperator.CONV_2D
        operator.builtinOptionsType = schema.BuiltinOptions.Conv2DOptions
        operator.builtinOptions = options = schema.Conv2DOptionsT()
        options.strideH = options.strideW = options.dilationHFactor = options.dilationWFactor = 1
        options.padding = schema.Padding.SAME
    code.deprecatedBuiltinCode, code.version = code.builtinCode, 1
    operator.inputs, operator.outputs = [0, 1, 2], [3]
    graph.tensors = [tensor("x", shape, 0), tensor("w", list(weight.shape), 1)]
    graph.tensors += [tensor("bias", [len(weight)], 2), tensor("y", out_shape, 0)]
    graph.inputs, graph.outputs, graph.operators, graph.name = [0], [3], [operator], "main"
    model.version, model.description, model.operatorCodes, model.subgraphs = 3, "layer", [code], [graph]
    model.buffers = [schema.BufferT(), buffer(weight), buffer(np.zeros(len(weight), np.float32))]
    builder = flatbuffers.Builder(weight.nbytes + 4096)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def _torch_conv(dtype: torch.dtype, layout: torch.memory_format) -> Callable[[Case, Tensor, int, int], Packed]:
    def pack(case: Case, weight: Tensor, batch: int, threads: int) -> Packed:
        assert isinstance(case, Conv)
        stored = weight.to(dtype, memory_format=layout)

        def bind(x: Tensor) -> Callable[[], Tensor]:
            samples = x.to(dtype, memory_format=layout)
            return lambda: functional.conv2d(
                samples, stored, stride=case.stride, padding=case.padding, groups=case.groups
            )

        return Packed(bind, stored.nbytes)

    return pack


def _packed_conv(dtype: torch.dtype) -> Callable[[Case, Tensor, int, int], Packed]:
    def pack(case: Case, weight: Tensor, batch: int, threads: int) -> Packed:
        assert isinstance(case, Conv)
        stored = weight.to(dtype)
        padding, stride, dilation = [case.padding] * 2, [case.stride] * 2, [1, 1]
        sizes = [batch, case.in_channels, case.size, case.size]
        packed = _mkldnn._reorder_convolution_weight(stored, padding, stride, dilation, case.groups, sizes)

        def bind(x: Tensor) -> Callable[[], Tensor]:
            samples = x.to(dtype, memory_format=torch.channels_last)
            return lambda: _mkldnn._convolution_pointwise(
                samples, packed, None, padding, stride, dilation, case.groups, "none", [], ""
            )

        return Packed(bind, stored.nbytes)

    return pack


def _static_int8_conv(case: Case, weight: Tensor, batch: int, threads: int) -> Packed:
    """int8 in and out, as between two layers of a quantized network; the scales are known before."""
    assert isinstance(case, Conv)
    with _engine("x86"):
        packed = _quantized.conv2d_prepack(
            per_row_int8(weight), None, [case.stride] * 2, [case.padding] * 2, [1, 1], case.groups
        )

    def bind(x: Tensor) -> Callable[[], Tensor]:
        scale = x.abs().max().item() / 127
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", _QUIET)
            samples = torch.quantize_per_tensor(x, scale, 128, torch.quint8).to(memory_format=torch.channels_last)
        y = functional.conv2d(x, weight, stride=case.stride, padding=case.padding, groups=case.groups)
        out_scale = y.abs().max().item() / 127
        return lambda: _quantized.conv2d(samples, packed, out_scale, 128)

    return Packed(bind, weight.numel() + 4 * len(weight))


def per_row_int8(weight: Tensor) -> Tensor:
    """A quantized tensor with a symmetric scale for each row."""
    scales = (weight.abs().flatten(1).amax(1) / 127).clamp(min=1e-9).double()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", _QUIET)
        return torch.quantize_per_channel(weight, scales, torch.zeros_like(scales, dtype=torch.int64), 0, torch.qint8)


class _engine:  # noqa: N801
    """The quantized engine for a while."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        self._before = torch.backends.quantized.engine
        torch.backends.quantized.engine = self._name

    def __exit__(self, *_: object) -> None:
        torch.backends.quantized.engine = self._before


def _dequantized(result: Tensor) -> Tensor:
    return result.dequantize()


_ORT = ("onnxruntime", "onnx")
LINEAR = (
    Implementation("torch F.linear float32", "dense", "float32", _torch_linear),
    Implementation("oneDNN packed float32", "dense", "float32", _packed_linear(torch.float32), follows_batch=True),
    Implementation("oneDNN packed bfloat16", "dense", "bfloat16", _packed_linear(torch.bfloat16), follows_batch=True),
    Implementation("torch dynamic int8", "dense", "int8", _dynamic_int8("x86")),
    Implementation("torch dynamic int8 by oneDNN", "dense", "int8", _dynamic_int8("onednn")),
    Implementation("onnxruntime float32", "dense", "float32", _onnxruntime, needs=_ORT, follows_batch=True),
    Implementation("openvino float32", "dense", "float32", _openvino, needs=("openvino",), follows_batch=True),
    Implementation("LiteRT float32", "dense", "float32", _litert, needs=("ai_edge_litert",), follows_batch=True),
    Implementation("torch sparse CSR", "sparse", "float32", _torch_csr),
    Implementation("scipy CSR", "sparse", "float32", _scipy_csr, needs=("scipy",), threads=1),
)
_NCHW, _NHWC = torch.contiguous_format, torch.channels_last
CONV = (
    Implementation("torch F.conv2d float32", "dense", "float32", _torch_conv(torch.float32, _NCHW)),
    Implementation("torch F.conv2d float32 channels_last", "dense", "float32", _torch_conv(torch.float32, _NHWC)),
    Implementation("oneDNN packed conv float32", "dense", "float32", _packed_conv(torch.float32), follows_batch=True),
    Implementation("torch F.conv2d bfloat16 channels_last", "dense", "bfloat16", _torch_conv(torch.bfloat16, _NHWC)),
    Implementation("torch static int8 conv", "dense", "int8", _static_int8_conv, result=_dequantized),
    Implementation("onnxruntime float32", "dense", "float32", _onnxruntime, needs=_ORT, follows_batch=True),
    Implementation("openvino float32", "dense", "float32", _openvino, needs=("openvino",), follows_batch=True),
    Implementation("LiteRT float32", "dense", "float32", _litert, needs=("ai_edge_litert",), follows_batch=True),
)
PEERS = {"linear": LINEAR, "conv": CONV}
