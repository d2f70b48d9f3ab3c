// The product of signs with a weight of signs, by exclusive or and population count.
//
// Math:   for w and x of +1 and -1, dot[n][r] = sum_c w[r][c] * x[n][c] = columns - 2 * popcount(w[r] ^ x[n]), exact.
//         y[n][r] = dot (int32), fma(dot, scale[r], bias[r]) (float32), or a bit that is 0, for +1, where
//         dot[n][r] >= thresholds[r], else 1: the sign that a batch norm behind the product leaves, and the x of the
//         next one.
// Layout: x [samples, words] as kernels/sign_pack lays them out; weight [tiles][words][32], the words of a tile's 32
//         rows side by side, rows past the last all 0. y row-major [samples, rows], or bits [samples, ceil(rows / 64)]
//         as x has them. Bits past the columns are 0 in both, so they never differ.
// Limits: the full adder of vpternlogq takes two words and a sum of earlier ones, and hands on one carry to count: 3
//         of these, a vpopcntq and an addition for 1,024 products, 2.5 cycles on Intel's two 512-bit ports, where xor,
//         vpopcntq and addition of each word take 3. 2 samples and 4 vectors of rows are 8 such chains; loads, 6 for
//         20 operations, stay behind. One sample reads an eighth of a byte for each product: the cache it comes from.
//         AVX2 has no vpternlogq: lookups of kernels/common/sign_counts.h count 256 products a cycle of three ports;
//         a single sample, which would not repay the vectors of nibbles, goes through the adder, 110 a cycle.
// Source: Courbariaux et al., Binarized Neural Networks (2016), section 1.4; Rastegari et al., XNOR-Net (2016),
//         section 3.2, for the scale; Harley and Seal's counter (Warren, Hacker's Delight, section 5-1) for the adder.
//
// Single-threaded, and a number does not depend on how the caller splits the work; the same bits at every level. No
// pointer needs to be aligned.
#pragma once

#include <cstdint>

#include "kernels/common/export.h"

namespace tersetorch {

inline constexpr std::int64_t kXnorRows = 32;  // of a tile
// Samples of a call that meet the tiles one after the other: their bits stay in the second cache level.
inline constexpr std::int64_t kXnorSamples = 256;

static inline std::int64_t XnorTiles(std::int64_t rows) { return (rows + kXnorRows - 1) / kXnorRows; }

struct XnorMatmulArgs {
  const std::uint64_t* x;       // [samples, words]
  const std::uint64_t* weight;  // [tiles, words, 32]
  std::int64_t samples, words, columns, rows;
  const float* scale;              // [rows] or null for 1
  const float* bias;               // [rows] or null for 0
  const std::int32_t* thresholds;  // [rows], or null where y is no bits
  // Exactly one of these.
  std::int32_t* dots;
  float* floats;
  std::uint64_t* bits;
};

// The rows of tiles [tile_begin, tile_end), with bits those of whole words: an even tile_begin, and an even tile_end or
// the last.
TERSETORCH_API void XnorMatmul(const XnorMatmulArgs& args, std::int64_t tile_begin, std::int64_t tile_end) noexcept;

// The variants, hidden in the library; the kernel tests link them directly.
using XnorMatmulVariant = void (*)(const XnorMatmulArgs&, std::int64_t, std::int64_t) noexcept;
extern const XnorMatmulVariant kXnorMatmulScalar;
extern const XnorMatmulVariant kXnorMatmulAvx2;
extern const XnorMatmulVariant kXnorMatmulAvx512;

}  // namespace tersetorch
