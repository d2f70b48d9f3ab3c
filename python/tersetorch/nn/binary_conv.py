"""A convolution of signs."""

from __future__ import annotations

from math import prod
from typing import Any, Self

import torch
from torch import Tensor, nn

from tersetorch import ops
from tersetorch.formats import SignWeight
from tersetorch.nn.conv_sizes import ConvSizes, Sizes
from tersetorch.nn.sign_module import SignModule

_xnor_conv2d = ops.native_op("xnor_conv2d")


class BinaryConv2d(ConvSizes, SignModule):
    """y = scale * conv2d(sign(input), W) + bias with W of signs, computed as bits; sign(0) is +1 and sign(NaN) -1.

    Shapes: input float32 or bfloat16 [N, in_channels, H, W], of which only the signs count -> y [N, out_channels, H',
    W'] of input's dtype and memory format, or packed images with thresholds: int64 [N, H', W', ceil(out_channels /
    64)]. input may be packed images itself, as ops.sign_pack_images, a layer with thresholds or SignMaxPool2d returns
    them; y is of dtype then. All may lack N. The convolution is an exact integer, and y = fma(dot, scale, bias).

    Args:
        weight: the weight, with a tap for each position of the kernel.
        bias: float [out_channels], or None.
        kernel_size, stride, padding, dilation, groups: as torch.nn.Conv2d takes them; padding the same on both sides.
        padding_value: what input counts as outside: 0, which adds nothing to a sum, 1 or -1.
        thresholds: int32 [out_channels], instead of bias and of the weight's scale: y is the packed signs that are +1
            where the convolution is at least the threshold.
        dtype: of y where input is packed images.

    Raises:
        TypeError: weight is not a SignWeight, or an argument has another type than named here.
        ValueError: weight is not valid, an argument does not fit it, or thresholds come with bias or scale.

    Source:
        Rastegari et al., XNOR-Net (2016), section 3.2.
    """

    dense_type = nn.Conv2d
    dims = 2

    def __init__(
        self,
        weight: SignWeight,
        bias: Tensor | None = None,
        *,
        kernel_size: Sizes,
        stride: Sizes = 1,
        padding: Sizes | str = 0,
        dilation: Sizes = 1,
        groups: int = 1,
        padding_value: int = 0,
        thresholds: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(
            weight,
            bias,
            thresholds,
            dtype,
            kernel_size=kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            padding_value=padding_value,
        )

    def _take_sizes(self, weight: SignWeight, padding_value: int = 0, **sizes: Any) -> None:
        self._set_sizes(weight.shape, **sizes, padding_mode="zeros")
        if weight.taps != prod(self.kernel_size):
            raise ValueError(
                f"BinaryConv2d: weight must have {prod(self.kernel_size)} taps, the positions of kernel_size "
                f"{self.kernel_size}, got {weight.taps}; pass taps= to SignWeight.from_dense"
            )
        if self._pad_first:
            raise ValueError(
                f"BinaryConv2d: padding must be the same on both sides, got {self.padding!r} for kernel_size "
                f"{self.kernel_size}; pad by numbers"
            )
        if padding_value not in (0, 1, -1):
            raise ValueError(f"BinaryConv2d: padding_value must be 0, 1 or -1, got {padding_value!r}; choose one")
        self.padding_value = padding_value

    def _packed(self, bits: Tensor) -> Tensor:
        return ops.xnor_conv2d_pack(bits.unflatten(1, self.kernel_size), self.groups)

    def _unpacked(self, bits: Tensor) -> Tensor:
        return ops.xnor_conv2d_unpack(bits, self.out_channels, self.groups).flatten(1, 2)

    @staticmethod
    def why_not(module: nn.Conv2d) -> str | None:
        """Why from_dense refuses the sizes of a layer, or None."""
        if module.padding_mode != "zeros":
            return f"padding_mode {module.padding_mode!r}"
        uneven = module.padding == "same" and any(
            d * (k - 1) % 2 for k, d in zip(module.kernel_size, module.dilation, strict=True)
        )
        return "more padding on one side than on the other" if uneven else None

    @classmethod
    def from_dense(cls, module: nn.Conv2d) -> Self:
        """The layer that computes what module does of inputs that are all +1 or -1.

        Args:
            module: each of its filters +a and -a for some a.

        Raises:
            TypeError: module is not an nn.Conv2d, or its weight is neither float32 nor bfloat16.
            ValueError: a filter has other values, or padding is not of zeros, as many on both sides.
        """
        cls._check_source(module)
        reason = cls.why_not(module)
        if reason is not None:
            raise ValueError(f"{cls.__name__}: module must pad both sides by as many zeros, got {reason}; pad first")
        weight = SignWeight.from_dense(module.weight.flatten(1), prod(module.kernel_size))
        layer = cls(
            weight,
            None if module.bias is None else module.bias.detach(),
            kernel_size=module.kernel_size,
            stride=module.stride,
            padding=module.padding,
            dilation=module.dilation,
            groups=module.groups,
            dtype=module.weight.dtype,
        )
        return layer.train(module.training)

    @classmethod
    def of_sizes(
        cls,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        stride: Sizes = 1,
        padding: Sizes | str = 0,
        dilation: Sizes = 1,
        groups: int = 1,
        padding_value: int = 0,
        scale: bool = False,
        bias: bool = True,
        thresholds: bool = False,
        dtype: str = "float32",
    ) -> Self:
        """A layer of zeros, on any device, for tensors that come from elsewhere."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._zeros(
            (out_channels, prod(layer._checked_sizes("kernel_size", kernel_size, 1)), in_channels // max(1, groups)),
            scale,
            bias,
            thresholds,
            dtype,
            kernel_size=kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            padding_value=padding_value,
        )
        return layer

    @property
    def sizes(self) -> dict[str, Any]:
        """What of_sizes takes to make a layer of the same sizes and options."""
        usual = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1, "padding_value": 0}
        own = {name: getattr(self, name) for name in ("in_channels", "out_channels", "kernel_size")}
        changed = {name: getattr(self, name) for name in usual if getattr(self, name) != usual[name]}
        return {**own, **changed, **self._config()}

    @property
    def weight_shape(self) -> torch.Size:
        """The shape of the dense weight."""
        return torch.Size((self.out_channels, self.in_channels // self.groups, *self.kernel_size))

    def to_dense(self) -> nn.Conv2d:
        """The plain layer with the same weight and bias: it computes what a layer without thresholds does of signs.

        Raises:
            ValueError: padding_value is not 0, which no plain layer pads with.
        """
        if self.padding_value:
            raise ValueError(
                f"BinaryConv2d: padding_value must be 0 for a plain layer, got {self.padding_value}; pad first"
            )
        dense: nn.Conv2d = self._dense(nn.Conv2d)
        return self._filled(dense)

    def forward(self, input: Tensor) -> Tensor:
        """Applies the layer to input, float [N, in_channels, H, W] or [in_channels, H, W], or packed images."""
        self._checked(input)
        if input.dim() not in (3, 4):
            raise ValueError(
                f"BinaryConv2d: input must be [N, {self.in_channels}, H, W], [{self.in_channels}, H, W] or packed "
                f"images, got shape {tuple(input.shape)}; reshape it"
            )
        x = input if input.dim() == 4 else input.unsqueeze(0)
        # Straight from the dictionary: nn.Module looks an attribute up for a third of a microsecond.
        held = self._buffers
        y: Tensor = _xnor_conv2d(
            x,
            held["bits"],
            self.in_channels,
            self.out_channels,
            *self._geometry,
            self.padding_value,
            held["scale"],
            held["bias"],
            held["thresholds"],
        )
        y = self._finished(y, input.dtype)
        if held["thresholds"] is None and not (x.is_floating_point() and _is_channels_last(x)):
            y = y.contiguous()
        return y if input.dim() == 4 else y.squeeze(0)

    def extra_repr(self) -> str:
        """What print(module) shows between the parentheses."""
        padded = [f"padding_value={self.padding_value}"] * (self.padding_value != 0)
        return ", ".join([*self._shown_sizes(), *padded, *self._shown()])


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
