"""Graphs of one input and one output in onnxruntime and openvino, ready to run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

# Takes the input, returns what is timed.
Bind = Callable[[Tensor], Callable[[], Any]]


def onnxruntime_graph(nodes: Sequence[Any], weights: Mapping[str, Tensor], shape: Sequence[int], threads: int) -> Bind:
    """Nodes from "x", float32 of this shape, to "y"."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weight.numpy(), name) for name, weight in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")  # its threads would disturb the next call
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def bind(x: Tensor) -> Callable[[], Any]:
        feed = {"x": x.numpy()}
        return lambda: session.run(None, feed)[0]

    return bind


def openvino_graph(x: Any, y: Any, threads: int) -> Bind:
    """From parameter x, float32, to y."""
    import openvino

    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": 1}
    request = openvino.compile_model(openvino.Model([y], [x]), "CPU", settings).create_infer_request()

    def bind(x: Tensor) -> Callable[[], Any]:
        feed = [x.numpy()]
        return lambda: request.infer(feed, share_inputs=True, share_outputs=True)[0]

    return bind
