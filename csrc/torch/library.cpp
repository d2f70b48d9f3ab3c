// Table of contents of the native library: every op PyTorch can see, and nothing else.
#include <torch/csrc/stable/library.h>

#include "kernels/common/cpu_isa.h"

STABLE_TORCH_LIBRARY(tersetorch, m) {
  // A C++ program meets the level here first; Python has met it while importing tersetorch._native.
  const tersetorch::CpuIsaChoice& isa = tersetorch::ProcessCpuIsa();
  STD_TORCH_CHECK(isa.problem[0] == '\0', isa.problem);

  // The name of the level that the CPU kernels use.
  m.def("cpu_isa() -> str");
  // x [..., in] and a weight [out, in] in compressed sparse rows, at least 0 with relu -> [..., out]; with a codebook,
  // values are codes.
  m.def(
      "csr_matmul(Tensor x, Tensor row_offsets, Tensor col_indices, Tensor values, Tensor? bias=None, Tensor? "
      "codebook=None, bool relu=False) -> Tensor");
  // The same without autograd: for callers that know gradients to be off.
  m.def(
      "csr_matmul_inference(Tensor x, Tensor row_offsets, Tensor col_indices, Tensor values, Tensor? bias=None, "
      "Tensor? codebook=None, bool relu=False) -> Tensor");
  // Its gradients: grad_y [..., out] -> [..., in]
  m.def(
      "csr_matmul_grad_x(Tensor grad_y, Tensor row_offsets, Tensor col_indices, Tensor values, int in_features, "
      "Tensor? codebook=None) -> Tensor");
  // grad_y [..., out], x [..., in] -> float32 [nnz]
  m.def("csr_matmul_grad_values(Tensor grad_y, Tensor x, Tensor row_offsets, Tensor col_indices) -> Tensor");

  // A dense weight [out, in] -> row_offsets, col_indices and values of its non-zeros
  m.def("csr_pack(Tensor dense) -> (Tensor, Tensor, Tensor)");

  // x [..., in] and a weight [out, in] cut into blocks, at least 0 with relu -> [..., out]
  m.def(
      "blocked_matmul(Tensor x, Tensor block_offsets, Tensor segments, Tensor indices, Tensor values, Tensor? bias, "
      "Tensor? codebook, int out_features, int column_block, bool relu=False) -> Tensor");
  // The same without autograd: for callers that know gradients to be off.
  m.def(
      "blocked_matmul_inference(Tensor x, Tensor block_offsets, Tensor segments, Tensor indices, Tensor values, "
      "Tensor? bias, Tensor? codebook, int out_features, int column_block, bool relu=False) -> Tensor");
  // A weight in compressed sparse rows -> block_offsets, segments, indices and where each non-zero comes from.
  m.def(
      "blocked_pack(Tensor row_offsets, Tensor col_indices, int columns, int column_block) -> (Tensor, Tensor, Tensor, "
      "Tensor)");
  // Its bfloat16 mode: values bfloat16 [n, 2], of two consecutive columns; x is rounded to bfloat16.
  m.def(
      "blocked_bfloat16_matmul(Tensor x, Tensor block_offsets, Tensor segments, Tensor indices, Tensor values, Tensor? "
      "bias, int out_features, int column_block, bool relu=False) -> Tensor");
  m.def(
      "blocked_bfloat16_matmul_inference(Tensor x, Tensor block_offsets, Tensor segments, Tensor indices, Tensor "
      "values, Tensor? bias, int out_features, int column_block, bool relu=False) -> Tensor");
  // Rows with rising columns and bfloat16 values -> block_offsets, segments, indices, values.
  m.def(
      "blocked_bfloat16_pack(Tensor row_offsets, Tensor col_indices, Tensor values, int columns, int column_block) -> "
      "(Tensor, Tensor, Tensor, Tensor)");
  // Its int8 mode: values int8 [n, 4], of four consecutive columns; x is rounded to int8 with a scale for each sample.
  m.def(
      "blocked_int8_matmul(Tensor x, Tensor block_offsets, Tensor segments, Tensor indices, Tensor values, Tensor "
      "row_scales, Tensor row_sums, Tensor? bias, int out_features, int column_block, bool relu=False) -> Tensor");
  m.def(
      "blocked_int8_matmul_inference(Tensor x, Tensor block_offsets, Tensor segments, Tensor indices, Tensor values, "
      "Tensor row_scales, Tensor row_sums, Tensor? bias, int out_features, int column_block, bool relu=False) -> "
      "Tensor");
  // Rows with rising columns and int8 values -> block_offsets, segments, indices, values and the sum of each row.
  m.def(
      "blocked_int8_pack(Tensor row_offsets, Tensor col_indices, Tensor values, int columns, int column_block) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor)");

  // x [..., in] and a dense weight [out, in] kept as codes, uint8 [out, bytes] as codebook_pack lays them out, into a
  // codebook float32 [tables, entries]: one table, one for each row, or one for each block of column_block columns;
  // mode "exact", "bfloat16" or "int8"; at least 0 with relu -> [..., out]
  m.def(
      "codebook_matmul(Tensor x, Tensor codes, Tensor codebook, Tensor? bias=None, int column_block=0, str "
      "mode='exact', bool relu=False) -> Tensor");
  // The same without autograd: for callers that know gradients to be off.
  m.def(
      "codebook_matmul_inference(Tensor x, Tensor codes, Tensor codebook, Tensor? bias=None, int column_block=0, str "
      "mode='exact', bool relu=False) -> Tensor");
  // The weight itself, float32 [out, columns]; and its adjoint in codebook, float32 [tables, entries].
  m.def("codebook_dense(Tensor codes, Tensor codebook, int columns, int column_block=0) -> Tensor");
  m.def("codebook_reduce(Tensor grad, Tensor codes, int tables, int entries, int column_block=0) -> Tensor");
  // Codes uint8 [out, columns] as the kernels read them, and back.
  m.def("codebook_pack(Tensor codes, int entries, int column_block=0) -> Tensor");
  m.def("codebook_unpack(Tensor packed, int entries, int columns, int column_block=0) -> Tensor");
  // Rows of such a weight [rows, columns] by indices int32 or int64 [...], as float32 or bfloat16 [..., columns]; the
  // row padding_idx (-1 for none) gives the codebook no gradient
  m.def(
      "codebook_embedding(Tensor indices, Tensor codes, Tensor codebook, int columns, int column_block=0, int "
      "padding_idx=-1, ScalarType? dtype=None) -> Tensor");
  // The same without autograd: for callers that know gradients to be off.
  m.def(
      "codebook_embedding_inference(Tensor indices, Tensor codes, Tensor codebook, int columns, int column_block=0, "
      "int padding_idx=-1, ScalarType? dtype=None) -> Tensor");
  // Its adjoint in codebook: grad float32 [..., columns] -> float32 [tables, entries]
  m.def(
      "codebook_embedding_reduce(Tensor grad, Tensor indices, Tensor codes, int tables, int entries, int "
      "column_block=0, int padding_idx=-1) -> Tensor");

  // x [..., in] and a weight [out, in] with one bit for each weight; values float32, bfloat16, uint8 codes beside a
  // codebook, or int8 beside scales [out]; mode "exact" or, with int8 values, "int8" -> [..., out]
  m.def(
      "bitmap_matmul(Tensor x, Tensor bitmap, Tensor row_offsets, Tensor values, Tensor? bias=None, Tensor? "
      "codebook=None, Tensor? scales=None, str mode='exact', bool relu=False) -> Tensor");
  // The same without autograd: for callers that know gradients to be off.
  m.def(
      "bitmap_matmul_inference(Tensor x, Tensor bitmap, Tensor row_offsets, Tensor values, Tensor? bias=None, Tensor? "
      "codebook=None, Tensor? scales=None, str mode='exact', bool relu=False) -> Tensor");
  // The same for x with many zeros, which are skipped, and a weight kept by columns: bitmap [in, words] and
  // column_offsets [in + 1] are those of the transposed weight -> [..., out_features]
  m.def(
      "bitmap_columns_matmul(Tensor x, Tensor bitmap, Tensor column_offsets, Tensor values, Tensor? bias, Tensor? "
      "codebook, int out_features, bool relu=False) -> Tensor");
  m.def(
      "bitmap_columns_matmul_inference(Tensor x, Tensor bitmap, Tensor column_offsets, Tensor values, Tensor? bias, "
      "Tensor? codebook, int out_features, bool relu=False) -> Tensor");
  // A dense weight [out, in] -> bitmap int64 [out, words], row_offsets int32 [out + 1], values [nnz].
  m.def("bitmap_pack(Tensor weight) -> (Tensor, Tensor, Tensor)");
  // Compressed sparse rows -> bitmap; their values are in its order.
  m.def("bitmap_from_rows(Tensor row_offsets, Tensor col_indices, int columns) -> Tensor");
  // bitmap and row_offsets -> col_indices int32 [nnz]
  m.def("bitmap_to_rows(Tensor bitmap, Tensor row_offsets, int columns, int nnz) -> Tensor");

  // x [N, C, H, W] and a dense weight [O, C / groups * kh * kw] kept as codes, as codebook_matmul takes it; mode
  // "exact", "bfloat16" or "int8"; at least 0 with relu -> [N, O, H', W']
  m.def(
      "codebook_conv2d(Tensor x, Tensor codes, Tensor codebook, Tensor? bias, int column_block, int[] kernel_size, "
      "int[] stride, int[] padding, int[] dilation, int groups, bool relu=False, str mode='exact') -> Tensor");
  // The same without autograd: for callers that know gradients to be off.
  m.def(
      "codebook_conv2d_inference(Tensor x, Tensor codes, Tensor codebook, Tensor? bias, int column_block, int[] "
      "kernel_size, int[] stride, int[] padding, int[] dilation, int groups, bool relu=False, str mode='exact') -> "
      "Tensor");

  // x [N, C, H, W] and a weight [O, C / groups * kh * kw] in compressed sparse rows, at least 0 with relu; mode
  // "exact", "bfloat16" or "int8" -> [N, O, H', W']
  m.def(
      "sparse_conv2d(Tensor x, Tensor row_offsets, Tensor col_indices, Tensor values, Tensor? bias, Tensor? codebook, "
      "int[] kernel_size, int[] stride, int[] padding, int[] dilation, int groups, bool relu=False, str mode='exact') "
      "-> Tensor");
  // The same without autograd: for callers that know gradients to be off.
  m.def(
      "sparse_conv2d_inference(Tensor x, Tensor row_offsets, Tensor col_indices, Tensor values, Tensor? bias, Tensor? "
      "codebook, int[] kernel_size, int[] stride, int[] padding, int[] dilation, int groups, bool relu=False, str "
      "mode='exact') -> Tensor");
  // The same with a weight that sparse_conv2d_pack has laid out, and without autograd; or with one that
  // sparse_conv2d_pack_words has, whose values say the mode.
  m.def(
      "sparse_conv2d_packed(Tensor x, Tensor blocks, Tensor segments, Tensor indices, Tensor values, Tensor? bias, "
      "Tensor? codebook, int out_channels, int channel_block, int[] kernel_size, int[] stride, int[] padding, int[] "
      "dilation, int groups, bool relu=False, Tensor? row_scales=None, Tensor? row_sums=None) -> Tensor");
  // A weight in compressed sparse rows -> blocks, segments, indices and where each non-zero comes from.
  m.def(
      "sparse_conv2d_pack(Tensor row_offsets, Tensor col_indices, int in_channels, int channel_block, int[] "
      "kernel_size, int[] stride, int[] dilation, int groups) -> (Tensor, Tensor, Tensor, Tensor)");
  // One with float values, rounded -> blocks, segments, indices, words bfloat16 [n, 2] or int8 [n, 4] of neighbouring
  // channels, and for int8 row_scales [O] and row_sums [O]
  m.def(
      "sparse_conv2d_pack_words(Tensor row_offsets, Tensor col_indices, Tensor values, int in_channels, int "
      "channel_block, int[] kernel_size, int[] stride, int[] dilation, int groups, str mode) -> (Tensor, Tensor, "
      "Tensor, Tensor, Tensor, Tensor)");
  // The channel_block to pack with, in words where the mode has them.
  m.def(
      "sparse_conv2d_channel_block(int in_channels, int[] kernel_size, int[] stride, int[] dilation, int groups=1, str "
      "mode='exact') -> int");

  // x [N, C, H, W] through stages of three 1-D filters for each map, float32 [numbers] each as flat_conv2d_pack lays
  // them out; sizes are out_channels, rank, kernel_size, stride and padding, 8 numbers for each stage; at least 0 with
  // relu -> [N, O, H', W']. No default: autograd of an op that takes a list wants every argument.
  m.def("flat_conv2d(Tensor x, Tensor[] stages, int[] sizes, bool relu) -> Tensor");
  // The same without autograd: for callers that know gradients to be off.
  m.def("flat_conv2d_inference(Tensor x, Tensor[] stages, int[] sizes, bool relu) -> Tensor");

  // x [..., in] and a weight [out, in] of shared sub-vectors: packed codes uint8 and codebooks float32 [stages,
  // segments or 1, width, entries]; mode "exact" or "int8" -> [..., out]
  m.def(
      "product_matmul(Tensor x, Tensor codes, Tensor codebooks, Tensor? bias, int out_features, str mode='exact', bool "
      "relu=False) -> Tensor");
  // The same without autograd: for callers that know gradients to be off.
  m.def(
      "product_matmul_inference(Tensor x, Tensor codes, Tensor codebooks, Tensor? bias, int out_features, str "
      "mode='exact', bool relu=False) -> Tensor");
  // That weight -> float32 [out, in]
  m.def("product_decode(Tensor codes, Tensor codebooks, int out_features, int in_features) -> Tensor");

  // Signs of x float [..., in] as bits, 0 where x >= 0, else 1 -> int64 [..., ceil(in / 64)]
  m.def("sign_pack(Tensor x) -> Tensor");
  // x, packed signs int64 [..., words] or float [..., in] of which the signs count, and a weight of signs int64 [tiles,
  // words, 32] as xnor_pack lays it out, words >= ceil(in / 64) -> int32 [..., out]; float32 with scale or bias; with
  // thresholds int32 [out] packed signs
  m.def(
      "xnor_matmul(Tensor x, Tensor weight, int in_features, int out_features, Tensor? scale=None, Tensor? bias=None, "
      "Tensor? thresholds=None) -> Tensor");

  // x float [..., in] and such a weight of signs [out, in] -> scale * (x * W^T) + bias, at least 0 with relu
  m.def(
      "sign_matmul(Tensor x, Tensor weight, int out_features, Tensor? scale=None, Tensor? bias=None, bool relu=False) "
      "-> Tensor");
  // The same without autograd: for callers that know gradients to be off.
  m.def(
      "sign_matmul_inference(Tensor x, Tensor weight, int out_features, Tensor? scale=None, Tensor? bias=None, bool "
      "relu=False) -> Tensor");
  // step * x - zero for x uint8 [..., in], with such a weight of signs; the outputs of xnor_matmul
  m.def(
      "bitplane_matmul(Tensor x, Tensor weight, int in_features, int out_features, int step=1, int zero=0, Tensor? "
      "scale=None, Tensor? bias=None, Tensor? thresholds=None) -> Tensor");
  // The same for images x uint8 [N, C, H, W] and a weight [O, C * kh * kw]; nothing is added outside the borders. The
  // outputs of xnor_conv2d
  m.def(
      "bitplane_conv2d(Tensor x, Tensor weight, int out_channels, int[] kernel_size, int[] stride, int[] padding, "
      "int[] "
      "dilation, int step=1, int zero=0, Tensor? scale=None, Tensor? bias=None, Tensor? thresholds=None) -> Tensor");

  // Signs of images: x float [N, C, H, W] -> int64 [N, H, W, ceil(C / 64)]
  m.def("sign_pack_images(Tensor x) -> Tensor");
  // x, such packed images or float [N, C, H, W] of which the signs count, and a weight of signs int32 [tiles, kh, kw,
  // 2 * words, 32] as xnor_conv2d_pack lays it out; outside its borders x is padding_value, 0, 1 or -1 -> int32 [N, O,
  // H', W'], float32 with scale or bias, with thresholds int32 [O] packed images
  m.def(
      "xnor_conv2d(Tensor x, Tensor weight, int in_channels, int out_channels, int[] kernel_size, int[] stride, int[] "
      "padding, int[] dilation, int groups, int padding_value=0, Tensor? scale=None, Tensor? bias=None, Tensor? "
      "thresholds=None) -> Tensor");
  // The largest sign in each window of packed images int64 [N, H, W, words], turned round where a bit of flips int64
  // [words] is 1 -> [N, H', W', words]
  m.def(
      "sign_max_pool2d(Tensor x, int[] kernel_size, int[] stride, int[] padding, int[] dilation, bool ceil_mode=False, "
      "Tensor? flips=None) -> Tensor");

  // x float [...] rounded to fixed point <integer_bits, fraction_bits>; rounding "nearest" or "stochastic", of which
  // the random bits of value i are those of number offset + i under seed -> x's dtype
  m.def(
      "fixed_round(Tensor x, int integer_bits, int fraction_bits, str rounding='nearest', int seed=0, int offset=0) -> "
      "Tensor");
  // The same without autograd: for callers that know gradients to be off.
  m.def(
      "fixed_round_inference(Tensor x, int integer_bits, int fraction_bits, str rounding='nearest', int seed=0, int "
      "offset=0) -> Tensor");
  // The whole numbers of steps instead: int8, int16 or int32 [...]
  m.def(
      "fixed_round_whole(Tensor x, int integer_bits, int fraction_bits, ScalarType dtype, str rounding='nearest', int "
      "seed=0, int offset=0) -> Tensor");

  // weight int8 or int16 [out, in], whose columns are `segments` equal parts -> packed, of its dtype [panels, words +
  // 1, 16, numbers of 4 bytes]: panels of 16 rows, each part filled up to words of 4 bytes, and one more word a row
  m.def("fixed_pack(Tensor weight, int segments=1) -> Tensor");
  // x int8 or int16 [..., in], a packed weight at least as wide and of one segment, bias int64 [rows] in units of their
  // sums, 2^-sum_fraction_bits; sums are exact and converted once, to <integer_bits, fraction_bits>, at least 0 with
  // relu -> [..., rows] of dtype, whole numbers of steps in int8, int16 or int32, or float32
  m.def(
      "fixed_matmul(Tensor x, Tensor packed, Tensor? bias, int rows, int sum_fraction_bits, int integer_bits, int "
      "fraction_bits, ScalarType dtype, str rounding='nearest', int seed=0, int offset=0, bool relu=False) -> Tensor");
  // x int8 or int16 [N, C, H, W], packed weights [rows, kernel * channels], the channels of a pixel together, group by
  // group: of kernel_size[0] segments where there is one group and no dilation across, else one for each pixel; the
  // rest as fixed_matmul, to the nearest -> [N, rows, H', W'] in the memory format of x
  m.def(
      "fixed_conv2d(Tensor x, Tensor packed, Tensor? bias, int rows, int[] kernel_size, int[] stride, int[] padding, "
      "int[] dilation, int groups, int sum_fraction_bits, int integer_bits, int fraction_bits, ScalarType dtype, bool "
      "relu=False) -> Tensor");
}
