"""A linear layer that stores and multiplies only its non-zero weights."""

from __future__ import annotations

from tersetorch.formats import CsrWeight
from tersetorch.nn.sparse_linear_module import SparseLinearBase
from tersetorch.nn.sparse_module import ValuesModule


class SparseLinear(ValuesModule, SparseLinearBase[CsrWeight]):
    """y = input @ W.T + bias, W in compressed sparse rows; fine-tunes at fixed sparsity.

    Shapes: input float32 or bfloat16 [..., in_features] -> y [..., out_features], of input's dtype; sums in float32.
    Buffers row_offsets, col_indices; parameters values [nnz], bias [out_features] or None.

    Args:
        weight: the sparse weight; its tensors are used, not copied.
        bias: float [out_features], or None.
        relu: whether negative results become 0.

    Raises:
        TypeError: weight is not a CsrWeight, or has other dtypes than that class names.
        ValueError: weight is not a valid CsrWeight, or bias does not fit it.

    Source:
        Han et al., Learning both weights and connections (2015), section 3; run as CSR rather than retrained dense.
    """
