// y = relu?((x * W^T) * scale + bias) for numbers x and a weight W of signs: additions and subtractions.
//
// Math:   dot[n][r] = sum over groups g of 4 columns of ((+-x0 +- x1) + (+-x2 +- x3)), one group after the other, in
//         float32, with the signs of w[r]; y[n][r] = fma(dot, scale[r], bias[r]), at least 0 with relu. The order is
//         the same at every level and for every number of samples and threads, so y has the same bits.
// Layout: weight as kernels/xnor_matmul has it, a set bit for -1, so that one weight serves both products. x past the
//         columns counts as 0, whatever the bits there.
// Limits: SignMatmulTables computes the 16 sums of each group once a sample, 64 bytes: one register, in which vpermps
//         finds those of 16 rows by 4 bits of each. A permutation and an addition for 64 products are one cycle of
//         Intel's two 512-bit ports, where fused multiplications take two; what shifts the bits serves all samples of
//         a call, and with one of them makes it 1.5. Making tables is 4 cycles for each 4 columns. AVX2 keeps the 8
//         sums in which the fourth number is added, and takes the others' negatives: a permutation, an exclusive or and
//         an addition for 32 products.
// Source: Courbariaux et al., BinaryConnect (2015), section 2.1: a network of additions.
//
// Single-threaded. No pointer but that to tables needs to be aligned.
#pragma once

#include <cstdint>

#include "kernels/common/export.h"
#include "kernels/common/float_dtype.h"
#include "kernels/xnor_matmul/xnor_matmul.h"

namespace tersetorch {

inline constexpr std::int64_t kSignMatmulSamples = 8;            // the most of a call
inline constexpr std::int64_t kSignMatmulTableFloats = 16 * 16;  // of a word and sample

struct SignTablesArgs {
  const void* x;  // [samples, columns]
  FloatDtype stored_as;
  std::int64_t samples, columns;
  float* tables;  // [words][samples][kSignMatmulTableFloats], as the level likes them
};

struct SignMatmulArgs {
  const std::uint64_t* weight;  // [tiles][words][32]
  const float* tables;
  std::int64_t samples, words, rows;  // 1, 2, 4 or 8 samples
  const float* scale;                 // [rows] or null for 1
  const float* bias;                  // [rows] or null for 0
  bool relu;
  void* y;  // [samples, rows]
  FloatDtype y_stored_as;
};

// The tables of words [word_begin, word_end).
TERSETORCH_API void SignMatmulTables(const SignTablesArgs& args, std::int64_t word_begin,
                                     std::int64_t word_end) noexcept;

// The rows of tiles [tile_begin, tile_end), from tables made at the same level.
TERSETORCH_API void SignMatmul(const SignMatmulArgs& args, std::int64_t tile_begin, std::int64_t tile_end) noexcept;

// The variants, hidden in the library; the kernel tests link them directly.
struct SignMatmulKernels {
  void (*tables)(const SignTablesArgs&, std::int64_t, std::int64_t) noexcept;
  void (*multiply)(const SignMatmulArgs&, std::int64_t, std::int64_t) noexcept;
};
extern const SignMatmulKernels kSignMatmulScalar;
extern const SignMatmulKernels kSignMatmulAvx2;
extern const SignMatmulKernels kSignMatmulAvx512;

}  // namespace tersetorch
