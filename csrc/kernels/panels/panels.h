// Samples transposed in panels, so that one weight multiplies consecutive numbers.
//
// Math:   panel[c][n] = x[n][c] for n < samples, and zero for samples <= n < width. A copy: nothing is rounded.
//         Pairs: bfloat16 of x[n][2c] and x[n][2c + 1], nearest, ties to even.
//         Quads: q of x[n][4c .. 4c + 3] plus an offset, modulo 2^8, where q = round(x * inverses[n]), ties to even.
//         Of a sample with largest |x| m: scale = m / 127 and inverse = 127 / m, so that |q| <= 127 and
//         |x - q * scale| <= scale / 2 but for rounding; both are 0 for m < 2^-100, which would overflow; the scale is
//         NaN and the inverse 0 for m that is not finite. With inverse 0, q is 0. Features past the last count as 0.
// Layout: x row-major [samples, features], float32 or bfloat16; panel [features][width] of float32, or [features / 2,
//         rounded up][width] and [features / 4, rounded up][width] of 4-byte words, the first feature lowest. Width 1
//         (float32 only), 8, 16, 32 or 64.
// Source: Elsen et al., Fast Sparse ConvNets (2019), section 3, with samples in place of pixels.
//
// Single-threaded; the caller may split the features. No pointer needs to be aligned.
#pragma once

#include <cstdint>

#include "kernels/common/export.h"
#include "kernels/common/float_dtype.h"

namespace tersetorch {

struct PanelPackArgs {
  const void* x;  // [samples, features]
  FloatDtype stored_as;
  std::int64_t samples, features;  // samples <= width
  float* panel;                    // [features, width]
  std::int64_t width;
};

// Features [feature_begin, feature_end) of the panel.
TERSETORCH_API void PackPanel(const PanelPackArgs& args, std::int64_t feature_begin, std::int64_t feature_end) noexcept;

struct WordPanelArgs {
  const void* x;  // [samples, features]
  FloatDtype stored_as;
  std::int64_t samples, features;  // samples <= width
  std::uint32_t* panel;            // [words, width]
  std::int64_t width;              // 8, 16, 32 or 64
  const float* inverses;           // [samples], for quads only
  std::int32_t offset;             // 0 or 128, for quads only
};

// Words [word_begin, word_end) of the panel.
TERSETORCH_API void PackPairPanel(const WordPanelArgs& args, std::int64_t word_begin, std::int64_t word_end) noexcept;
TERSETORCH_API void PackQuadPanel(const WordPanelArgs& args, std::int64_t word_begin, std::int64_t word_end) noexcept;

struct SampleScalesArgs {
  const void* x;  // [samples, features]
  FloatDtype stored_as;
  std::int64_t features;
  float* scales;    // [samples]
  float* inverses;  // [samples]
};

// Scales of the samples [sample_begin, sample_end).
TERSETORCH_API void SampleScales(const SampleScalesArgs& args, std::int64_t sample_begin,
                                 std::int64_t sample_end) noexcept;

struct SampleScale {
  float scale, inverse;
};

// Of a sample whose largest |x| has these bits.
static inline SampleScale ScaleOf(std::uint32_t largest_bits) {
  if (largest_bits >= 0x7f800000) return {__builtin_nanf(""), 0.0f};
  if (largest_bits < (127u - 100u) << 23) return {0.0f, 0.0f};
  const float largest = __builtin_bit_cast(float, largest_bits);
  return {largest / 127.0f, 127.0f / largest};
}

// The variants, hidden in the library; the kernel tests link them directly.
using PackPanelFunction = void (*)(const PanelPackArgs&, std::int64_t, std::int64_t) noexcept;
extern const PackPanelFunction kPackPanelScalar;
extern const PackPanelFunction kPackPanelAvx2;
extern const PackPanelFunction kPackPanelAvx512;

struct WordPanelFunctions {
  void (*pairs)(const WordPanelArgs&, std::int64_t, std::int64_t) noexcept;
  void (*quads)(const WordPanelArgs&, std::int64_t, std::int64_t) noexcept;
  void (*scales)(const SampleScalesArgs&, std::int64_t, std::int64_t) noexcept;
};
extern const WordPanelFunctions kWordPanelsScalar;
extern const WordPanelFunctions kWordPanelsAvx2;
extern const WordPanelFunctions kWordPanelsAvx512;

}  // namespace tersetorch
