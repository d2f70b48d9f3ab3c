// y = x * W^T + bias in fixed point: whole numbers, exact sums, one conversion for each dot product.
//
// Math:   FixedMatmul: sums[n][r] = sum_c x[n][c] * w[r][c], exactly, in 64 bits, for int8 or int16 x and W of at most
//         kFixedMaxColumns columns. FixedConvert: what kernels/fixed_round rounds the number s * 2^-F to, F the
//         fraction bits of x and of W together and s = sums[n][r] + added[r], k steps of <IL,FL>, saturated, at least 0
//         with relu. With d = F - FL: k = floor(s / 2^d + 1/2), or stochastic with random bits u k = floor((floor(s /
//         2^(d-16) + 1/2) + u) / 65536); where d < 0 there is nothing to round. Value [n][r] has number offset + n *
//         y_stride + r.
// Layout: words of 4 bytes, 4 numbers of int8 or 2 of int16. x: a sample is `segments` runs of segment_words words; its
//         int8 are raised by 128, to be unsigned. W: panels of 16 rows, [words][16 rows], columns past a segment's last
//         as 0, and a last 16 words: of int8 the sums of the rows, by 128 times which raised x makes the sums too
//         large; of int16 the largest |w| of each row.
// Exact:  lanes of 32 bits add chunk_words words, then 64 bits add these. Of int8 that is 255 * 128 * 4 a word, so
// 16,384
//         of them; of int16 2 |x| |w|. Where the largest |x| and |w| leave fewer than kFixedFewWords, x is split into
//         256 * high + low, two samples of at most 2^7, of which 255 words fit whatever W is.
// Limits: of int8 AVX-512 multiplies 64 pairs an instruction (vpdpbusd), of int16 32 (vpdpwssd), two a cycle: 2 * 1024
// *
//         1024 operations a sample at 766 G/s are 2.7 us, twice that in int16. A tile of 64 rows and 6 samples loads 10
//         registers for 24 such instructions. One sample reads 1 MiB of W from the second cache level: 7 us at 48 bytes
//         a cycle. AVX2 widens to 16 bits and multiplies 16 pairs with 2 instructions (vpmaddwd: vpmaddubsw saturates).
//         For many samples 512 columns of a tile, 32 KiB, stay in the first cache level.
// Source: Gupta et al., Deep Learning with Limited Numerical Precision (2015), section 3.2: z = sum a_i b_i is kept
// exact.
//
// Single-threaded. No pointer needs to be aligned.
#pragma once

#include <cstdint>

#include "kernels/common/export.h"
#include "kernels/fixed_round/fixed_round.h"

namespace tersetorch {

inline constexpr std::int64_t kFixedMaxColumns = (1 << 24) - 1;  // the sum of an int8 row fits 32 bits
inline constexpr std::int64_t kFixedPanel = 16;                  // rows
inline constexpr std::int64_t kFixedTilePanels = 4;
inline constexpr std::int64_t kFixedTile = kFixedTilePanels * kFixedPanel;
inline constexpr std::int64_t kFixedWord = 4;  // bytes
inline constexpr std::int64_t kFixedFewWords = 16;
inline constexpr std::int64_t kFixedMostBias = std::int64_t{1} << 61;  // and least; beyond, it counts as that

inline std::int64_t FixedNumbersOfWord(bool wide) { return wide ? 2 : 4; }

struct FixedPackArgs {
  const void* weight;  // [rows, columns]
  bool wide;           // int16, else int8
  std::int64_t rows, columns, segments;
  void* packed;  // [panels, words + 1, 16] words
};

// Panels [begin, end).
TERSETORCH_API void FixedPack(const FixedPackArgs& args, std::int64_t begin, std::int64_t end) noexcept;

struct FixedSamplesArgs {
  const void* x;  // [samples, columns]
  bool x_wide, wide, split;
  std::int64_t columns;
  void* to;  // [samples, words] or, split, [samples, 2, words], high before low
};

// Samples [begin, end) as FixedMatmul takes them.
TERSETORCH_API void FixedSamples(const FixedSamplesArgs& args, std::int64_t begin, std::int64_t end) noexcept;

// The largest |number| of `count` int16.
TERSETORCH_API std::int64_t FixedLargest(const void* numbers, std::int64_t count) noexcept;

struct FixedMatmulArgs {
  const void* x;
  bool wide;
  std::int64_t samples, segments, segment_words, chunk_words;
  const std::int64_t* sample_at;   // [samples], bytes from x
  const std::int64_t* segment_at;  // [segments], bytes from a sample
  const void* packed;
  std::int64_t* sums;  // [samples, kFixedTile]
};

struct FixedConvertArgs {
  const std::int64_t* sums;  // [samples, sums_stride] or, split, [samples, 2, sums_stride]
  std::int64_t sums_stride;
  bool split;
  const std::int64_t* added;  // [rows] or null, within kFixedMostBias
  std::int64_t rows, y_stride;
  int sum_fraction_bits, integer_bits, fraction_bits;
  bool stochastic, relu;
  std::uint64_t seed, offset;
  void* y;     // [samples, y_stride]
  FixedAs as;  // kFloats: float32
};

// Of all samples, `panels` panels from one on, at most kFixedTilePanels.
TERSETORCH_API void FixedMatmul(const FixedMatmulArgs& args, std::int64_t panel, std::int64_t panels) noexcept;
// Samples [begin, end).
TERSETORCH_API void FixedConvert(const FixedConvertArgs& args, std::int64_t begin, std::int64_t end) noexcept;

// The variants, hidden in the library; the kernel tests link them directly.
struct FixedMatmulKernels {
  void (*multiply)(const FixedMatmulArgs&, std::int64_t, std::int64_t) noexcept;
  void (*convert)(const FixedConvertArgs&, std::int64_t, std::int64_t) noexcept;
};
extern const FixedMatmulKernels kFixedMatmulScalar;
extern const FixedMatmulKernels kFixedMatmulAvx2;
extern const FixedMatmulKernels kFixedMatmulAvx512;

}  // namespace tersetorch
