"""Products of signs as other libraries compute them on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .cases import Case, Conv, Linear
from .implementations import Implementation, Packed


def _numkong(case: Case, weight: Tensor, batch: int, threads: int) -> Packed:
    """Packed Hamming distances: samples come packed, and sums leave as integers."""
    import numkong

    assert isinstance(case, Linear)
    held = numkong.hammings_pack(_bits(weight), "uint1")
    columns = case.in_features
    out = numkong.zeros((batch, case.out_features), dtype="uint32")

    def bind(x: Tensor) -> Callable[[], Any]:
        samples = _bits(x)
        return lambda: (columns, numkong.hammings_packed(samples, held, out=out))

    return Packed(bind, held.nbytes)


def _dots(found: tuple[int, Any]) -> Tensor:
    columns, distances = found
    return columns - 2 * torch.from_numpy(np.asarray(distances).astype(np.int64))


def _bits(x: Tensor, **order: Any) -> NDArray[np.uint8]:
    return np.packbits(x.numpy() < 0, axis=-1, **order)


def _larq(case: Case, weight: Tensor, batch: int, threads: int) -> Packed:
    """Packing and convolution of Larq Compute Engine by its faster kernel; images are channels last in it.

    Its authors' package says that on x86 it is not optimised. It is built against NumPy 1: with NumPy 2 it takes every
    array for empty and says so.
    """
    assert isinstance(case, Conv)
    if case.stride != 1 or case.groups != 1 or case.in_channels % 32 or not case.padded:
        raise RuntimeError("it is asked for stride 1, one group and whole words of channels")
    model = _larq_model(case, weight, batch)
    interpreter = _larq_wrapper().LiteInterpreter(model, threads, False, True, False)

    def bind(x: Tensor) -> Callable[[], Any]:
        images = np.ascontiguousarray(x.permute(0, 2, 3, 1).numpy())
        return lambda: interpreter.predict([images])[0]

    return Packed(bind, weight.numel() // 8)


def _channels_first(y: Any) -> Tensor:
    return torch.from_numpy(np.asarray(y)).permute(0, 3, 1, 2)


@cache
def _larq_wrapper() -> Any:
    """Its interpreter alone: the package itself asks for TensorFlow."""
    package = find_spec("larq_compute_engine")
    assert package is not None and package.submodule_search_locations is not None
    path = Path(package.submodule_search_locations[0]) / "tflite" / "python" / "interpreter_wrapper_lite.so"
    spec = spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    wrapper = module_from_spec(spec)
    spec.loader.exec_module(wrapper)
    return wrapper


def _larq_model(case: Conv, weight: Tensor, batch: int) -> bytes:
    """A model of two operators: signs to words of 32 bits, and their convolution to float sums, zeros outside."""
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema
    from flatbuffers import flexbuffers

    model, graph = schema.ModelT(), schema.SubGraphT()
    model.buffers, graph.tensors = [schema.BufferT()], []

    def tensor(name: str, shape: tuple[int, ...], kind: int, values: Any = None) -> int:
        made = schema.TensorT()
        made.name, made.shape, made.type, made.buffer = name, list(shape), kind, 0
        if values is not None:
            stored = schema.BufferT()
            stored.data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
            made.buffer = len(model.buffers)
            model.buffers.append(stored)
        graph.tensors.append(made)
        return len(graph.tensors) - 1

    floats, integers = schema.TensorType.FLOAT32, schema.TensorType.INT32
    filters = case.out_channels
    kernel = _bits(weight.permute(0, 2, 3, 1), bitorder="little").view(np.int32)
    x = tensor("x", (batch, case.size, case.size, case.in_channels), floats)
    packed = tensor("packed", (batch, case.size, case.size, case.in_channels // 32), integers)
    y = tensor("y", (batch, case.out_size, case.out_size, filters), floats)
    constants = [
        tensor("kernel", kernel.shape, integers, kernel),
        tensor("scale", (filters,), floats, np.ones(filters, np.float32)),
        tensor("bias", (filters,), floats, np.zeros(filters, np.float32)),
    ]
    options = flexbuffers.Builder()
    with options.Map():
        for name in ("stride_height", "stride_width", "dilation_height_factor", "dilation_width_factor"):
            options.Int(name, 1)
        for name in ("padding", "pad_values", "fused_activation_function"):  # as large as the input, zeros, none
            options.Int(name, 0)
        options.Int("channels_in", case.in_channels)
    model.operatorCodes, graph.operators = [], []
    for name, inputs, output, settings in (
        ("LceQuantize", [x], packed, b""),
        ("LceBconv2d", [packed, *constants, -1], y, bytes(options.Finish())),
    ):
        code, operator = schema.OperatorCodeT(), schema.OperatorT()
        code.builtinCode = code.deprecatedBuiltinCode = schema.BuiltinOperator.CUSTOM
        code.customCode, code.version = name, 1
        operator.opcodeIndex, operator.inputs, operator.outputs = len(model.operatorCodes), inputs, [output]
        operator.customOptions = np.frombuffer(settings, np.uint8) if settings else None
        model.operatorCodes.append(code)
        graph.operators.append(operator)
    graph.inputs, graph.outputs, graph.name = [x], [y], "main"
    model.version, model.description, model.subgraphs = 3, "layer", [graph]
    builder = flatbuffers.Builder(4096)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


_LARQ = ("larq_compute_engine", "ai_edge_litert")
BINARY = {
    "linear": (
        Implementation(
            "NumKong packed",
            "binary",
            "binary",
            _numkong,
            needs=("numkong",),
            follows_batch=True,
            threads=1,
            result=_dots,
        ),
    ),
    "conv": (
        Implementation(
            "Larq Compute Engine", "binary", "binary", _larq, needs=_LARQ, follows_batch=True, result=_channels_first
        ),
    ),
}
