"""What layers share whose weights are signs: tensors, dense weight, state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from tersetorch import ops
from tersetorch.formats import SignWeight
from tersetorch.nn.dense_form import DenseForm
from tersetorch.nn.shared_module import records
from tersetorch.ops._floats import FLOATS, computable, either, floats_beside

PIXEL_INPUTS = ("pixels", "signed_pixels")
INPUTS = ("signs", "real", *PIXEL_INPUTS)
PIXELS = 255


class SignModule(DenseForm[Any]):
    """A layer over a weight of signs: dot is the product of them with the signs of its input, an exact integer.

    Its output is fma(dot, scale, bias), or, with thresholds, the packed signs that are +1 where dot >= threshold, for
    the next such layer. With inputs="real" it has gradients of its input, and no others: train what it was made from.
    All its tensors are buffers: bits int64 as the kernel has them, scale and bias float32 [rows] or None, thresholds
    int32 [rows] or None. They keep their dtypes under .half(), .bfloat16() and .double(); these change dtype, that of y
    where the input is packed signs.

    batched is True where a conversion gave the layer the work of a BatchNorm1d that sees [N, features], or where a
    flatten(1) behind it sees packed images [N, H, W, words]: samples then lie along the first dimension of input, and
    one more or less is refused, since the decisions would be those of other numbers.
    """

    inputs: str = "signs"
    batched: bool = False

    bits: Tensor
    scale: Tensor | None
    bias: Tensor | None
    thresholds: Tensor | None

    def __init__(
        self, weight: SignWeight, bias: Tensor | None, thresholds: Tensor | None, dtype: torch.dtype, **sizes: Any
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if not isinstance(weight, SignWeight):
            raise TypeError(f"{name}: weight must be a SignWeight, got {type(weight).__name__}; call from_dense")
        weight.validate()
        _check_numbers(name, bias, thresholds, weight.shape[0])
        scale = weight.scale
        if thresholds is not None and (scale is not None or bias is not None):
            raise ValueError(
                f"{name}: thresholds stand in for scale and bias, got them together; fold these into the thresholds"
            )
        self.batched = False
        self._take_sizes(weight, **sizes)
        self._take_dtype(dtype)
        self._hold(weight, None if bias is None else bias.detach().float(), thresholds)

    def _take_dtype(self, dtype: torch.dtype) -> None:
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise TypeError(f"{type(self).__name__}: dtype must be a floating-point dtype, got {dtype}; pass float32")
        self.dtype = dtype

    def _take_inputs(self, inputs: str) -> None:
        """Notes what the weight multiplies, checked."""
        if inputs not in INPUTS:
            raise ValueError(
                f"{type(self).__name__}: inputs must be one of {list(INPUTS)}, got {inputs!r}; choose one of them"
            )
        self.inputs = inputs

    def _take_sizes(self, weight: SignWeight, **sizes: Any) -> None:
        """Notes a weight's sizes and those that the constructor was given, checked."""
        raise NotImplementedError

    def _hold(self, weight: SignWeight, bias: Tensor | None, thresholds: Tensor | None) -> None:
        if self.inputs == "real" and thresholds is not None:
            raise ValueError(
                f'{type(self).__name__}: thresholds need inputs="signs", got "real"; leave one of them out'
            )
        self._channels, self.taps = weight.channels, weight.taps
        held = {"bits": self._packed(weight.bits), "scale": weight.scale, "bias": bias, "thresholds": thresholds}
        # None last: torch.export counts the others by their places.
        for field in sorted(held, key=lambda field: held[field] is None):
            self.register_buffer(field, held[field])

    def fold_(self, thresholds: Tensor, negated: Tensor) -> None:
        """Takes thresholds int32 [rows] in the place of scale and bias, for the other signs in rows negated, bool."""
        weight = replace(self.sign_weight.turned(negated), scale=None)
        self._buffers.clear()
        self._hold(weight, None, thresholds)

    def scale_(self, scale: Tensor, bias: Tensor) -> None:
        """Takes float32 [rows] in the place of scale and bias."""
        weight = replace(self.sign_weight, scale=scale)
        self._buffers.clear()
        self._hold(weight, bias, None)

    def _packed(self, bits: Tensor) -> Tensor:
        """Bits [rows, taps, words] as the kernel takes them."""
        raise NotImplementedError

    def _unpacked(self, bits: Tensor) -> Tensor:
        """The same, back."""
        raise NotImplementedError

    @property
    def layout(self) -> str:
        """What the weight multiplies, under the name that other layers have for how they compute."""
        return self.inputs

    @property
    def plain_layout(self) -> str:
        """The same: it is decided where the layer is made."""
        return self.inputs

    @property
    def sign_weight(self) -> SignWeight:
        """The weight in its format."""
        return SignWeight(self._unpacked(self.bits), self._channels, self.scale)

    @property
    def weight(self) -> Tensor:
        """The dense weight, built anew at every read; writing to it changes nothing."""
        return self.sign_weight.to_dense().view(self.weight_shape)

    @property
    def negative(self) -> Tensor:
        """Which weights are -1, bool of weight's shape."""
        return self.sign_weight.negative().view(self.weight_shape)

    def packed(self, negative: Tensor) -> Tensor:
        """Signs, bool of weight's shape, True for -1, and on the CPU, as this layer's bits have them."""
        rows = negative.reshape(self.weight_shape[0], self.weight_shape[1:].numel())
        return self._packed(SignWeight.from_signs(rows, self.taps).bits)

    def validate(self) -> None:
        """Checks what the kernels rely on.

        Raises:
            TypeError, ValueError: a tensor has another dtype or shape than the class names, or an unused bit is 1.
        """
        self.sign_weight.validate()
        _check_numbers(type(self).__name__, self.bias, self.thresholds, self.weight_shape[0])

    def _config(self) -> dict[str, Any]:
        return {
            **({"scale": True} if self.scale is not None else {}),
            **({} if self.bias is not None else {"bias": False}),
            **({"thresholds": True} if self.thresholds is not None else {}),
            **({} if self.inputs == "signs" else {"inputs": self.inputs}),
            **({"batched": True} if self.batched else {}),
            **({} if self.dtype == torch.float32 else {"dtype": str(self.dtype).removeprefix("torch.")}),
        }

    @classmethod
    def _zeros(
        cls,
        shape: tuple[int, int, int],
        scale: bool,
        bias: bool,
        thresholds: bool,
        batched: bool,
        dtype: str,
        **sizes: Any,
    ) -> Self:
        """A layer over zeros for rows of taps of channels, on any device, whose numbers come from elsewhere."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        rows, taps, channels = shape
        layer.batched = batched
        layer._take_dtype(getattr(torch, dtype))
        bits = torch.zeros(rows, taps, -(-channels // 64), dtype=torch.int64)
        numbers = [torch.zeros(rows) if wanted else None for wanted in (scale, bias)]
        weight = SignWeight(bits, channels, numbers[0])
        layer._take_sizes(weight, **sizes)
        layer._hold(weight, numbers[1], torch.zeros(rows, dtype=torch.int32) if thresholds else None)
        return layer

    def _filled(self, dense: Any) -> Any:
        """It with this one's weight and bias, of dtype."""
        dense.weight = nn.Parameter(self.weight.to(self.dtype))
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.to(self.dtype, copy=True))
        return dense.train(self.training)

    def _checked(self, x: object) -> Tensor:
        """Refuses what is no tensor of floats or packed signs; what it is computed with."""
        if not isinstance(x, Tensor):
            raise TypeError(
                f"{type(self).__name__}: input must be a tensor, got {type(x).__name__}; pass a torch.Tensor"
            )
        x = computable(x)
        floats = floats_beside(x)
        if x.dtype in floats:
            return x
        name = type(self).__name__
        if self.inputs == "real":
            got = "packed signs; unpack" if x.dtype == torch.int64 else f"{x.dtype}; convert it"
            raise TypeError(f'{name}: input must be {either(floats)} for inputs="real", got {got}')
        other = (torch.int64, "packed signs, int64") if self.inputs == "signs" else (torch.uint8, "uint8")
        if x.dtype != other[0]:
            raise TypeError(f"{name}: input must be {either(floats, other[1])}, got {x.dtype}; convert it")
        return x

    def unit_scale(self) -> Tensor | None:
        """The scale of the integer product, float32 [rows], or None for 1: of pixels it counts 255ths."""
        if self.inputs not in PIXEL_INPUTS:
            return self.scale
        ones = torch.ones(self.weight_shape[0], device=self.bits.device) if self.scale is None else self.scale
        return ones / PIXELS

    def _pixels(self, x: Tensor) -> tuple[Tensor, int, int]:
        """Pixels uint8, of floats the nearest, and the step and zero that ops.bitplane_matmul takes with them."""
        step, zero = (2, PIXELS) if self.inputs == "signed_pixels" else (1, 0)
        if x.dtype != torch.uint8:
            # In float32, since bfloat16 does not hold all 256.
            x = ((x.float() * PIXELS + zero) / step).round_().clamp_(0, PIXELS).to(torch.uint8)
        return x, step, zero

    def off_pixels(self, x: Tensor) -> float:
        """The largest distance of x, floats, from what a layer of pixels takes it for."""
        pixels, step, zero = self._pixels(x)
        return float((x.float() - (pixels.float() * step - zero) / PIXELS).abs().max())

    def _products(self, x: Tensor) -> Tensor:
        """Those of numbers [..., columns] with the rows of the weight, [..., rows] of x's dtype."""
        rows = self.weight_shape[0]
        if not records():
            return ops.sign_matmul_inference(x, self.bits, rows, self.scale, self.bias)
        return ops.sign_matmul(x, self.bits, out_features=rows, scale=self.scale, bias=self.bias)

    def _finished(self, y: Tensor, given: torch.dtype) -> Tensor:
        """What the op returned as the layer does: packed signs, or floats of a float input's dtype."""
        dtype = given if given.is_floating_point else self.dtype
        return y if y.dtype in (torch.int64, dtype) else y.to(dtype)

    def _shown(self) -> list[str]:
        shown = [f"bias={self.bias is not None}"]
        shown += ["scale=True"] * (self.scale is not None) + ["thresholds=True"] * (self.thresholds is not None)
        shown += [f"inputs={self.inputs}"] * (self.inputs != "signs") + ["batched=True"] * self.batched
        return shown + [f"dtype={self.dtype}"] * (self.dtype != torch.float32)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = {name: self._buffers[name] for name in ("scale", "bias")}
        # A memory format is for images: .to would lay bits of four or five dimensions out anew, or fail.
        bits, flat = self.bits, self.bits.flatten()
        self.bits = flat
        super()._apply(fn, recurse)
        self.bits = bits if self.bits is flat else self.bits.view(bits.shape)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.bits.device)).dtype
        for name, was in before.items():
            now = self._buffers[name]
            if was is not None and now is not None and now.dtype != was.dtype:
                self._buffers[name] = was.to(now.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """As nn.Module's, but that bits must be those of a weight."""
        errors: list[str] = args[-1]
        bits = state_dict.get(prefix + "bits")
        if isinstance(bits, Tensor) and bits.shape == self.bits.shape:
            try:
                SignWeight(self._unpacked(bits), self._channels).validate()
            except (TypeError, ValueError) as error:
                errors.append(f"{prefix.removesuffix('.') or type(self).__name__}: {error}")
                return
        super()._load_from_state_dict(state_dict, prefix, *args)


def _check_numbers(name: str, bias: object, thresholds: object, rows: int) -> None:
    for field, tensor, dtypes in (("bias", bias, FLOATS), ("thresholds", thresholds, (torch.int32,))):
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor) or tensor.dtype not in dtypes:
            allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name}: {field} must be {allowed}, got {got}; convert it")
        if tuple(tensor.shape) != (rows,):
            raise ValueError(
                f"{name}: {field} must be [{rows}], one for each row of the weight, got shape {tuple(tensor.shape)}; "
                "pass that of the same layer"
            )
