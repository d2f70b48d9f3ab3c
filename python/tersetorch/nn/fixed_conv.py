"""A convolution in fixed point."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor, nn

from tersetorch import ops
from tersetorch.formats import FixedFormat, FixedWeight
from tersetorch.nn.conv_sizes import ConvOptions, ConvSizes
from tersetorch.nn.fixed_module import FixedPointModule

_fixed_conv2d = ops.native_op("fixed_conv2d")


class FixedPointConv2d(ConvSizes[nn.Conv2d], FixedPointModule):
    """y = round(conv2d(round(input), W) + bias): whole numbers, exact sums, each rounded once; nearest, ties up.

    Shapes: input float32 or bfloat16 [N, in_channels, H, W] or without N -> y [N, out_channels, H', W'] of input's
    dtype and memory format, numbers of output_format (rounded to bfloat16 there). The same bits everywhere.

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

    def _pack(self) -> Tensor:
        filters = self.steps.reshape(self.out_channels, *self.kernel_size, -1).permute(0, 3, 1, 2)
        return ops.fixed_conv2d_pack(filters, self.dilation, self.groups)[0]

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
        if not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
            whole = self._rounded(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        else:
            whole = self._rounded(x)
        groups = ops.fixed_conv2d_groups(self.out_channels, self.groups)
        sizes = self._kernel, self._stride, self._padding, self._dilation, groups
        y: Tensor = _fixed_conv2d(whole, self._packed(), self.bias, self.out_channels, *sizes, *self._conversion)
        return y
