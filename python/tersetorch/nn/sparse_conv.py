"""Convolutions that store and multiply only their non-zero weights."""

from __future__ import annotations

from torch import nn

from tersetorch.formats import CsrWeight
from tersetorch.nn.sparse_conv_module import SparseConvBase
from tersetorch.nn.sparse_module import ValuesModule


class SparseConv2d(ValuesModule, SparseConvBase[nn.Conv2d, CsrWeight]):
    """y = conv2d(input, W) + bias, W in compressed sparse rows; fine-tunes at fixed sparsity.

    Shapes: input float32 or bfloat16 [N, in_channels, H, W] or [in_channels, H, W], contiguous or channels_last, which
    y then is too; y [N, out_channels, H', W'] of input's dtype; sums in float32. Buffers row_offsets, col_indices;
    parameters values [nnz], bias [out_channels] or None.

    Args:
        weight: the sparse weight [out_channels, in_channels / groups * taps]; its tensors are used, not copied.
        bias: float [out_channels], or None.
        kernel_size, stride, padding, dilation, groups, padding_mode: as torch.nn.Conv2d takes them.
        relu: whether negative results become 0.

    Raises:
        TypeError: weight is not a CsrWeight, or has other dtypes than that class names; a size is no number.
        ValueError: weight is not a valid CsrWeight, or bias or a size does not fit it.
        RuntimeError: the kernel is too large for the layout (beyond 65,536 rows of taps).

    Source:
        Han et al., Learning both weights and connections (2015), section 3; Park et al., Faster CNNs with Direct Sparse
        Convolutions and Guided Pruning (2017), section 2, for the product.
    """

    dense_type = nn.Conv2d
    dims = 2


class SparseConv1d(ValuesModule, SparseConvBase[nn.Conv1d, CsrWeight]):
    """y = conv1d(input, W) + bias, W in compressed sparse rows; as SparseConv2d with one row.

    Shapes: input float32 or bfloat16 [N, in_channels, L] or [in_channels, L] -> y [N, out_channels, L'].

    Args and Raises: as SparseConv2d, the sizes as torch.nn.Conv1d takes them.
    """

    dense_type = nn.Conv1d
    dims = 1
