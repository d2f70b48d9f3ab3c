// y = relu?(x * W^T + bias) for few samples and a sparse weight W kept as one bit for each weight and its non-zeros.
//
// Math:   y[n][r] = sum over the set bits c of row r, in order, of w[k] * x[n][c] + bias[r], at least 0 with relu,
// where
//         k counts the set bits from row_offsets[r]. w[k] is values[k], codebook[values[k]], or scales[r] * values[k]
//         for int8. Everything is accumulated in float32.
//         With quantized x (int8 values only): q[n][c] = x[n][c] / s[n] to the nearest integer, s[n] = max_c |x[n][c]|
//         / 127, and y[n][r] = s[n] * scales[r] * sum of values[k] * q[n][c] + bias[r]. The sum is exact in int32, so
//         that every level gives the same bits. A sample with an infinity or NaN gives NaN.
// Layout: bitmap [rows, words], words = ceil(columns / 64), column 64 w + j is bit j of word w; bits past the last
// column
//         are 0. values [nnz], row after row. x comes in panels that pack_samples makes, in the order that a level's
//         expansion leaves the weights in; bitmap and values do not depend on the level.
// Limits: Intel, AVX-512: mask moves (1), expansions (2) and permutations share port 5. 64 weights cost 3 cycles in
//         int8 (mask, expansion; products on port 0), 7 in codes (and 4 permutations; 4 products and 3 shifts on port
//         0), 12 in float32 (4 masks, 4 expansions), at any density: below about 17 % of codes and 30 % of float32
//         values one gather per non-zero (csr_matmul) is faster.
// Safety: no bit is followed out of its row's values, and no code is used outside the codebook: a row whose bits do not
//         count its values, or with a code outside, ends the call with the status; what was written by then is of no
//         use.
// Source: Rhu et al., Compressing DMA Engine (2018), section IV: one bit for each value, then the packed non-zeros;
//         EIE (Han et al., 2016) for leaving zeros out of a product with one sample.
//
// Single-threaded, and a number does not depend on how the caller splits the work. No pointer needs to be aligned.
#pragma once

#include <cstdint>

#include "kernels/common/export.h"
#include "kernels/common/float_dtype.h"

namespace tersetorch {

inline constexpr std::int64_t kBitmapMaxSamples = 4;
inline constexpr std::int64_t kBitmapMaxEntries = 256;
// As many products of 8-bit numbers surely fit int32.
inline constexpr std::int64_t kBitmapMaxQuantizedColumns = 131072;

enum class BitmapValues : int { kFloat32, kBFloat16, kCodes, kInt8 };
enum class BitmapStatus : int { kOk, kBadRowOffsets, kBadBitmap, kBadCode };

struct BitmapWeight {
  const std::uint64_t* bitmap;      // [rows, ceil(columns / 64)]
  const std::int32_t* row_offsets;  // [rows + 1]
  const void* values;               // [nnz], as stored_as says; codes are uint8
  BitmapValues stored_as;
  const float* codebook;  // [entries], for codes only; the first, which absent weights read, is 0
  std::int64_t entries;
  const float* scales;  // [rows], for int8 only
  std::int64_t rows, columns, nnz;
};

struct BitmapSamplesArgs {
  const void* x;  // [samples, columns]
  FloatDtype x_stored_as;
  std::int64_t samples;  // 1 to kBitmapMaxSamples
  std::int64_t columns;
  BitmapValues values_stored_as;
  std::int64_t entries;  // of the codebook, for codes only
  bool quantized;
  void* panel;      // BitmapPanelBytes, written
  float* x_scales;  // [samples], written when quantized
};

struct BitmapMatmulArgs {
  BitmapWeight weight;
  const void* panel;
  std::int64_t samples;
  bool quantized;
  bool plain;             // what pack_samples returned
  const float* x_scales;  // [samples], when quantized
  const float* bias;      // [rows] or null
  bool relu;
  void* y;  // [samples, rows]
  FloatDtype y_stored_as;
};

// One sample by a weight kept by columns, whose zeros are skipped with all that they would have met: the bitmap is that
// of W^T, so that `rows` and `columns` here are those of W^T, its columns and rows. Values in float32, bfloat16 or
// codes.
struct BitmapColumnsArgs {
  BitmapWeight weight;
  const std::int32_t* active;  // [count], the non-zeros of x, in order
  const float* x;              // [count], their values
  std::int64_t count;
  bool plain;         // x is not all finite, or should be multiplied by the scalar level
  float* sums;        // [words * 64], scratch
  const float* bias;  // [weight.columns] or null
  bool relu;
  void* y;  // [weight.columns]
  FloatDtype y_stored_as;
};

struct BitmapPackArgs {
  const void* weight;  // [rows, columns]
  FloatDtype stored_as;
  std::int64_t rows, columns;
  std::uint64_t* bitmap;      // [rows, words]
  std::int32_t* row_offsets;  // [rows + 1]; BitmapPackBits writes the number of non-zeros of row r to [r + 1]
  void* values;               // [nnz], of the weight's dtype
};

// How a sample whose largest magnitude is `largest` is quantized: q = x * inverse, x = q * scale.
struct BitmapScale {
  float scale, inverse;
};

// Local to each file that includes them, like all that instruction set files call.
namespace {

[[maybe_unused]] std::int64_t BitmapWords(std::int64_t columns) { return (columns + 63) / 64; }

// Bytes of a panel of so many samples, enough for every level and way of storing; a group of three takes the room of
// four.
[[maybe_unused]] std::int64_t BitmapPanelBytes(std::int64_t columns, std::int64_t samples) {
  return BitmapWords(columns) * 64 * (samples == 3 ? 4 : samples) * 4;
}

// Numbers so small that 127 / largest is no number count as 0.
[[maybe_unused]] BitmapScale BitmapScaleOf(float largest) {
  if (!(largest <= 3.4028234e38f)) return {__builtin_nanf(""), 0.0f};
  const float inverse = largest == 0 ? 0.0f : 127.0f / largest;
  if (!(inverse <= 3.4028234e38f)) return {0.0f, 0.0f};
  return {largest / 127.0f, inverse};
}

}  // namespace

// Lays out x for the products of one kind of weight. Returns whether it did so as the scalar level does, which then
// multiplies too.
TERSETORCH_API bool BitmapPackSamples(const BitmapSamplesArgs& args) noexcept;

// Rows [row_begin, row_end) of y.
TERSETORCH_API BitmapStatus BitmapMatmul(const BitmapMatmulArgs& args, std::int64_t row_begin,
                                         std::int64_t row_end) noexcept;

// Lists the non-zeros of x [features] in active and values, both [features]; returns how many there are, and in
// `finite` whether all of them are.
TERSETORCH_API std::int64_t BitmapFindActive(const void* x, FloatDtype x_stored_as, std::int64_t features,
                                             std::int32_t* active, float* values, bool* finite) noexcept;

// The outputs of words [word_begin, word_end). A call meets only damage in its words, but for that of the offsets.
TERSETORCH_API BitmapStatus BitmapColumns(const BitmapColumnsArgs& args, std::int64_t word_begin,
                                          std::int64_t word_end) noexcept;

// Packing a dense weight, by ranges of rows: its bits and how many of them are set; then, once row_offsets are summed
// up, its values. 0 and -0 are left out, NaN is kept.
TERSETORCH_API void BitmapPackBits(const BitmapPackArgs& args, std::int64_t row_begin, std::int64_t row_end) noexcept;
TERSETORCH_API void BitmapPackValues(const BitmapPackArgs& args, std::int64_t row_begin, std::int64_t row_end) noexcept;

// The bits of valid compressed sparse rows, whose columns rise in each row.
TERSETORCH_API void BitmapFromColumns(const std::int32_t* row_offsets, const std::int32_t* col_indices,
                                      std::int64_t columns, std::uint64_t* bitmap, std::int64_t row_begin,
                                      std::int64_t row_end) noexcept;

// The columns of the set bits, [nnz]; kBadBitmap when a row's bits do not count its values, or name no column.
TERSETORCH_API BitmapStatus BitmapToColumns(const std::uint64_t* bitmap, const std::int32_t* row_offsets,
                                            std::int64_t columns, std::int64_t nnz, std::int32_t* col_indices,
                                            std::int64_t row_begin, std::int64_t row_end) noexcept;

// The variants, hidden in the library; the kernel tests link them directly.
struct BitmapKernels {
  bool (*pack_samples)(const BitmapSamplesArgs&) noexcept;
  BitmapStatus (*matmul)(const BitmapMatmulArgs&, std::int64_t, std::int64_t) noexcept;
  BitmapStatus (*columns)(const BitmapColumnsArgs&, std::int64_t, std::int64_t) noexcept;
};
extern const BitmapKernels kBitmapScalar;
extern const BitmapKernels kBitmapAvx2;
extern const BitmapKernels kBitmapAvx512;

}  // namespace tersetorch
