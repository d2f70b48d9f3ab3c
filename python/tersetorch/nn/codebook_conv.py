"""A convolution whose weights are codes into tables of a few values."""

from __future__ import annotations

from math import prod
from typing import Any, Self

from torch import Tensor, nn

from tersetorch import ops
from tersetorch.formats import CodebookWeight
from tersetorch.nn.codebook_module import CodedModule, zero_weight
from tersetorch.nn.conv_sizes import ConvSizes, Sizes
from tersetorch.nn.shared_module import records


class CodebookConv2d(ConvSizes, CodedModule):
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
        self,
        weight: CodebookWeight,
        bias: Tensor | None = None,
        *,
        kernel_size: Sizes,
        stride: Sizes = 1,
        padding: Sizes | str = 0,
        dilation: Sizes = 1,
        groups: int = 1,
        padding_mode: str = "zeros",
        relu: bool = False,
    ) -> None:
        super().__init__(weight, bias, relu)
        self._set_sizes(weight.shape, kernel_size, stride, padding, dilation, groups, padding_mode)

    @classmethod
    def from_dense(cls, module: nn.Conv2d) -> Self:
        """The layer that computes what module computes.

        A module that quantize.kmeans has made share keeps its codes and its tables; another one gets a table of its
        distinct values.

        Raises:
            TypeError: module is not an nn.Conv2d, or its weight is neither float32 nor bfloat16.
            ValueError: the weight has more than 256 distinct values and is not shared.
        """
        weight, bias = cls._parts_of(module)
        layer = cls(
            weight,
            bias,
            kernel_size=module.kernel_size,
            stride=module.stride,
            padding=module.padding,
            dilation=module.dilation,
            groups=module.groups,
            padding_mode=module.padding_mode,
        )
        return layer.train(module.training)

    @classmethod
    def of_sizes(
        cls,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        tables: int,
        entries: int,
        stride: Sizes = 1,
        padding: Sizes | str = 0,
        dilation: Sizes = 1,
        groups: int = 1,
        padding_mode: str = "zeros",
        column_block: int = 0,
        bias: bool = True,
        layout: str = CodedModule.plain_layout,
        relu: bool = False,
    ) -> Self:
        """A layer of zeros, on any device, for tensors that come from elsewhere."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        taps = prod(layer._checked_sizes("kernel_size", kernel_size, 1))
        weight = zero_weight(out_channels, in_channels // max(1, groups) * taps, tables, entries, column_block)
        layer._hold(weight, weight.codebook.new_zeros(out_channels) if bias else None, relu)
        layer._set_sizes(weight.shape, kernel_size, stride, padding, dilation, groups, padding_mode)
        return layer.pack(layout)

    @property
    def sizes(self) -> dict[str, Any]:
        """What of_sizes takes to make a layer of the same sizes and options."""
        return {**self._own_sizes(), **self._config()}

    def to_dense(self) -> nn.Conv2d:
        """The plain layer with the same weight and bias, of one dtype: float32 where they differ and one needs it."""
        dense: nn.Conv2d = self._dense(nn.Conv2d)
        return self._filled(dense)

    @property
    def weight(self) -> Tensor:
        """The dense weight [out_channels, in_channels / groups, *kernel_size], built anew at every read."""
        return super().weight.view(self.out_channels, self.in_channels // self.groups, *self.kernel_size)

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

    def extra_repr(self) -> str:
        """What print(module) shows between the parentheses."""
        return ", ".join([*self._shown_sizes(), *self._shown()])
