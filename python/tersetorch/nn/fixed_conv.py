"""A convolution in fixed point."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from tersetorch.formats import FixedFormat, FixedWeight
from tersetorch.nn.conv_sizes import ConvOptions, ConvSizes
from tersetorch.nn.fixed_module import FixedPointModule

# Numbers of windows that are in memory at a time.
CHUNK = 1 << 22


class FixedPointConv2d(ConvSizes[nn.Conv2d], FixedPointModule):
    """y = round(conv2d(round(input), W) + bias): whole numbers, exact sums, each rounded once; nearest, ties up.

    Shapes: input float32 or bfloat16 [N, in_channels, H, W] or without N -> y [N, out_channels, H', W'] of input's
    dtype and memory format, numbers of output_format (rounded to bfloat16 there). Computed over windows of the rounded
    image, a chunk of images at a time; the same bits everywhere.

    Args:
        weight: the weight, [out_channels, kh * kw * in_channels / groups]: the channels of a position lie together.
        bias: int64 [out_channels] in units of 2^-F, F the fraction bits of weight and input together; or None.
        input_format: "<IL,FL>" of at most 16 bits.
        output_format: "<IL,FL>" of at most 24 bits.
        kernel_size, stride, padding, dilation, groups, padding_mode: as torch.nn.Conv2d takes them.

    Raises:
        TypeError: weight is not a FixedWeight, or an argument has another type than named here.
        ValueError: weight is not valid, or an argument does not fit it.

    Source:
        Gupta et al., Deep Learning with Limited Numerical Precision (2015), section 3.2.
    """

    dense_type = nn.Conv2d
    dims = 2

    def __init__(
        self,
        weight: FixedWeight,
        bias: Tensor | None = None,
        *,
        input_format: str | FixedFormat,
        output_format: str | FixedFormat,
        **sizes: Unpack[ConvOptions],
    ) -> None:
        super().__init__(weight, bias, input_format, output_format, **sizes)

    @classmethod
    def _as_matrix(cls, weight: Tensor) -> Tensor:
        return weight.permute(0, 2, 3, 1).flatten(1)

    @property
    def weight(self) -> Tensor:
        """The dense weight, built anew at every read; writing to it changes nothing."""
        shape = self.out_channels, *self.kernel_size, self.in_channels // self.groups
        return self.fixed_weight.to_dense().view(shape).permute(0, 3, 1, 2).contiguous()

    def forward(self, input: Tensor) -> Tensor:
        """Applies the layer to input, float [N, in_channels, H, W] or [in_channels, H, W]; NaN raises on the CPU."""
        y = self._convolve(input, self._run)
        return y if input.dtype == torch.float32 else y.to(input.dtype)

    def _run(self, x: Tensor) -> Tensor:
        whole = self._rounded(x).permute(0, 2, 3, 1)
        high, wide = self._padding
        # Channels of a pixel together, as the weight has them.
        image = pad(whole, (0, 0, wide, wide, high, high)) if high or wide else whole
        image = image.contiguous()
        sizes = [
            (image.shape[1 + i] - self._dilation[i] * (self._kernel[i] - 1) - 1) // self._stride[i] + 1 for i in (0, 1)
        ]
        if min(sizes) < 1:
            raise ValueError(
                f"FixedPointConv2d: input must be as large as the kernel, got {tuple(x.shape)}; pass larger images"
            )
        of_image = max(1, sizes[0] * sizes[1] * self._kernel[0] * self._kernel[1] * self.in_channels)
        parts = [self._of_images(part, sizes) for part in image.split(max(1, CHUNK // of_image))]
        y = (torch.cat(parts) if len(parts) > 1 else parts[0]).permute(0, 3, 1, 2)
        channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        return y if channels_last else y.contiguous()

    def _of_images(self, image: Tensor, sizes: list[int]) -> Tensor:
        """Of some padded images [N, H, W, channels], [N, H', W', out_channels]."""
        n, _, _, c = image.shape
        sample, row, column, channel = image.stride()
        moves = (self._stride[0] * row, self._stride[1] * column, self._dilation[0] * row, self._dilation[1] * column)
        windows = image.as_strided((n, *sizes, *self._kernel, c), (sample, *moves, channel))
        groups = []
        of_group = c // self.groups
        for g, steps in enumerate(self.steps.chunk(self.groups)):
            x = windows[..., g * of_group : (g + 1) * of_group].reshape(n * sizes[0] * sizes[1], steps.shape[1])
            bias = None if self.bias is None else self.bias.chunk(self.groups)[g]
            groups.append(self._multiplied(x, steps, bias))
        return torch.cat(groups, 1).view(n, *sizes, self.out_channels)
