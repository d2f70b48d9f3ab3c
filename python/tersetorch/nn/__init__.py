"""Does it have a forward()? Drop-in modules with buffers and parameters only."""

from tersetorch.nn.binary_conv import BinaryConv2d
from tersetorch.nn.binary_linear import BinaryLinear
from tersetorch.nn.clustered_conv import ClusteredConv2d
from tersetorch.nn.codebook_conv import CodebookConv2d
from tersetorch.nn.codebook_embedding import CodebookEmbedding
from tersetorch.nn.codebook_linear import CodebookLinear
from tersetorch.nn.fixed_conv import FixedPointConv2d
from tersetorch.nn.fixed_linear import FixedPointLinear
from tersetorch.nn.flattened_conv import FlattenedConv2d
from tersetorch.nn.low_rank import LowRankConv2d, LowRankLinear
from tersetorch.nn.product_conv import ProductConv2d, ResidualConv2d
from tersetorch.nn.product_linear import ProductLinear, ResidualLinear
from tersetorch.nn.sign_pool import SignMaxPool2d
from tersetorch.nn.sparse_codebook_conv import SparseCodebookConv1d, SparseCodebookConv2d
from tersetorch.nn.sparse_codebook_linear import SparseCodebookLinear
from tersetorch.nn.sparse_conv import SparseConv1d, SparseConv2d
from tersetorch.nn.sparse_linear import SparseLinear

__all__ = [
    "BinaryConv2d",
    "BinaryLinear",
    "ClusteredConv2d",
    "CodebookConv2d",
    "CodebookEmbedding",
    "CodebookLinear",
    "FixedPointConv2d",
    "FixedPointLinear",
    "FlattenedConv2d",
    "LowRankConv2d",
    "LowRankLinear",
    "ProductConv2d",
    "ProductLinear",
    "ResidualConv2d",
    "ResidualLinear",
    "SignMaxPool2d",
    "SparseCodebookConv1d",
    "SparseCodebookConv2d",
    "SparseCodebookLinear",
    "SparseConv1d",
    "SparseConv2d",
    "SparseLinear",
]
