"""A linear layer whose non-zero weights are 8-bit codes into a shared table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from tersetorch import ops
from tersetorch.formats import SparseCodebookWeight
from tersetorch.nn.sparse_module import SparseLinearBase


class SparseCodebookLinear(SparseLinearBase[SparseCodebookWeight]):
    """y = input @ W.T + bias, W's non-zeros stored as codes; the codebook trains, an entry by its members' sum.

    Shapes: input float32 or bfloat16 [..., in_features] -> y [..., out_features], of input's dtype; sums in float32.
    Buffers row_offsets, col_indices, codes; parameters codebook float32 [1, entries], bias [out_features] or None.
    The codebook stays float32 under .half(), .bfloat16() and .double(): rounding it would move every weight.

    Args:
        weight: the sparse weight; its tensors are used, not copied.
        bias: float [out_features], or None.

    Raises:
        TypeError: weight is not a SparseCodebookWeight, or has other dtypes than that class names.
        ValueError: weight is not a valid SparseCodebookWeight, or bias does not fit it.

    Source:
        Han et al., Deep Compression (2015), section 3.3 (trained shared weights), eq. 3 for the gradient.
    """

    format = SparseCodebookWeight
    buffer_fields = ("row_offsets", "col_indices", "codes")
    parameter_field = "codebook"
    packed_field = "codes"

    codes: Tensor
    codebook: nn.Parameter

    def _recorded(self, x: Tensor) -> Tensor:
        return ops.csr_matmul(x, self.row_offsets, self.col_indices, self.codes, self.bias, self.codebook[0])

    def _from_rows(self, x: Tensor) -> Tensor:
        # Straight from the dictionaries: nn.Module looks an attribute up for a third of a microsecond.
        buffers: Any = self._buffers
        parameters: Any = self._parameters
        return ops.csr_matmul_inference(
            x,
            buffers["row_offsets"],
            buffers["col_indices"],
            buffers["codes"],
            parameters["bias"],
            parameters["codebook"],
        )

    def _convert(self, fn: Callable[[Tensor], Tensor], recurse: bool) -> None:
        before = self.codebook.data
        grad = None if self.codebook.grad is None else self.codebook.grad.data
        super()._convert(fn, recurse)
        if self.codebook.dtype != before.dtype:
            self.codebook.grad = None
            self.codebook.data = before.to(self.codebook.device)
            self.codebook.grad = None if grad is None else grad.to(self.codebook.device)
