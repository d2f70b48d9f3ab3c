"""The int8 modules of torch.ao.quantization: what their packed weights hold, and the float layers they came from."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.nn import quantized
from torch.ao.nn.intrinsic import quantized as fused
from torch.ao.nn.intrinsic.quantized import dynamic as fused_dynamic
from torch.ao.nn.quantized import dynamic

from tersetorch.storage.importers.quantized_weight import QuantizedWeight
from tersetorch.storage.importers.refusal import refuse

CONVOLUTIONS: dict[type[nn.Module], type[nn.Module]] = {
    quantized.Conv1d: nn.Conv1d,
    quantized.Conv2d: nn.Conv2d,
    quantized.Conv3d: nn.Conv3d,
    fused.ConvReLU1d: nn.Conv1d,
    fused.ConvReLU2d: nn.Conv2d,
    fused.ConvReLU3d: nn.Conv3d,
}
LINEARS = (quantized.Linear, dynamic.Linear, fused.LinearReLU, fused_dynamic.LinearReLU)
WITH_RELU = (fused.ConvReLU1d, fused.ConvReLU2d, fused.ConvReLU3d, fused.LinearReLU, fused_dynamic.LinearReLU)
# Modules without weights, and what stands in their place.
PLAIN: dict[type[nn.Module], type[nn.Module]] = {
    quantized.Quantize: nn.Identity,
    quantized.DeQuantize: nn.Identity,
    quantized.Dropout: nn.Identity,
    quantized.QFunctional: quantized.FloatFunctional,
    quantized.FloatFunctional: quantized.FloatFunctional,
    quantized.ReLU6: nn.ReLU6,
    quantized.Hardswish: nn.Hardswish,
    quantized.Sigmoid: nn.Sigmoid,
}
KNOWN = {*CONVOLUTIONS, *LINEARS, quantized.Embedding, quantized.EmbeddingBag, *PLAIN}
PACKAGES = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torch.ao.nn.quantizable")
PACKED_LINEAR, PACKED_EMBEDDING = "_packed_params._packed_params", "_packed_params._packed_weight"


def is_quantized_module(module: nn.Module) -> bool:
    """Whether module is one of torch.ao's that compute with quantised tensors, known here or not."""
    return type(module).__module__.startswith(PACKAGES)


def read_quantized_tensor(name: str, tensor: Tensor) -> QuantizedWeight:
    """The codes and tables of a quantised tensor: entry c of a table is float32((c + least - zero point) scale).

    Per channel the product is taken in double precision, as torch does, per tensor in single precision; with float
    zero points (embeddings) in single precision.

    Raises:
        ValueError: its integers are not 8 bits wide, or a scale is not finite.
    """
    if tensor.dtype not in (torch.qint8, torch.quint8):
        refuse(f"hold 8-bit integers in {name!r}", tensor.dtype)
    integers = tensor.int_repr()
    least = -128 if tensor.dtype == torch.qint8 else 0
    values = torch.arange(least, least + 256)
    scheme = tensor.qscheme()
    if scheme in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        scale = torch.tensor([tensor.q_scale()], dtype=torch.float32)
        codebook = (values - tensor.q_zero_point()).float()[None] * scale[:, None]
        run = max(1, tensor.numel())
    else:
        scale, zero = tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()
        codebook = ((values - zero[:, None]) * scale[:, None]).float()
        run = max(1, prod(tensor.shape[tensor.q_per_channel_axis() + 1 :]))
    if not bool(scale.isfinite().all()):
        refuse(f"hold finite scales of {name!r}", "NaN or infinity")
    codes = integers.contiguous() if least == 0 else (integers.contiguous().short() + 128).to(torch.uint8)
    return QuantizedWeight(codes, codebook, run)


def read_state(state: Mapping[str, object]) -> tuple[dict[str, Tensor | QuantizedWeight], set[str]]:
    """Weights and biases of the state dict of a converted model, and the names that were read.

    A linear layer keeps the tuple of both in one entry, an embedding its packed weight, a convolution a quantised
    tensor. Scales and zero points of activations are read and left out.

    Raises:
        ValueError: an entry holds something else.
    """
    found: dict[str, Tensor | QuantizedWeight] = {}
    used: set[str] = set()
    for name, value in state.items():
        if name.endswith(PACKED_LINEAR):
            stem = name.removesuffix(PACKED_LINEAR)
            if not isinstance(value, tuple) or len(value) != 2 or not isinstance(value[0], Tensor):
                refuse(f"hold a weight and a bias in {name!r}", f"{type(value).__name__}")
            weight, bias = value
            found[f"{stem}weight"] = _weight(f"{stem}weight", weight)
            if bias is not None:
                found[f"{stem}bias"] = bias.detach()
            used |= {name, f"{stem}_packed_params.dtype"}
        elif name.endswith(PACKED_EMBEDDING) and isinstance(value, Tensor):
            stem = name.removesuffix(PACKED_EMBEDDING)
            found[f"{stem}weight"] = _weight(f"{stem}weight", value)
            used |= {name, f"{stem}_packed_params.dtype"}
        elif isinstance(value, Tensor) and value.is_quantized:
            found[name] = _weight(name, value)
            used.add(name)
            bias = f"{name.removesuffix('weight')}bias"
            if state.get(bias, value) is None:  # a convolution's that has none
                used.add(bias)
    if found:
        for name, zero in state.items():
            stem = name.removesuffix("zero_point")
            if stem != name and f"{stem}scale" in state and isinstance(zero, Tensor) and zero.numel() == 1:
                used |= {name, f"{stem}scale"}
    return found, used


def _weight(name: str, weight: Tensor) -> Tensor | QuantizedWeight:
    return read_quantized_tensor(name, weight) if weight.is_quantized else weight.detach()


def check_module(name: str, module: nn.Module) -> None:
    """Refuses a module of torch.ao that float_module has no layer for.

    Raises:
        ValueError: module is one.
    """
    if is_quantized_module(module) and type(module) not in KNOWN and not type(module).__name__.endswith("PackedParams"):
        refuse(
            "hold linear, convolutional and embedding layers as torch.ao's only quantised ones",
            f"{type(module).__module__}.{type(module).__qualname__} as {name!r}",
            "quantise no others",
        )


def float_module(module: nn.Module, weight: Tensor | None, bias: Tensor | None) -> nn.Module:
    """The float layer in the place of module, with this weight and bias.

    Layers with a fused ReLU become nn.Sequential(layer, nn.ReLU()), the stubs nn.Identity and QFunctional
    torch.ao.nn.quantized.FloatFunctional; the scales of activations are left out.
    """
    kind: type[Any] = type(module)
    if kind in PLAIN:
        return PLAIN[kind]().train(module.training)
    assert weight is not None
    given: Any = module
    layer: nn.Module
    if kind in LINEARS:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    elif kind in CONVOLUTIONS:
        layer = CONVOLUTIONS[kind](
            given.in_channels,
            given.out_channels,
            given.kernel_size,
            stride=given.stride,
            padding=given.padding,
            dilation=given.dilation,
            groups=given.groups,
            bias=bias is not None,
            padding_mode=given.padding_mode,
            device="meta",
        )
    elif kind is quantized.EmbeddingBag:  # which sums, whatever mode it was made with
        rows, columns = weight.shape
        ends = given.include_last_offset
        layer = nn.EmbeddingBag(rows, columns, mode="sum", include_last_offset=ends, device="meta")
    else:
        layer = nn.Embedding(weight.shape[0], weight.shape[1], device="meta")
    layer.weight = nn.Parameter(weight)
    if bias is not None:
        layer.bias = nn.Parameter(bias)
    whole = nn.Sequential(layer, nn.ReLU()) if kind in WITH_RELU else layer
    return whole.train(module.training)
