"""A linear layer in fixed point."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from tersetorch.formats import FixedFormat, FixedWeight
from tersetorch.nn.fixed_module import FixedPointModule


class FixedPointLinear(FixedPointModule):
    """y = round(W . round(input) + bias): whole numbers, an exact sum, rounded once; nearest, ties up, saturating.

    Shapes: input float32 or bfloat16 [..., in_features] -> y [..., out_features] of input's dtype, numbers of
    output_format (rounded to bfloat16 there). The same bits at every CPU level, on CUDA and for any number of threads.

    Args:
        weight: the weight.
        bias: int64 [out_features] in units of 2^-F, F the fraction bits of weight and input together; or None.
        input_format: "<IL,FL>" of at most 16 bits.
        output_format: "<IL,FL>" of at most 24 bits.

    Raises:
        TypeError: weight is not a FixedWeight, or an argument has another type than named here.
        ValueError: weight is not valid, or an argument does not fit it.

    Source:
        Gupta et al., Deep Learning with Limited Numerical Precision (2015), section 3.2.
    """

    dense_type = nn.Linear

    def __init__(
        self,
        weight: FixedWeight,
        bias: Tensor | None = None,
        *,
        input_format: str | FixedFormat,
        output_format: str | FixedFormat,
    ) -> None:
        super().__init__(weight, bias, input_format, output_format)

    def _take_sizes(self, shape: tuple[int, int], **sizes: Any) -> None:
        self.out_features, self.in_features = shape

    @classmethod
    def from_dense(
        cls,
        module: nn.Linear,
        weight_format: str | FixedFormat | None = None,
        input_format: str | FixedFormat | None = None,
        output_format: str | FixedFormat | None = None,
    ) -> Self:
        """The layer in fixed point, its weight rounded to the nearest and its bias to the nearest unit of the sums.

        Args:
            module: with a finite weight and bias, float32 or bfloat16.
            weight_format: "<IL,FL>" of at most 16 bits. This and the next two may be left out where fixed_formats, or
                finalize of a model in fixed point, has left formats at module.
            input_format: of at most 16 bits.
            output_format: of at most 24 bits.

        Raises:
            TypeError: module is not an nn.Linear, or its weight is neither float32 nor bfloat16.
            ValueError: a format is missing or none, or module holds NaN or infinity.
        """
        formats = cls._formats(module, weight_format, input_format, output_format)
        weight = FixedWeight.from_dense(module.weight, formats.weight)
        bias = cls._whole_bias(module, formats)
        layer = cls(weight, bias, input_format=formats.input, output_format=formats.output)
        return layer.train(module.training)

    @classmethod
    def of_sizes(
        cls,
        in_features: int,
        out_features: int,
        weight_format: str,
        input_format: str,
        output_format: str,
        bias: bool = True,
    ) -> Self:
        """A layer of zeros, on any device, for tensors that come from elsewhere."""
        return cls._zeros((out_features, in_features), weight_format, input_format, output_format, bias)

    @property
    def sizes(self) -> dict[str, Any]:
        """What of_sizes takes to make a layer of the same sizes and formats."""
        return {"in_features": self.in_features, "out_features": self.out_features, **self._config()}

    @property
    def weight(self) -> Tensor:
        """The dense weight, built anew at every read; writing to it changes nothing."""
        return self.fixed_weight.to_dense()

    def to_dense(self) -> nn.Linear:
        """The plain layer, float32, with the same weight and, to float32, bias."""
        return self._filled(nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta"))

    def forward(self, input: Tensor) -> Tensor:
        """Applies the layer to input, float32 or bfloat16 [..., in_features]; NaN raises a RuntimeError on the CPU."""
        y = self._multiplied(self._rounded(input), self.steps, self.bias)
        return y if input.dtype == torch.float32 else y.to(input.dtype)

    def extra_repr(self) -> str:
        """What print(module) shows between the parentheses."""
        return ", ".join([f"in_features={self.in_features}, out_features={self.out_features}", *self._shown()])
