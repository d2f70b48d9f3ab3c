// The product of 8-bit numbers with a weight of signs, exact: the first layer of a binary network.
//
// Math:   v = step * x - zero for x in [0, 255]; dot[n][r] = sum_c w[r][c] * v[n][c], the same as the sum over the
//         bits b of x of 2^b times the product of plane b with signs. y[n][r] = dot (int32), fma(dot, scale[r],
//         bias[r]) (float32), or the bit dot[n][r] < thresholds[r], as kernels/xnor_matmul has them.
// Layout: weight as kernels/xnor_matmul has it, a set bit for -1. v past the columns is 0, whatever the bits there. x
//         is row-major [samples, columns], or patches of images: sample n is a position of the output, its columns are
//         [channel][kernel row][kernel column], those outside the image have v = 0.
// Limits: eight planes of exclusive or and population count are 51 products a cycle. Instead BitplaneTables computes
//         the 16 sums that 4 columns can have under signs, in 16 bits, and vpermw finds those of 32 rows by 4 bits of
//         each: a permutation and an addition for 128 products are one cycle of Intel's two 512-bit ports, as are two
//         VNNI products, which would want the signs as bytes first. 32 of these sums fit 16 bits. AVX2 has two
//         shuffles, of low and of high bytes, and puts them together: 32 products an instruction, three a cycle.
//         A first layer of 27 columns looks up half of a word's; its 128 numbers for each position and the tables of a
//         patch take longer than its sums.
// Source: Courbariaux et al., Binarized Neural Networks (2016), section 1.5, equation 3: 8-bit inputs by planes; tables
//         as kernels/sign_matmul has them.
//
// Single-threaded; the same bits at every level. No pointer but that to tables needs to be aligned.
#pragma once

#include <cstdint>

#include "kernels/common/export.h"
#include "kernels/xnor_matmul/xnor_matmul.h"

namespace tersetorch {

inline constexpr std::int64_t kBitplaneSamples = 8;           // the most of a call
inline constexpr std::int64_t kBitplaneWordTables = 16 * 16;  // numbers of a word and sample
inline constexpr std::int32_t kBitplaneLargest = 255;         // magnitude of v
// As many columns surely fit int32.
inline constexpr std::int64_t kBitplaneMaxColumns = 8388608;

// Where the patches of images lie; strides in bytes.
struct BitplaneImages {
  std::int64_t height, width, out_height, out_width;
  std::int64_t image_stride, channel_stride, row_stride, column_stride;
  std::int64_t kernel_height, kernel_width, stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x;
};

struct BitplaneTablesArgs {
  const std::uint8_t* x;                 // rows of so many columns, or the first image
  const BitplaneImages* images;          // null, or positions of them stand for rows
  std::int64_t first, samples, columns;  // sample n is row first + n
  std::int32_t step, zero;
  std::int16_t* tables;  // [words][samples][kBitplaneWordTables], as the level likes them
};

struct BitplaneMatmulArgs {
  const std::uint64_t* weight;  // [tiles][words][32]
  const std::int16_t* tables;
  std::int64_t samples, words, rows;  // 1, 2, 4 or 8 samples
  const float* scale;                 // [rows] or null for 1
  const float* bias;                  // [rows] or null for 0
  const std::int32_t* thresholds;     // [rows], or null where y is no bits
  // Exactly one of these.
  std::int32_t* dots;
  float* floats;
  std::uint64_t* bits;
  std::int64_t columns;  // of words; what tables have past them counts for nothing
};

// The tables of words [word_begin, word_end).
TERSETORCH_API void BitplaneTables(const BitplaneTablesArgs& args, std::int64_t word_begin,
                                   std::int64_t word_end) noexcept;

// The rows of tiles [tile_begin, tile_end), from tables made at the same level; with bits those of whole words: an even
// tile_begin, and an even tile_end or the last.
TERSETORCH_API void BitplaneMatmul(const BitplaneMatmulArgs& args, std::int64_t tile_begin,
                                   std::int64_t tile_end) noexcept;

// The variants, hidden in the library; the kernel tests link them directly.
struct BitplaneMatmulKernels {
  void (*tables)(const BitplaneTablesArgs&, std::int64_t, std::int64_t) noexcept;
  void (*multiply)(const BitplaneMatmulArgs&, std::int64_t, std::int64_t) noexcept;
};
extern const BitplaneMatmulKernels kBitplaneMatmulScalar;
extern const BitplaneMatmulKernels kBitplaneMatmulAvx2;
extern const BitplaneMatmulKernels kBitplaneMatmulAvx512;

}  // namespace tersetorch
