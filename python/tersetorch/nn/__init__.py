"""Does it have a forward()? Drop-in modules with buffers and parameters only."""

from tersetorch.nn.sparse_codebook_linear import SparseCodebookLinear
from tersetorch.nn.sparse_linear import SparseLinear

__all__ = ["SparseCodebookLinear", "SparseLinear"]
