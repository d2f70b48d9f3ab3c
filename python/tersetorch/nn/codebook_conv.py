"""A convolution whose weights are codes into tables of a few values."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor, nn

from tersetorch import ops
from tersetorch.formats import CodebookWeight
from tersetorch.nn.codebook_module import CodedModule
from tersetorch.nn.conv_sizes import ConvOptions, ConvSizes
from tersetorch.nn.shared_module import records


class CodebookConv2d(ConvSizes[nn.Conv2d], CodedModule):
    """y = conv2d(input, W) + bias, at least 0 with relu, with every weight of W a code into a table, which trains.

    Shapes: input float32 or bfloat16 [N, in_channels, H, W] or [in_channels, H, W], contiguous or channels_last, which
    y then is too; y [N, out_channels, H', W'] of input's dtype; sums in float32. Buffer codes, packed; parameters
    codebook float32 [tables, entries], bias [out_channels] or None. An entry's gradient is the sum of its members'. The
    codebook stays float32 under .half(), .bfloat16() and .double(): rounding it would move every weight. There is one
    table, one for each filter, or one for each block of columns.

    Args:
        weight: the weight [out_channels, in_channels / groups * taps]; its tensors are used, not copied.
        bias: float [out_channels], or None.
        kernel_size, stride, padding, dilation, groups, padding_mode: as torch.nn.Conv2d takes them.
        relu: whether negative results become 0.

    Raises:
        TypeError: weight is not a CodebookWeight, or an argument has another type than named here.
        ValueError: weight is not valid, or bias or a size does not fit it.

    Source:
        Han et al., Deep Compression (2016), section 3 (trained shared weights), eq. 3 for the gradient.
    """

    dense_type = nn.Conv2d
    dims = 2

    def __init__(
        self, weight: CodebookWeight, bias: Tensor | None = None, *, relu: bool = False, **sizes: Unpack[ConvOptions]
    ) -> None:
        super().__init__(weight, bias, relu, **sizes)

    def forward(self, input: Tensor) -> Tensor:
        """Applies the layer to input, float [N, in_channels, H, W] or [in_channels, H, W]."""
        self._check_tensor(input)
        return self._convolve(input, self._recorded if records() else self._inferred)

    def _recorded(self, x: Tensor) -> Tensor:
        kernel, stride, padding, dilation, groups = self._geometry
        return ops.codebook_conv2d(
            x,
            self.codes,
            self.codebook,
            self.bias,
            self.column_block,
            kernel_size=kernel,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            relu=self.relu,
        )

    def _inferred(self, x: Tensor) -> Tensor:
        return ops.codebook_conv2d_inference(
            x, self.codes, self.codebook, self.bias, self.column_block, *self._geometry, self.relu, self._mode
        )
