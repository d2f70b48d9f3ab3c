"""Does it say how a weight is stored? Dataclasses over plain tensors."""

from tersetorch.formats.bitmap_codebook_weight import BitmapCodebookWeight
from tersetorch.formats.bitmap_columns_weight import BitmapColumnsWeight
from tersetorch.formats.bitmap_int8_weight import BitmapInt8Weight
from tersetorch.formats.bitmap_weight import BitmapWeight
from tersetorch.formats.blocked_bfloat16_weight import BlockedBFloat16Weight
from tersetorch.formats.blocked_codebook_weight import BlockedCodebookWeight
from tersetorch.formats.blocked_int8_weight import BlockedInt8Weight
from tersetorch.formats.blocked_weight import BlockedWeight
from tersetorch.formats.codebook_weight import CodebookWeight, codebook_values
from tersetorch.formats.csr_weight import CsrWeight
from tersetorch.formats.fixed_format import FixedFormat, FixedFormats
from tersetorch.formats.fixed_weight import FixedWeight
from tersetorch.formats.product_weight import ProductWeight
from tersetorch.formats.sign_weight import SignWeight
from tersetorch.formats.sparse_codebook_weight import SparseCodebookWeight

__all__ = [
    "BitmapCodebookWeight",
    "BitmapColumnsWeight",
    "BitmapInt8Weight",
    "BitmapWeight",
    "BlockedBFloat16Weight",
    "BlockedCodebookWeight",
    "BlockedInt8Weight",
    "BlockedWeight",
    "CodebookWeight",
    "CsrWeight",
    "FixedFormat",
    "FixedFormats",
    "FixedWeight",
    "ProductWeight",
    "SignWeight",
    "SparseCodebookWeight",
    "codebook_values",
]
