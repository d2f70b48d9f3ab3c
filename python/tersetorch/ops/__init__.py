"""Does it give one native op a Python face? A public function, a fake kernel, an autograd formula; a file per op."""

from tersetorch.ops._load import load_native

load_native()

# The files below need torch, and register on what was just loaded.
from tersetorch.ops._native_op import native_op  # noqa: E402
from tersetorch.ops.bitmap_columns_matmul import (  # noqa: E402
    bitmap_columns_matmul,
    bitmap_columns_matmul_inference,
)
from tersetorch.ops.bitmap_matmul import (  # noqa: E402
    bitmap_from_rows,
    bitmap_matmul,
    bitmap_matmul_inference,
    bitmap_pack,
    bitmap_to_rows,
)
from tersetorch.ops.bitplane_matmul import bitplane_conv2d, bitplane_matmul, to_pixels  # noqa: E402
from tersetorch.ops.blocked_bfloat16_matmul import (  # noqa: E402
    blocked_bfloat16_matmul,
    blocked_bfloat16_matmul_inference,
    blocked_bfloat16_pack,
)
from tersetorch.ops.blocked_int8_matmul import (  # noqa: E402
    blocked_int8_matmul,
    blocked_int8_matmul_inference,
    blocked_int8_pack,
)
from tersetorch.ops.blocked_matmul import blocked_matmul, blocked_matmul_inference, blocked_pack  # noqa: E402
from tersetorch.ops.codebook_conv2d import codebook_conv2d, codebook_conv2d_inference  # noqa: E402
from tersetorch.ops.codebook_embedding import codebook_embedding, codebook_embedding_inference  # noqa: E402
from tersetorch.ops.codebook_matmul import (  # noqa: E402
    CODEBOOK_MODES,
    codebook_dense,
    codebook_matmul,
    codebook_matmul_inference,
    codebook_pack,
    codebook_row_bytes,
    codebook_tables,
    codebook_unpack,
)
from tersetorch.ops.csr_matmul import csr_matmul, csr_matmul_inference, csr_pack  # noqa: E402
from tersetorch.ops.fixed_conv2d import fixed_conv2d, fixed_conv2d_groups, fixed_conv2d_pack  # noqa: E402
from tersetorch.ops.fixed_matmul import fixed_matmul, fixed_pack  # noqa: E402
from tersetorch.ops.fixed_round import (  # noqa: E402
    RANDOM_BLOCK,
    ROUNDINGS,
    check_fixed,
    fixed_round,
    fixed_round_inference,
    fixed_round_whole,
    inside_range,
)
from tersetorch.ops.flat_conv2d import (  # noqa: E402
    FLAT_MAX_KERNEL,
    FLAT_MAX_STAGES,
    FlatFilters,
    flat_conv2d,
    flat_conv2d_inference,
    flat_conv2d_pack,
    flat_conv2d_packed,
    flat_conv2d_sizes,
    flat_conv2d_unpack,
)
from tersetorch.ops.product_conv2d import product_conv2d, product_conv2d_inference  # noqa: E402
from tersetorch.ops.product_matmul import (  # noqa: E402
    product_bytes,
    product_decode,
    product_matmul,
    product_matmul_inference,
    product_pack,
    product_segments,
    product_unpack,
)
from tersetorch.ops.sign_matmul import sign_matmul, sign_matmul_inference  # noqa: E402
from tersetorch.ops.sign_max_pool2d import sign_max_pool2d  # noqa: E402
from tersetorch.ops.sign_pack import sign_pack, sign_pack_images, sign_unpack, sign_words  # noqa: E402
from tersetorch.ops.sparse_conv2d import (  # noqa: E402
    sparse_conv2d,
    sparse_conv2d_channel_block,
    sparse_conv2d_inference,
    sparse_conv2d_pack,
    sparse_conv2d_pack_words,
    sparse_conv2d_packed,
)
from tersetorch.ops.xnor_conv2d import xnor_conv2d, xnor_conv2d_pack, xnor_conv2d_unpack  # noqa: E402
from tersetorch.ops.xnor_matmul import xnor_matmul, xnor_pack, xnor_unpack  # noqa: E402

__all__ = [
    "CODEBOOK_MODES",
    "FLAT_MAX_KERNEL",
    "FLAT_MAX_STAGES",
    "RANDOM_BLOCK",
    "ROUNDINGS",
    "FlatFilters",
    "bitmap_columns_matmul",
    "bitmap_columns_matmul_inference",
    "bitmap_from_rows",
    "bitmap_matmul",
    "bitmap_matmul_inference",
    "bitmap_pack",
    "bitmap_to_rows",
    "bitplane_conv2d",
    "bitplane_matmul",
    "blocked_bfloat16_matmul",
    "blocked_bfloat16_matmul_inference",
    "blocked_bfloat16_pack",
    "blocked_int8_matmul",
    "blocked_int8_matmul_inference",
    "blocked_int8_pack",
    "blocked_matmul",
    "blocked_matmul_inference",
    "blocked_pack",
    "check_fixed",
    "codebook_conv2d",
    "codebook_conv2d_inference",
    "codebook_dense",
    "codebook_embedding",
    "codebook_embedding_inference",
    "codebook_matmul",
    "codebook_matmul_inference",
    "codebook_pack",
    "codebook_row_bytes",
    "codebook_tables",
    "codebook_unpack",
    "csr_matmul",
    "csr_matmul_inference",
    "csr_pack",
    "fixed_conv2d",
    "fixed_conv2d_groups",
    "fixed_conv2d_pack",
    "fixed_matmul",
    "fixed_pack",
    "fixed_round",
    "fixed_round_inference",
    "fixed_round_whole",
    "flat_conv2d",
    "flat_conv2d_inference",
    "flat_conv2d_pack",
    "flat_conv2d_packed",
    "flat_conv2d_sizes",
    "flat_conv2d_unpack",
    "inside_range",
    "native_op",
    "product_bytes",
    "product_conv2d",
    "product_conv2d_inference",
    "product_decode",
    "product_matmul",
    "product_matmul_inference",
    "product_pack",
    "product_segments",
    "product_unpack",
    "sign_matmul",
    "sign_matmul_inference",
    "sign_max_pool2d",
    "sign_pack",
    "sign_pack_images",
    "sign_unpack",
    "sign_words",
    "sparse_conv2d",
    "sparse_conv2d_channel_block",
    "sparse_conv2d_inference",
    "sparse_conv2d_pack",
    "sparse_conv2d_pack_words",
    "sparse_conv2d_packed",
    "to_pixels",
    "xnor_conv2d",
    "xnor_conv2d_pack",
    "xnor_conv2d_unpack",
    "xnor_matmul",
    "xnor_pack",
    "xnor_unpack",
]
