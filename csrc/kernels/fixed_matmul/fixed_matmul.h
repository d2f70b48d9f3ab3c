// y = x * W^T + bias in fixed point: whole numbers, exact sums, one conversion for each dot product.
//
// Math:   FixedMatmul: sum[n][r] = bias[r] + sum_c x[n][c] * w[r][c], exactly, in 64 bits, for int8 or int16 x and W of
// at
//         most kFixedMaxColumns columns; a bias beyond +-2^61 counts as that. A unit of a sum is 2^-F, F the fraction
//         bits of x and of W together. FixedConvert: what kernels/fixed_round rounds the number sum * 2^-F to, k steps
//         of <IL,FL>, saturated, at least 0 with relu. With d = F - FL: k = floor(sum / 2^d + 1/2), or stochastic with
//         random bits u k = floor((floor(sum / 2^(d-16) + 1/2) + u) / 65536); where d < 0 there is nothing to round.
//         Value i, row-major in [samples, rows], has number offset + i.
// Layout: x row-major [samples, columns], W row-major [rows, columns].
// Limits: of int8 AVX-512 multiplies 64 pairs an instruction (vpdpbusd, x raised by 128, what that adds is taken off by
//         the sums of the rows), of int16 32 (vpdpwssd), AVX2 16 with 2 instructions (vpmaddwd). A tile of 8 rows and 2
//         samples loads 10 registers for 16 such instructions, 5 cycles beside 8, the rows from the first cache level,
//         of which 2 KiB each are multiplied with all samples, the samples from the second. Lanes of 32 bits take as
//         many products as the largest |x| and |w| at hand cannot overflow (at least one); adding them to 64 bits takes
//         4 operations and memory: every 4 steps where both are near 2^14, once a chunk where their product is below
//         2^25.
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

struct FixedMatmulArgs {
  const void* x;       // [samples, columns]
  const void* weight;  // [rows, columns]
  bool wide;           // int16, else int8
  std::int64_t samples, columns, rows;
  const std::int64_t* bias;  // [rows] or null
  std::int64_t* sums;        // [samples, rows]
};

struct FixedConvertArgs {
  const std::int64_t* sums;
  int sum_fraction_bits, integer_bits, fraction_bits;
  bool stochastic, relu;
  std::uint64_t seed, offset;
  void* y;
  FixedAs as;  // kFloats: float32
};

// Rows [row_begin, row_end) of all samples.
TERSETORCH_API void FixedMatmul(const FixedMatmulArgs& args, std::int64_t row_begin, std::int64_t row_end) noexcept;
// Values [begin, end).
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
