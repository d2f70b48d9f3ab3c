"""Convolutions whose weight is made of shared sub-vectors."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor, nn

from tersetorch import ops
from tersetorch.formats import ProductWeight
from tersetorch.nn.conv_sizes import ConvOptions, ConvSizes
from tersetorch.nn.product_module import ProductModule, ResidualForm
from tersetorch.nn.shared_module import records


class ProductConv2d(ConvSizes[nn.Conv2d], ProductModule):
    """y = conv2d(input, W) + bias, at least 0 with relu, with W in product-quantised form; the codebooks train.

    Shapes: input float32 or bfloat16 [N, in_channels, H, W] or [in_channels, H, W], contiguous or channels_last; y
    [N, out_channels, H', W'] of input's dtype; sums in float32. Buffer codes, packed; parameters codebooks float32
    [stages, segments or 1, width, entries], and bias [out_channels] or None. An entry's gradient is the sum of those of
    the sub-vectors that are it. Codebooks stay float32 under .half(), .bfloat16() and .double(). The weight is decoded
    for each call: the layer saves memory, not time.

    Args:
        weight: the weight [out_channels, in_channels / groups * taps]; its tensors are used, not copied.
        bias: float [out_channels], or None.
        kernel_size, stride, padding, dilation, groups, padding_mode: as torch.nn.Conv2d takes them.
        relu: whether negative results become 0.

    Raises:
        TypeError: weight is not a ProductWeight, or an argument has another type than named here.
        ValueError: weight is not valid, or bias or a size does not fit it.

    Source:
        Gong et al., Compressing deep convolutional networks using vector quantization (2014), section 3.3.
    """

    dense_type = nn.Conv2d
    dims = 2

    def __init__(
        self, weight: ProductWeight, bias: Tensor | None = None, *, relu: bool = False, **sizes: Unpack[ConvOptions]
    ) -> None:
        super().__init__(weight, bias, relu, **sizes)

    def forward(self, input: Tensor) -> Tensor:
        """Applies the layer to input, float [N, in_channels, H, W] or [in_channels, H, W]."""
        self._check_tensor(input)
        return self._convolve(input, self._recorded if records() else self._inferred)

    def _recorded(self, x: Tensor) -> Tensor:
        kernel, stride, padding, dilation, groups = self._geometry
        return ops.product_conv2d(
            x,
            self.codes,
            self.codebooks,
            self.bias,
            out_channels=self.out_channels,
            kernel_size=kernel,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            relu=self.relu,
        )

    def _inferred(self, x: Tensor) -> Tensor:
        return ops.product_conv2d_inference(
            x, self.codes, self.codebooks, self.bias, self.out_channels, *self._geometry, self.relu
        )


class ResidualConv2d(ResidualForm, ProductConv2d):
    """y = conv2d(input, W) + bias, each filter of W a sum of shared filters, one of each stage; the codebooks train.

    As ProductConv2d, with one segment as wide as a filter: codebooks [stages, 1, in_channels / groups * taps, entries].

    Raises:
        TypeError, ValueError: as ProductConv2d, and for a weight of several segments.

    Source:
        Gong et al., Compressing deep convolutional networks using vector quantization (2014), section 3.4.
    """
