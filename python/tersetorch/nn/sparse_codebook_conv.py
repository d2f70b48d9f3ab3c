"""Convolutions whose non-zero weights are 8-bit codes into a shared table."""

from __future__ import annotations

from torch import nn

from tersetorch.formats import SparseCodebookWeight
from tersetorch.nn.sparse_conv_module import SparseConvBase
from tersetorch.nn.sparse_module import CodebookModule


class SparseCodebookConv2d(CodebookModule, SparseConvBase[nn.Conv2d, SparseCodebookWeight]):
    """y = conv2d(input, W) + bias, W's non-zeros stored as codes; the codebook trains, an entry by its members' sum.

    Shapes: input float32 or bfloat16 [N, in_channels, H, W] or [in_channels, H, W], contiguous or channels_last, which
    y then is too; y [N, out_channels, H', W'] of input's dtype; sums in float32. Buffers row_offsets, col_indices,
    codes; parameters codebook float32 [1, entries], bias [out_channels] or None. The codebook stays float32 under
    .half(), .bfloat16() and .double(): rounding it would move every weight.

    Args:
        weight: the sparse weight [out_channels, in_channels / groups * taps]; its tensors are used, not copied.
        bias: float [out_channels], or None.
        kernel_size, stride, padding, dilation, groups, padding_mode: as torch.nn.Conv2d takes them.
        relu: whether negative results become 0.

    Raises:
        TypeError: weight is not a SparseCodebookWeight, or has other dtypes than that class names; a size is no number.
        ValueError: weight is not a valid SparseCodebookWeight, or bias or a size does not fit it.
        RuntimeError: the kernel is too large for the layout (beyond 65,536 rows of taps).

    Source:
        Han et al., Deep Compression (2015), section 3.3 (trained shared weights), eq. 3 for the gradient.
    """

    dense_type = nn.Conv2d
    dims = 2


class SparseCodebookConv1d(CodebookModule, SparseConvBase[nn.Conv1d, SparseCodebookWeight]):
    """y = conv1d(input, W) + bias, W's non-zeros stored as codes; as SparseCodebookConv2d with one row.

    Shapes: input float32 or bfloat16 [N, in_channels, L] or [in_channels, L] -> y [N, out_channels, L'].

    Args and Raises: as SparseCodebookConv2d, the sizes as torch.nn.Conv1d takes them.
    """

    dense_type = nn.Conv1d
    dims = 1
