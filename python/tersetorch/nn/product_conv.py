"""Convolutions whose weight is made of shared sub-vectors."""

from __future__ import annotations

from math import prod
from typing import Any, Self

from torch import Tensor, nn

from tersetorch import ops
from tersetorch.formats import ProductWeight
from tersetorch.nn.conv_sizes import ConvSizes, Sizes
from tersetorch.nn.product_module import ProductModule, ResidualForm, zero_weight
from tersetorch.nn.shared_module import records


class ProductConv2d(ConvSizes, ProductModule):
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

    dims = 2

    def __init__(
        self,
        weight: ProductWeight,
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

    def _hold(self, weight: ProductWeight, bias: Tensor | None, relu: bool) -> None:
        self._shape = weight.shape
        super()._hold(weight, bias, relu)

    def _weight_of(self, codes: Tensor, values: Tensor) -> ProductWeight:
        return ProductWeight(codes, values, *self._shape)

    @classmethod
    def from_dense(cls, module: nn.Conv2d, sub_vector: int | None = None) -> Self:
        """The layer that computes what module computes.

        A module that quantize.product or quantize.residual has made share keeps its codes and codebooks; of sums they
        are still known after finalize, until the weight is changed. Any other weight is searched for the parts that
        its filters share.

        Args:
            module: the layer.
            sub_vector: columns of a segment, where they have to be searched for; None for those that take the fewest
                bytes, see ProductWeight.find.

        Raises:
            TypeError: module is not an nn.Conv2d, or its weight is neither float32 nor bfloat16.
            ValueError: the weight has more distinct parts than codes can name, or is not what its codes say, since it
                was pruned after, or rounded where filters are sums.
        """
        if not isinstance(module, nn.Conv2d):
            raise TypeError(f"{cls.__name__}: module must be an nn.Conv2d, got {type(module).__name__}; pass a layer")
        layer = cls(
            *cls._parts_of(module, sub_vector),
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
        stages: int,
        segments: int,
        width: int,
        entries: int,
        stride: Sizes = 1,
        padding: Sizes | str = 0,
        dilation: Sizes = 1,
        groups: int = 1,
        padding_mode: str = "zeros",
        bias: bool = True,
        relu: bool = False,
    ) -> Self:
        """A layer of zeros, on any device, for tensors that come from elsewhere."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        taps = prod(layer._checked_sizes("kernel_size", kernel_size, 1))
        columns = in_channels // max(1, groups) * taps
        weight = zero_weight(out_channels, columns, (stages, segments, width, entries))
        layer._hold(weight, weight.codebooks.new_zeros(out_channels) if bias else None, relu)
        layer._set_sizes(weight.shape, kernel_size, stride, padding, dilation, groups, padding_mode)
        return layer

    @property
    def sizes(self) -> dict[str, Any]:
        """What of_sizes takes to make a layer of the same sizes and options."""
        names = ("stages", "segments", "width", "entries")
        return {
            **self._own_sizes(),
            **dict(zip(names, self.codebooks.shape, strict=True)),
            **({} if self.bias is not None else {"bias": False}),
            **({"relu": True} if self.relu else {}),
        }

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

    def extra_repr(self) -> str:
        """What print(module) shows between the parentheses."""
        stages, _, width, entries = self.codebooks.shape
        shown = [f"bias={self.bias is not None}", f"stages={stages}", f"sub_vector={width}", f"entries={entries}"]
        return ", ".join([*self._shown_sizes(), *shown, *["relu=True"] * self.relu])


class ResidualConv2d(ResidualForm, ProductConv2d):
    """y = conv2d(input, W) + bias, each filter of W a sum of shared filters, one of each stage; the codebooks train.

    As ProductConv2d, with one segment as wide as a filter: codebooks [stages, 1, in_channels / groups * taps, entries].

    Raises:
        TypeError, ValueError: as ProductConv2d, and for a weight of several segments.

    Source:
        Gong et al., Compressing deep convolutional networks using vector quantization (2014), section 3.4.
    """
