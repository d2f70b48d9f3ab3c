"""A linear layer in fixed point."""

from __future__ import annotations

import torch
from torch import Tensor

from tersetorch import ops
from tersetorch.formats import FixedFormat, FixedWeight
from tersetorch.nn.dense_form import LinearSizes
from tersetorch.nn.fixed_module import FixedPointModule

_fixed_matmul = ops.native_op("fixed_matmul")


class FixedPointLinear(LinearSizes, FixedPointModule):
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

    def __init__(
        self,
        weight: FixedWeight,
        bias: Tensor | None = None,
        *,
        input_format: str | FixedFormat,
        output_format: str | FixedFormat,
    ) -> None:
        super().__init__(weight, bias, input_format, output_format)

    def _pack(self) -> Tensor:
        return ops.fixed_pack(self.steps)

    @property
    def weight(self) -> Tensor:
        """The dense weight, built anew at every read; writing to it changes nothing."""
        return self.fixed_weight.to_dense()

    def forward(self, input: Tensor) -> Tensor:
        """Applies the layer to input, float32 or bfloat16 [..., in_features]; NaN raises a RuntimeError on the CPU."""
        self._check_input(input)
        x = self._rounded(input)
        y: Tensor = _fixed_matmul(x, self._packed(), self.bias, self.out_features, *self._conversion)
        return y if input.dtype == torch.float32 else y.to(input.dtype)
