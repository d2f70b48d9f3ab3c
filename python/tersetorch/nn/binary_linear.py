"""A linear layer of signs."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from tersetorch import ops
from tersetorch.formats import SignWeight
from tersetorch.nn.dense_form import LinearSizes
from tersetorch.nn.sign_module import SignModule

_xnor_matmul = ops.native_op("xnor_matmul")
_bitplane_matmul = ops.native_op("bitplane_matmul")


class BinaryLinear(LinearSizes, SignModule):
    """y = scale * (W . sign(input)) + bias with W of signs, computed as bits; sign(0) is +1 and sign(NaN) -1.

    With inputs="real" it is y = scale * (W . input) + bias, by additions and subtractions; only that has gradients, of
    input. With inputs="pixels" input is numbers k / 255 of images, k from 0 to 255, with "signed_pixels" 2 k / 255 - 1:
    floats, of which the nearest k counts, or uint8, the k themselves. 255 * W . input is an exact integer there.

    Shapes: input float32 or bfloat16 [..., in_features], of which only the signs count -> y [..., out_features] of
    input's dtype, or packed signs with thresholds: int64 [..., ceil(out_features / 64)]. input may be packed signs
    itself, int64 [..., taps * ceil(in_features / taps / 64)]: what ops.sign_pack or a layer with thresholds returns,
    the flattened image of a convolution's too; y is of dtype then. The product is an exact integer, and y = fma(dot,
    scale, bias).

    Args:
        weight: the weight; with several taps, the one behind a flattened image.
        bias: float [out_features], or None.
        thresholds: int32 [out_features], instead of bias and of the weight's scale: y is the packed signs that are +1
            where the product is at least the threshold.
        inputs: "signs"; "real" for numbers that are multiplied as they are: float32 or bfloat16 only, sums in
            float32; "pixels" or "signed_pixels".
        dtype: of y where input is packed signs.

    Raises:
        TypeError: weight is not a SignWeight, or an argument has another type than named here.
        ValueError: weight is not valid, an argument does not fit it, or thresholds come with bias or scale.

    Source:
        Courbariaux et al., Binarized Neural Networks (2016), section 1.4; Rastegari et al., XNOR-Net (2016), section
        3.2, for the scale.
    """

    def __init__(
        self,
        weight: SignWeight,
        bias: Tensor | None = None,
        *,
        thresholds: Tensor | None = None,
        inputs: str = "signs",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(weight, bias, thresholds, dtype, inputs=inputs)

    def _take_sizes(self, weight: SignWeight, inputs: str = "signs", **sizes: Any) -> None:
        self._take_inputs(inputs)
        if inputs != "signs" and weight.taps != 1:
            raise ValueError(
                f"BinaryLinear: weight must have one tap for inputs={inputs!r}, got {weight.taps}; leave taps out"
            )
        self._set_sizes(weight.shape)

    def _packed(self, bits: Tensor) -> Tensor:
        return ops.xnor_pack(bits.flatten(1))

    def _unpacked(self, bits: Tensor) -> Tensor:
        rows: Tensor = ops.xnor_unpack(bits, self.out_features)
        return rows.view(self.out_features, self.taps, ops.sign_words(self._channels))

    @classmethod
    def from_dense(cls, module: nn.Linear, *, taps: int = 1, inputs: str = "signs") -> Self:
        """The layer that computes what module does: of inputs that are all +1 or -1, or with inputs="real" of any.

        Args:
            module: each row of its weight +a and -a for some a.
            taps: positions of the image [channels, height, width] that module's input is, flattened; needed where it
                comes as packed images, flattened.
            inputs: what they are, as the constructor takes it.

        Raises:
            TypeError: module is not an nn.Linear, or its weight is neither float32 nor bfloat16.
            ValueError: a row has other values, or taps does not divide its length.
        """
        cls._check_source(module)
        bias = None if module.bias is None else module.bias.detach()
        weight = SignWeight.from_dense(module.weight, taps)
        return cls(weight, bias, inputs=inputs, dtype=module.weight.dtype).train(module.training)

    @classmethod
    def of_sizes(
        cls,
        in_features: int,
        out_features: int,
        taps: int = 1,
        scale: bool = False,
        bias: bool = True,
        thresholds: bool = False,
        inputs: str = "signs",
        batched: bool = False,
        dtype: str = "float32",
    ) -> Self:
        """A layer of zeros, on any device, for tensors that come from elsewhere."""
        if taps < 1 or in_features % taps:
            raise ValueError(f"{cls.__name__}: taps must divide in_features {in_features}, got {taps}; pass positions")
        shape = (out_features, taps, in_features // taps)
        return cls._zeros(shape, scale, bias, thresholds, batched, dtype, inputs=inputs)

    def _own_sizes(self) -> dict[str, Any]:
        return {**super()._own_sizes(), **({"taps": self.taps} if self.taps != 1 else {})}

    def lay_out_(self, taps: int) -> None:
        """Lays the weight out for flattened packed images of so many positions."""
        weight, bias, thresholds = self.sign_weight, self.bias, self.thresholds
        self._buffers.clear()
        self._hold(SignWeight.from_signs(weight.negative(), taps, weight.scale), bias, thresholds)

    def forward(self, input: Tensor) -> Tensor:
        """Applies the layer to input, float [..., in_features], or packed signs."""
        given = input
        input = self._checked(input)
        if self.batched and input.dim() != 2:
            raise ValueError(
                f"BinaryLinear: input must be [N, {self.in_features}], since the layer computes the batch norm behind "
                f"it, of [N, {self.out_features}], got shape {tuple(input.shape)}; reshape it, or convert with such "
                "example_inputs"
            )
        if self.inputs != "signs":
            return self._products(input) if self.inputs == "real" else self._of_pixels(input, given.dtype)
        x = input
        if x.dtype != torch.int64 and self.taps > 1 and x.shape[-1] == self.in_features:
            x = ops.sign_pack(x.unflatten(-1, (self._channels, self.taps)).transpose(-1, -2)).flatten(-2)
        # Straight from the dictionary: nn.Module looks an attribute up for a third of a microsecond.
        held = self._buffers
        y: Tensor = _xnor_matmul(
            x, held["bits"], self.in_features, self.out_features, held["scale"], held["bias"], held["thresholds"]
        )
        return self._finished(y, given.dtype)

    def _of_pixels(self, x: Tensor, given: torch.dtype) -> Tensor:
        """The product with pixels, floats of which the nearest counts."""
        pixels, step, zero = self._pixels(x)
        held = self._buffers
        scale = None if held["thresholds"] is not None else self.unit_scale()
        y: Tensor = _bitplane_matmul(
            pixels,
            held["bits"],
            self.in_features,
            self.out_features,
            step,
            zero,
            scale,
            held["bias"],
            held["thresholds"],
        )
        return self._finished(y, given)
