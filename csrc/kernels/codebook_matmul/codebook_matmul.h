// y = relu?(x * W^T + bias) for a dense weight W kept as codes into tables of up to 256 values.
//
// Math:   y[n][r] = sum_c W[r][c] * x[n][c] + bias[r], at least 0 with relu, W[r][c] = codebook[t][code[r][c]] with t
//         the row, the block of columns, or 0. Accumulated in float32.
//         BFloat16: codebook and x are rounded to bfloat16, nearest, ties to even; their products are exact in float32.
//         Int8: x is q[n][c] * sample_scales[n] with int8 q (kernels/panels), a table is v * scale with int8 v =
//         round(codebook * 127 / m), scale = m / 127 and m the largest magnitude in the table, or in all of them where
//         blocks of columns have their own. y[n][r] = fma(sum_c v * q * lo, hi, bias[r]) with an exact integer sum, lo
//         the smaller and hi the larger scale: the same bits at every level. A table or sample that is not finite gives
//         NaN.
// Layout: codes as kernels/common/codes.h says. x comes in panels of 4-byte words that CodebookPackSamples makes:
//         [vectors][width][16] for width 1, 2, 4 or 8, [vectors][16][width] for 16, 32, 48 or 64. A chunk has one
//         vector for each field of a word, the columns in their order (float32); in int8 one for each field of a byte,
//         byte j of word l in vector f being column 16 (j * 8 / bits + f) + l. Level avx512bf16 has pairs in mode
//         BFloat16, half as many vectors: half j of word l in vector f is column 16 (j * 16 / bits + f) + l.
// Limits: AVX-512 on Intel (permutations of one register on port 5, two FMA a cycle), 4 bits, one sample: 128 codes
//         take 4 shifts, 8 permutations and 8 FMA, 10 cycles for 64 bytes in float32; a shift, 2 permutations and 2
//         products, 2.5 cycles, in int8, where memory is the limit: 30 GB/s for a core are 6.5 cycles. 8 bits, float32:
//         4 byte planes of 4 permutations, 16 shifts and selections to put them together, 21 cycles for 64 codes; 12
//         for 33 to 64 entries, 4 for at most 32. Up to 8 samples a weight is decoded in registers and used for all of
//         them; 16 rows meet a part of the panel that the first cache level holds, since the second gives less than one
//         vector a cycle: 40 cycles for 8 samples in float32, 9.5 in int8. For more, tiles of decoded rows in the first
//         cache level meet panels as in blocked_matmul, at 4 vectors of samples and 6 rows: 24 FMA for 10 loads.
// Safety: a code outside its table gives the status, and what was written by then is of no use; tables are filled up to
//         their width, so that nothing else is read. Vector levels check the codes that they decode: the largest of 8
//         bits, of fewer all their bits together, and only where these do not decide, each of them.
// Source: Han et al., Deep Compression (2016), section 3.2, for shared weights; their kernels are this project's own.
//
// Single-threaded, and a number does not depend on how the caller splits the rows. No pointer needs to be aligned.
#pragma once

#include <cstdint>

#include "kernels/common/codes.h"
#include "kernels/common/export.h"
#include "kernels/common/float_dtype.h"

namespace tersetorch {

// The most samples whose weights are decoded in registers, and that a panel has.
inline constexpr std::int64_t kCodebookFewSamples = 8;
inline constexpr std::int64_t kCodebookMaxWidth = 64;
// Rows whose sums a call with more samples keeps, and those past them that it may write; and what a table takes.
inline constexpr std::int64_t kCodebookRows = 192;
inline constexpr std::int64_t kCodebookSumRows = kCodebookRows + 12;
inline constexpr std::int64_t kCodebookTableBytes = 1024;
// As many products of 8-bit numbers surely fit int32.
inline constexpr std::int64_t kCodebookMaxQuantizedColumns = 131072;

enum class CodebookMode : int { kExact, kBFloat16, kInt8 };
enum class CodebookStatus : int { kOk, kBadCode };

struct CodebookSamplesArgs {
  const void* x;  // [samples, columns]
  FloatDtype stored_as;
  std::int64_t samples;  // <= width
  std::int64_t columns, column_block;
  int bits;
  CodebookMode mode;
  const float* inverses;  // [samples], for int8 only: of SampleScales
  void* panel;            // CodebookPanelBytes
  std::int64_t width;
  std::int32_t* sums;  // [width], for int8 only: sum_c q[n][c] is added to it, atomically
};

struct CodebookMatmulArgs {
  CodebookWeight weight;
  CodebookMode mode;
  const void* panel;
  std::int64_t width, samples;
  const float* sample_scales;       // [samples], for int8 only
  const std::int32_t* sample_sums;  // [width], for int8 only
  float table_scale;                // of all tables, for int8 without per_row
  float table_inverse;
  const float* bias;  // [rows] or null
  bool relu;
  void* y;  // [samples, rows], or as `places` says
  FloatDtype y_stored_as;
  float* sums;  // CodebookScratchBytes, where width is more than kCodebookFewSamples
  // Null, or where y[n][0] lies, [samples], negative for none; y[n][r] then lies r * place_step further. In numbers.
  const std::int64_t* places = nullptr;
  std::int64_t place_step = 0;
  // Null, or for exact samples that are no panel: sample n of column c is number offsets[c] + n of `panel`, [columns].
  // For kCodebookMaxWidth samples only.
  const std::int64_t* offsets = nullptr;
};

namespace {

[[maybe_unused]] std::int64_t CodebookPlace(const CodebookMatmulArgs& args, std::int64_t n, std::int64_t row) {
  return args.places == nullptr ? n * args.weight.rows + row : args.places[n] + row * args.place_step;
}

// Vectors of 16 words in a chunk of x.
constexpr int CodebookVectors(int bits, CodebookMode mode) { return (mode == CodebookMode::kInt8 ? 8 : 32) / bits; }

[[maybe_unused]] std::int64_t CodebookPanelBytes(std::int64_t row_bytes, int bits, CodebookMode mode,
                                                 std::int64_t width) {
  return row_bytes * CodebookVectors(bits, mode) * width;
}

// Sums [kCodebookSumRows, width], and the tables of as many rows as have their sums kept.
[[maybe_unused]] constexpr std::int64_t CodebookScratchBytes(std::int64_t width, bool per_row) {
  return kCodebookSumRows * width * 4 + (per_row ? kCodebookRows * kCodebookTableBytes : 0);
}

}  // namespace

// Chunks [chunk_begin, chunk_end) of the panel, of those that a row has.
TERSETORCH_API void CodebookPackSamples(const CodebookSamplesArgs& args, std::int64_t chunk_begin,
                                        std::int64_t chunk_end) noexcept;

// Rows [row_begin, row_end) of y, at most kCodebookRows where width is more than kCodebookFewSamples.
TERSETORCH_API CodebookStatus CodebookMatmul(const CodebookMatmulArgs& args, std::int64_t row_begin,
                                             std::int64_t row_end) noexcept;

// dense[r][c] = codebook[t][code[r][c]] for rows [row_begin, row_end) of dense, float32 [rows, columns].
TERSETORCH_API CodebookStatus CodebookDecode(const CodebookWeight& weight, float* dense, std::int64_t row_begin,
                                             std::int64_t row_end) noexcept;

// Its adjoint: sums[t][k] += the sum of grad[r][c] over the members (r, c) of entry k of table t, in rows [row_begin,
// row_end) of grad, float32 [rows, columns]; weight.codebook is not read.
TERSETORCH_API CodebookStatus CodebookReduce(const CodebookWeight& weight, const float* grad, double* sums,
                                             std::int64_t row_begin, std::int64_t row_end) noexcept;

// Lays codes [rows, columns], each below 2^bits, out as kernels/common/codes.h says, into [rows, CodeRowBytes]; and
// back.
TERSETORCH_API void CodebookPack(const std::uint8_t* codes, std::int64_t columns, std::int64_t column_block, int bits,
                                 std::uint8_t* packed, std::int64_t row_begin, std::int64_t row_end) noexcept;
TERSETORCH_API void CodebookUnpack(const std::uint8_t* packed, std::int64_t columns, std::int64_t column_block,
                                   int bits, std::uint8_t* codes, std::int64_t row_begin,
                                   std::int64_t row_end) noexcept;

// The variants, hidden in the library; the kernel tests link them directly.
struct CodebookKernels {
  void (*pack_samples)(const CodebookSamplesArgs&, std::int64_t, std::int64_t) noexcept;
  CodebookStatus (*matmul)(const CodebookMatmulArgs&, std::int64_t, std::int64_t) noexcept;
};
extern const CodebookKernels kCodebookScalar;
extern const CodebookKernels kCodebookAvx2;
extern const CodebookKernels kCodebookAvx512;
extern const CodebookKernels kCodebookAvx512Bf16;  // mode bfloat16 only

}  // namespace tersetorch
