"""A linear layer whose non-zero weights are 8-bit codes into a shared table."""

from __future__ import annotations

from tersetorch.formats import SparseCodebookWeight
from tersetorch.nn.sparse_linear_module import SparseLinearBase
from tersetorch.nn.sparse_module import CodebookModule


class SparseCodebookLinear(CodebookModule, SparseLinearBase[SparseCodebookWeight]):
    """y = input @ W.T + bias, W's non-zeros stored as codes; the codebook trains, an entry by its members' sum.

    Shapes: input float32 or bfloat16 [..., in_features] -> y [..., out_features], of input's dtype; sums in float32.
    Buffers row_offsets, col_indices, codes; parameters codebook float32 [1, entries], bias [out_features] or None.
    The codebook stays float32 under .half(), .bfloat16() and .double(): rounding it would move every weight.

    Args:
        weight: the sparse weight; its tensors are used, not copied.
        bias: float [out_features], or None.
        relu: whether negative results become 0.

    Raises:
        TypeError: weight is not a SparseCodebookWeight, or has other dtypes than that class names.
        ValueError: weight is not a valid SparseCodebookWeight, or bias does not fit it.

    Source:
        Han et al., Deep Compression (2015), section 3.3 (trained shared weights), eq. 3 for the gradient.
    """
