"""Weights of few bits as other libraries multiply by them on a CPU.

Their forms differ, and how one of them quantises is not what is timed: each holds random codes of the case's shape,
with the same scale everywhere, and its results are held against what those stand for.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from .cases import Case
from .implementations import Implementation, Packed

# What dense layers coded ones are shown beside, by the beginnings of their names.
DENSE = ("torch F.linear", "oneDNN packed", "torch dynamic int8", "openvino")
# Batches that a slow peer is timed with.
FEW = (1, 8)
BLOCK, GROUP = 64, 128  # weights that share a scale in NF4, and in torchao's int4


def _codes(case: Case, entries: int) -> Tensor:
    return torch.randint(entries, case.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def _nf4(case: Case, weight: Tensor, batch: int, threads: int) -> Packed:
    import bitsandbytes
    from bitsandbytes.functional import QuantState, dequantize_4bit, get_4bit_type

    codes = _codes(case, 256).view(-1, 1)[: weight.numel() // 2]
    scales = torch.full((weight.numel() // BLOCK,), weight.std().item())
    table = get_4bit_type("nf4", device="cpu")
    state = QuantState(scales, weight.shape, table, BLOCK, "nf4", torch.bfloat16)

    def bind(x: Tensor) -> Callable[[], Tensor]:
        samples = x.bfloat16()
        return lambda: bitsandbytes.matmul_4bit(samples, codes.t(), quant_state=state)

    return Packed(bind, codes.nbytes + scales.nbytes, dequantize_4bit(codes, state).float())


def _int4(case: Case, weight: Tensor, batch: int, threads: int) -> Packed:
    """The kernel takes bfloat16 samples; with float32 ones it is 36 times as slow."""
    from torchao.prototype.quantization.int4.int4_opaque_tensor import Int4OpaqueTensor

    codes = _codes(case, 16).int()
    rows, columns = codes.shape
    scale = (weight.std() / 4).bfloat16()
    scales = torch.stack([scale, torch.zeros_like(scale)]).expand(columns // GROUP, rows, 2).contiguous()
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    tensor: Any = Int4OpaqueTensor(packed, scales, [1, GROUP], weight.shape)

    def bind(x: Tensor) -> Callable[[], Tensor]:
        samples = x.bfloat16()
        return lambda: functional.linear(samples, tensor)

    return Packed(bind, weight.numel() // 2 + scales.nbytes, (codes - 8) * scale.float())


def _dynamic_int8(case: Case, weight: Tensor, batch: int, threads: int) -> Packed:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    layer: Any = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantize_(layer, Int8DynamicActivationInt8WeightConfig(version=2))
    nbytes = layer.weight.qdata.nbytes + layer.weight.scale.nbytes
    return Packed(lambda x: lambda: layer(x), nbytes, layer.weight.dequantize())


def _codebook(case: Case, weight: Tensor, batch: int, threads: int) -> Packed:
    from torchao.prototype.quantization.codebook.codebook_quantized_tensor import CodebookQuantizedTensor

    codes = _codes(case, 16)
    table = weight.std() * torch.linspace(-2, 2, 16)
    # Blocks are of one weight each, and each row has a scale.
    scales = torch.ones(len(weight), 1, 1)
    tensor: Any = CodebookQuantizedTensor(codes, table.view(-1, 1, 1), (1, 1), scales, weight.shape, dtype=weight.dtype)
    nbytes = codes.nbytes + table.nbytes + scales.nbytes
    return Packed(lambda x: lambda: functional.linear(x, tensor), nbytes, table[codes.int()])


def _llama(name: str) -> Callable[[Case, Tensor, int, int], Packed]:
    """A product as llama.cpp computes it, the weight laid out as it lays weights out for this CPU."""

    def pack(case: Case, weight: Tensor, batch: int, threads: int) -> Packed:
        import gguf

        ggml = _ggml()
        kind = gguf.GGMLQuantizationType[name]
        rows, columns = weight.shape
        # Blocks of 32 weights: a scale in half precision, and 16 bytes of codes.
        blocks = np.empty((rows, columns // 32, 18), np.uint8)
        blocks[..., :2] = np.array([1 / 16], np.float16).view(np.uint8)
        blocks[..., 2:] = _codes(case, 256)[:, : columns // 2].view(rows, -1, 16).numpy()
        codes = blocks.reshape(rows, -1)
        held = torch.from_numpy(gguf.dequantize(codes, kind))
        stored = ggml.weight(kind.value, codes, rows, columns)

        def bind(x: Tensor) -> Callable[[], Any]:
            return ggml.product(stored, x.numpy(), rows, threads)

        return Packed(bind, codes.nbytes, held)

    return pack


def _ggml_folder() -> Path | None:
    """Where a Python package has put llama.cpp's libraries."""
    spec = find_spec("llama_cpp")
    folders = (Path(place) / "lib" for place in (spec and spec.submodule_search_locations) or ())
    return next((folder for folder in folders if (folder / "libggml-cpu.so").is_file()), None)


@cache
def _ggml() -> _Ggml:
    folder = _ggml_folder()
    if folder is None:
        raise RuntimeError("llama_cpp came without libggml-cpu.so")
    return _Ggml(folder)


class _Parameters(ctypes.Structure):
    _fields_ = (("size", ctypes.c_size_t), ("buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class _Stored:
    """A weight in ggml's memory."""

    def __init__(self, tensor: int, release: Callable[[], None]) -> None:
        self.tensor = tensor
        self._release = release

    def __del__(self) -> None:
        self._release()


class _Ggml:
    """The few calls of ggml's C interface that one product takes."""

    def __init__(self, folder: Path) -> None:
        base = ctypes.CDLL(str(folder / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
        cpu = ctypes.CDLL(str(folder / "libggml-cpu.so"), mode=ctypes.RTLD_GLOBAL)
        pointer, size, integer = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64
        signatures: dict[str, tuple[Any, ...]] = {
            "init": (pointer, _Parameters),
            "free": (None, pointer),
            "new_tensor_2d": (pointer, pointer, ctypes.c_int, integer, integer),
            "mul_mat": (pointer, pointer, pointer, pointer),
            "new_graph": (pointer, pointer),
            "build_forward_expand": (None, pointer, pointer),
            "get_data": (pointer, pointer),
            "log_set": (None, pointer, pointer),
            "backend_graph_compute": (ctypes.c_int, pointer, pointer),
            "backend_alloc_ctx_tensors_from_buft": (pointer, pointer, pointer),
            "backend_buffer_free": (None, pointer),
            "backend_tensor_set": (None, pointer, pointer, size, size),
            "backend_reg_get_proc_address": (pointer, pointer, ctypes.c_char_p),
            "backend_reg_dev_get": (pointer, pointer, size),
            "backend_cpu_buffer_type": (pointer,),
            "backend_cpu_init": (pointer,),
            "backend_cpu_set_n_threads": (None, pointer, ctypes.c_int),
            "backend_cpu_reg": (pointer,),
        }
        self._functions: dict[str, Any] = {}
        for name, (result, *arguments) in signatures.items():
            library = cpu if hasattr(cpu, f"ggml_{name}") else base
            function = getattr(library, f"ggml_{name}")
            function.restype, function.argtypes = result, arguments
            self._functions[name] = function
        self._silence = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
        self._call("log_set", self._silence, None)
        self._backend = self._call("backend_cpu_init")
        register = self._call("backend_cpu_reg")
        found = self._call("backend_reg_get_proc_address", register, b"ggml_backend_dev_get_extra_bufts")
        extra = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(found)
        device = self._call("backend_reg_dev_get", register, 0)
        # The first of the layouts of its own, where this CPU has one; plain rows else.
        self._layout = extra(device)[0] or self._call("backend_cpu_buffer_type")

    def weight(self, kind: int, codes: NDArray[np.uint8], rows: int, columns: int) -> _Stored:
        """The same in its memory, laid out anew."""
        context = self._context()
        tensor = self._call("new_tensor_2d", context, kind, columns, rows)
        buffer = self._call("backend_alloc_ctx_tensors_from_buft", context, self._layout)
        self._call("backend_tensor_set", tensor, codes.ctypes.data, 0, codes.nbytes)
        return _Stored(tensor, lambda: self._free(buffer, context))

    def product(self, weight: _Stored, x: NDArray[np.float32], rows: int, threads: int) -> Callable[[], Any]:
        """The call that multiplies samples with it."""
        context = self._context()
        samples = self._call("new_tensor_2d", context, 0, x.shape[1], x.shape[0])
        y = self._call("mul_mat", context, weight.tensor, samples)
        graph = self._call("new_graph", context)
        self._call("build_forward_expand", graph, y)
        buffer = self._call("backend_alloc_ctx_tensors_from_buft", context, self._call("backend_cpu_buffer_type"))
        kept = (weight, _Stored(y, lambda: self._free(buffer, context)))
        where = ctypes.cast(self._call("get_data", y), ctypes.POINTER(ctypes.c_float))
        result = np.ctypeslib.as_array(where, (x.shape[0], rows))
        ctypes.memmove(self._call("get_data", samples), x.ctypes.data, x.nbytes)
        return partial(self._run, graph, result, threads, kept)

    def _run(self, graph: int, result: NDArray[np.float32], threads: int, kept: object) -> NDArray[np.float32]:
        self._call("backend_cpu_set_n_threads", self._backend, threads)
        if self._call("backend_graph_compute", self._backend, graph):
            raise RuntimeError("ggml did not compute the product")
        return result

    def _context(self) -> Any:
        return self._call("init", _Parameters(1 << 20, None, True))

    def _free(self, buffer: int, context: int) -> None:
        self._call("backend_buffer_free", buffer)
        self._call("free", context)

    def _call(self, name: str, *arguments: Any) -> Any:
        return self._functions[name](*arguments)


_AO = ("torchao",)
_LLAMA = ("gguf", "llama_cpp")
CODED = (
    Implementation("bitsandbytes NF4", "coded", "bfloat16", _nf4, needs=("bitsandbytes",), batches=FEW),
    Implementation("torchao int4", "coded", "bfloat16", _int4, needs=_AO, batches=(1, 64)),
    Implementation("torchao int8 dynamic", "coded", "int8", _dynamic_int8, needs=_AO, batches=FEW),
    Implementation("torchao codebook", "coded", "float32", _codebook, needs=_AO, batches=(1, 1)),
    Implementation("llama.cpp Q4_0", "coded", "int8", _llama("Q4_0"), needs=_LLAMA),
    Implementation("llama.cpp IQ4_NL", "coded", "int8", _llama("IQ4_NL"), needs=_LLAMA),
)
