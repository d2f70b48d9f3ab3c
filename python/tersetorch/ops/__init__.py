"""Does it give one native op a Python face? A public function, a fake kernel, an autograd formula; a file per op."""

from tersetorch.ops._load import load_native_module, load_native_ops

load_native_module()
load_native_ops()

# The files below register on what was just loaded.
from tersetorch.ops.blocked_matmul import blocked_matmul, blocked_matmul_inference, blocked_pack  # noqa: E402
from tersetorch.ops.csr_matmul import csr_matmul, csr_matmul_inference, csr_pack  # noqa: E402
from tersetorch.ops.sparse_conv2d import (  # noqa: E402
    sparse_conv2d,
    sparse_conv2d_channel_block,
    sparse_conv2d_inference,
    sparse_conv2d_pack,
    sparse_conv2d_packed,
)

__all__ = [
    "blocked_matmul",
    "blocked_matmul_inference",
    "blocked_pack",
    "csr_matmul",
    "csr_matmul_inference",
    "csr_pack",
    "sparse_conv2d",
    "sparse_conv2d_channel_block",
    "sparse_conv2d_inference",
    "sparse_conv2d_pack",
    "sparse_conv2d_packed",
]
