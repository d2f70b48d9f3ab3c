"""Linear layers whose weight is made of shared sub-vectors."""

from __future__ import annotations

from typing import Any, Self

from torch import Tensor

from tersetorch import ops
from tersetorch.formats import ProductWeight
from tersetorch.nn.dense_form import LinearSizes
from tersetorch.nn.product_module import ProductModule, ResidualForm
from tersetorch.nn.shared_module import records

MODES = ("exact", "int8")


class ProductLinear(LinearSizes, ProductModule):
    """y = input @ W.T + bias, at least 0 with relu, with W in product-quantised form; the codebooks train.

    Shapes: input float32 or bfloat16 [..., in_features] -> y [..., out_features], of input's dtype; sums in float32.
    Buffer codes, packed; parameters codebooks float32 [stages, segments or 1, width, entries], and bias [out_features]
    or None. An entry's gradient is the sum of those of the sub-vectors that are it. Codebooks stay float32 under
    .half(), .bfloat16() and .double(): rounding them would move every weight.

    Args:
        weight: the product-quantised weight; its tensors are used, not copied.
        bias: float [out_features], or None.
        mode: "exact", or "int8": tables of products are rounded to 8 bits while gradients are off (see
            ops.product_matmul).
        relu: whether negative results become 0.

    Raises:
        TypeError: weight is not a ProductWeight, or an argument has another type than named here.
        ValueError: weight is not valid, bias does not fit it, or there is no such mode.

    Source:
        Gong et al., Compressing deep convolutional networks using vector quantization (2014), section 3.3.
    """

    def __init__(
        self, weight: ProductWeight, bias: Tensor | None = None, *, mode: str = "exact", relu: bool = False
    ) -> None:
        super().__init__(weight, bias, relu)
        self._take_mode(mode)

    def _take_mode(self, mode: str) -> None:
        if mode not in MODES:
            name = type(self).__name__
            raise ValueError(f"{name}: mode must be one of {list(MODES)}, got {mode!r}; choose one of them")
        self.mode = mode

    @classmethod
    def from_codes(cls, codes: Tensor, codebooks: Tensor, bias: Tensor | None = None, *, in_features: int) -> Self:
        """The layer of codes uint8 [out_features, stages * segments], as quantize.product_quantize returns them.

        Raises:
            TypeError, ValueError: as ProductWeight.from_codes.
        """
        return cls(ProductWeight.from_codes(codes, codebooks, in_features), bias)

    @classmethod
    def of_sizes(cls, *, mode: str = "exact", **sizes: Any) -> Self:
        """A layer of zeros, on any device, for tensors that come from elsewhere; only mode is checked."""
        layer = super().of_sizes(**sizes)
        layer._take_mode(mode)
        return layer

    def forward(self, input: Tensor) -> Tensor:
        """Applies the layer to input, float [..., in_features]."""
        self._check_input(input)
        if records():
            return ops.product_matmul(
                input, self.codes, self.codebooks, self.bias, out_features=self.out_features, relu=self.relu
            )
        return ops.product_matmul_inference(
            input, self.codes, self.codebooks, self.bias, self.out_features, self.mode, self.relu
        )


class ResidualLinear(ResidualForm, ProductLinear):
    """y = input @ W.T + bias, each row of W a sum of shared rows, one of each stage; the codebooks train.

    As ProductLinear, with one segment as wide as W: codebooks [stages, 1, in_features, entries].

    Raises:
        TypeError, ValueError: as ProductLinear, and for a weight of several segments.

    Source:
        Gong et al., Compressing deep convolutional networks using vector quantization (2014), section 3.4.
    """
