"""A linear layer that stores and multiplies only its non-zero weights."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tersetorch import ops
from tersetorch.formats import CsrWeight
from tersetorch.nn.sparse_module import SparseLinearBase


class SparseLinear(SparseLinearBase[CsrWeight]):
    """y = input @ W.T + bias, W in compressed sparse rows; fine-tunes at fixed sparsity.

    Shapes: input float32 or bfloat16 [..., in_features] -> y [..., out_features], of input's dtype; sums in float32.
    Buffers row_offsets, col_indices; parameters values [nnz], bias [out_features] or None.

    Args:
        weight: the sparse weight; its tensors are used, not copied.
        bias: float [out_features], or None.

    Raises:
        TypeError: weight is not a CsrWeight, or has other dtypes than that class names.
        ValueError: weight is not a valid CsrWeight, or bias does not fit it.

    Source:
        Han et al., Learning both weights and connections (2015), section 3; run as CSR rather than retrained dense.
    """

    format = CsrWeight
    buffer_fields = ("row_offsets", "col_indices")
    parameter_field = packed_field = "values"

    values: nn.Parameter

    def _recorded(self, x: Tensor) -> Tensor:
        return ops.csr_matmul(x, self.row_offsets, self.col_indices, self.values, self.bias)

    def _from_rows(self, x: Tensor) -> Tensor:
        # Straight from the dictionaries: nn.Module looks an attribute up for a third of a microsecond.
        buffers: Any = self._buffers
        parameters: Any = self._parameters
        return ops.csr_matmul_inference(
            x,
            buffers["row_offsets"],
            buffers["col_indices"],
            parameters["values"],
            parameters["bias"],
        )
