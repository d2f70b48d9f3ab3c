"""A convolution of signs."""

from __future__ import annotations

from math import prod
from typing import Any, Self, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional

from tersetorch import ops
from tersetorch.formats import SignWeight
from tersetorch.nn.conv_sizes import ConvSizes, Sizes, ZeroPadded
from tersetorch.nn.sign_module import PIXEL_INPUTS, SignModule

_xnor_conv2d = ops.native_op("xnor_conv2d")
# Numbers in the patches of images that are multiplied at once.
PATCHES = 1 << 19
_bitplane_conv2d = ops.native_op("bitplane_conv2d")


class BinaryConv2d(ConvSizes[nn.Conv2d], SignModule):
    """y = scale * conv2d(sign(input), W) + bias with W of signs, computed as bits; sign(0) is +1 and sign(NaN) -1.

    With inputs="real" it is y = scale * conv2d(input, W) + bias, by additions and subtractions of patches, which are
    copied a few megabytes at a time; it alone has gradients, of input. With inputs="pixels" input is numbers k / 255 of
    images, k from 0 to 255, with "signed_pixels" 2 k / 255 - 1: floats, of which the nearest k counts, or uint8, the k
    themselves. 255 * conv2d(input, W) is an exact integer there.

    Shapes: input float32 or bfloat16 [N, in_channels, H, W], of which only the signs count -> y [N, out_channels, H',
    W'] of input's dtype and memory format, or packed images with thresholds: int64 [N, H', W', ceil(out_channels /
    64)]. input may be packed images itself, as ops.sign_pack_images, a layer with thresholds or SignMaxPool2d returns
    them; y is of dtype then. All may lack N. The convolution is an exact integer, and y = fma(dot, scale, bias).

    Args:
        weight: the weight, with a tap for each position of the kernel; with one tap where inputs are pixels.
        bias: float [out_channels], or None.
        kernel_size, stride, padding, dilation, groups: as torch.nn.Conv2d takes them; padding the same on both sides,
            and groups 1 where inputs are not "signs".
        padding_value: what input counts as outside: 0, which adds nothing to a sum, or, of signs, 1 or -1.
        thresholds: int32 [out_channels], instead of bias and of the weight's scale: y is the packed signs that are +1
            where the convolution is at least the threshold, of pixels 255 times it.
        inputs: "signs", "real", "pixels" or "signed_pixels".
        dtype: of y where input is packed images or uint8.

    Raises:
        TypeError: weight is not a SignWeight, or an argument has another type than named here.
        ValueError: weight is not valid, an argument does not fit it, or thresholds come with bias or scale.

    Source:
        Rastegari et al., XNOR-Net (2016), section 3.2; Hubara et al., Binarized Neural Networks (2016), section 1.5.
    """

    dense_type = nn.Conv2d
    dims = 2

    def __init__(
        self,
        weight: SignWeight,
        bias: Tensor | None = None,
        *,
        padding_value: int = 0,
        thresholds: Tensor | None = None,
        inputs: str = "signs",
        dtype: torch.dtype = torch.float32,
        **sizes: Unpack[ZeroPadded],
    ) -> None:
        super().__init__(weight, bias, thresholds, dtype, padding_value=padding_value, inputs=inputs, **sizes)

    def _take_sizes(self, weight: SignWeight, padding_value: int = 0, inputs: str = "signs", **sizes: Any) -> None:
        self._take_inputs(inputs)
        self._set_sizes(weight.shape, **sizes)
        if weight.taps != self._taps(inputs, self.kernel_size):
            expected = f"{prod(self.kernel_size)} taps, the positions of kernel_size {self.kernel_size}"
            if inputs in PIXEL_INPUTS:
                expected = f"one tap for inputs={inputs!r}"
            raise ValueError(
                f"BinaryConv2d: weight must have {expected}, got {weight.taps}; pass taps= to SignWeight.from_dense"
            )
        if self._pad_first:
            raise ValueError(
                f"BinaryConv2d: padding must be the same on both sides, got {self.padding!r} for kernel_size "
                f"{self.kernel_size}; pad by numbers"
            )
        if padding_value not in (0, 1, -1):
            raise ValueError(f"BinaryConv2d: padding_value must be 0, 1 or -1, got {padding_value!r}; choose one")
        if inputs != "signs" and padding_value:
            raise ValueError(
                f"BinaryConv2d: padding_value must be 0 for inputs={inputs!r}, got {padding_value}; pad first"
            )
        if inputs != "signs" and self.groups != 1:
            raise ValueError(
                f"BinaryConv2d: groups must be 1 for inputs={inputs!r}, got {self.groups}; convolve each by itself"
            )
        self.padding_value = padding_value

    @staticmethod
    def _taps(inputs: str, kernel_size: tuple[int, ...]) -> int:
        """Of the weight: channels lie together in images of signs and in patches, but for pixels."""
        return 1 if inputs in PIXEL_INPUTS else prod(kernel_size)

    def _packed(self, bits: Tensor) -> Tensor:
        if self.inputs == "real":
            bits = ops.sign_pack(ops.sign_unpack(bits, self.in_channels).flatten(1))
        if self.inputs != "signs":
            return ops.xnor_pack(bits.flatten(1))
        return ops.xnor_conv2d_pack(bits.unflatten(1, self.kernel_size), self.groups)

    def _unpacked(self, bits: Tensor) -> Tensor:
        if self.inputs != "signs":
            rows: Tensor = ops.xnor_unpack(bits, self.out_channels).unsqueeze(1)
            if self.inputs != "real":
                return rows
            taps = prod(self.kernel_size)
            columns = taps * self.in_channels
            if not rows.is_meta:  # the unused bits are about to go
                SignWeight(rows, columns).validate()
            return ops.sign_pack(ops.sign_unpack(rows, columns).view(self.out_channels, taps, self.in_channels))
        return ops.xnor_conv2d_unpack(bits, self.out_channels, self.groups).flatten(1, 2)

    @staticmethod
    def why_not(module: nn.Conv2d, inputs: str = "signs") -> str | None:
        """Why from_dense refuses the sizes of a layer, or None."""
        if inputs != "signs" and module.groups != 1:
            return f"{module.groups} groups, which only convolutions of signs have"
        if module.padding_mode != "zeros":
            return f"padding_mode {module.padding_mode!r}"
        uneven = module.padding == "same" and any(
            d * (k - 1) % 2 for k, d in zip(module.kernel_size, module.dilation, strict=True)
        )
        return "more padding on one side than on the other" if uneven else None

    @classmethod
    def from_dense(cls, module: nn.Conv2d, *, inputs: str = "signs") -> Self:
        """The layer that computes what module does: of inputs that are all +1 or -1, or with inputs="real" of any.

        Args:
            module: each of its filters +a and -a for some a.
            inputs: what they are, as the constructor takes it.

        Raises:
            TypeError: module is not an nn.Conv2d, or its weight is neither float32 nor bfloat16.
            ValueError: a filter has other values, padding is not of zeros, as many on both sides, or there are groups
                and inputs are not signs.
        """
        cls._check_source(module)
        reason = cls.why_not(module)
        if reason is not None:
            raise ValueError(f"{cls.__name__}: module must pad both sides by as many zeros, got {reason}; pad first")
        weight = SignWeight.from_dense(module.weight.flatten(1), cls._taps(inputs, module.kernel_size))
        # Those of zeros have no padding mode to name.
        sizes = {name: size for name, size in cls._sizes_of(module).items() if name != "padding_mode"}
        bias = None if module.bias is None else module.bias.detach()
        return cls(weight, bias, inputs=inputs, dtype=module.weight.dtype, **sizes).train(module.training)

    @classmethod
    def of_sizes(
        cls,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        groups: int = 1,
        scale: bool = False,
        bias: bool = True,
        thresholds: bool = False,
        inputs: str = "signs",
        batched: bool = False,
        dtype: str = "float32",
        **sizes: Any,
    ) -> Self:
        """A layer of zeros, on any device, for tensors that come from elsewhere."""
        kernel = cls._checked_sizes("kernel_size", kernel_size, 1)
        taps = cls._taps(inputs, kernel)
        shape = (out_channels, taps, in_channels // max(1, groups) * prod(kernel) // taps)
        sizes = {"kernel_size": kernel_size, "groups": groups, "inputs": inputs, **sizes}
        return cls._zeros(shape, scale, bias, thresholds, batched, dtype, **sizes)

    def _own_sizes(self) -> dict[str, Any]:
        return {**super()._own_sizes(), **({"padding_value": self.padding_value} if self.padding_value else {})}

    def to_dense(self) -> nn.Conv2d:
        """The plain layer with the same weight and bias: it computes what a layer without thresholds does of signs.

        Raises:
            ValueError: padding_value is not 0, which no plain layer pads with.
        """
        if self.padding_value:
            raise ValueError(
                f"BinaryConv2d: padding_value must be 0 for a plain layer, got {self.padding_value}; pad first"
            )
        return super().to_dense()

    def forward(self, input: Tensor) -> Tensor:
        """Applies the layer to input, float [N, in_channels, H, W] or [in_channels, H, W], or packed images."""
        given = input
        input = self._checked(input)
        if input.dim() not in (3, 4) or (self.inputs != "signs" and input.shape[-3] != self.in_channels):
            raise ValueError(
                f"BinaryConv2d: input must be [N, {self.in_channels}, H, W], [{self.in_channels}, H, W] or packed "
                f"images, got shape {tuple(input.shape)}; reshape it"
            )
        if self.batched and input.dim() != 4:
            raise ValueError(
                "BinaryConv2d: input must be a batch of images, since its packed signs [N, H, W, words] are flattened "
                f"behind it, got shape {tuple(input.shape)}; unsqueeze it, or convert with such example_inputs"
            )
        x = input if input.dim() == 4 else input.unsqueeze(0)
        if self.inputs == "real":
            y = self._of_numbers(x)
        else:
            y = self._finished(self._of_signs(x) if self.inputs == "signs" else self._of_pixels(x), given.dtype)
        if self._buffers["thresholds"] is None and not (x.dtype != torch.int64 and _is_channels_last(x)):
            y = y.contiguous()
        return y if input.dim() == 4 else y.squeeze(0)

    def _of_signs(self, x: Tensor) -> Tensor:
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
        return y

    def _of_pixels(self, x: Tensor) -> Tensor:
        pixels, step, zero = self._pixels(x)
        held = self._buffers
        scale = None if held["thresholds"] is not None else self.unit_scale()
        y: Tensor = _bitplane_conv2d(
            pixels,
            held["bits"],
            self.out_channels,
            *self._geometry[:-1],
            step,
            zero,
            scale,
            held["bias"],
            held["thresholds"],
        )
        return y

    def _of_numbers(self, x: Tensor) -> Tensor:
        """The convolution of numbers, some images at a time, so that their patches stay near."""
        kernel, _, padding, _, _ = self._geometry
        # Patches are gathered by channels.
        x = x.contiguous(memory_format=torch.channels_last)
        if any(padding):
            x = functional.pad(x, [n for n in reversed(padding) for _ in range(2)])
        patch = max(1, self.in_channels * prod(kernel) * x.shape[2] * x.shape[3])
        parts = (x,) if torch.compiler.is_compiling() else x.split(max(1, PATCHES // patch))
        multiplied = [self._of_patches(part) for part in parts]
        return multiplied[0] if len(multiplied) == 1 else torch.cat(multiplied)

    def _of_patches(self, x: Tensor) -> Tensor:
        (high, wide), (down, right), _, (gap_down, gap_right), _ = self._geometry
        windows = x.permute(0, 2, 3, 1).unfold(1, gap_down * (high - 1) + 1, down)[..., ::gap_down]
        windows = windows.unfold(2, gap_right * (wide - 1) + 1, right)[..., ::gap_right]
        rows = windows.permute(0, 1, 2, 4, 5, 3).flatten(3)
        return self._products(rows).permute(0, 3, 1, 2)

    def _shown_sizes(self) -> list[str]:
        return [*super()._shown_sizes(), *[f"padding_value={self.padding_value}"] * (self.padding_value != 0)]


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
