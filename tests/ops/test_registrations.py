"""Which ops run where."""

import torch

import tersetorch  # noqa: F401  brings the ops

# Ops for a weight that is laid out once, when it is made or loaded: their Python functions move it to the CPU.
ON_CPU = {
    "bitmap_from_rows": "packs a weight",
    "bitmap_pack": "packs a weight",
    "blocked_pack": "packs a weight",
    "blocked_bfloat16_pack": "packs a weight",
    "blocked_int8_pack": "packs a weight",
    "codebook_pack": "packs a weight",
    "codebook_unpack": "unpacks a weight, to store it",
    "csr_pack": "packs a weight",
    "fixed_pack": "packs a weight",
    "sparse_conv2d_pack": "packs a weight for sparse_conv2d_packed",
    "sparse_conv2d_pack_words": "packs a weight for sparse_conv2d_packed",
    "sparse_conv2d_packed": "its layout follows the CPU's caches; on a GPU layers call sparse_conv2d with their rows",
}


def test_every_op_answers_on_cuda_or_says_why_not():
    """Where the build has no CUDA kernels the answer is a sentence that says so."""
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("tersetorch::")]

    def on(key):
        found = {name for name in names if torch._C._dispatch_has_kernel_for_dispatch_key(name, key)}
        return {name.removeprefix("tersetorch::") for name in found}

    assert on("CPU") - on("CUDA") == set(ON_CPU)
    assert on("CUDA") <= on("CPU")
