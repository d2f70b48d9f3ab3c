// The signs of samples as bits, which the binary products multiply.
//
// Math:   bit c of sample n is 0, for +1, where x[n][c] >= 0, -0 too; 1, for -1, elsewhere, NaN too.
// Layout: x row-major [samples, columns]; bits [samples, words], words = ceil(columns / 64), bit c in word c / 64 at
//         place c % 64. Bits past the columns are 0, so that those of two factors do not differ.
//         SignPackPlanes takes images whose channels lie in planes, [groups * channels, pixels], and packs the
//         channels of each pixel: bits [pixels, groups * words], so that every group begins with a word.
// Limits: 4 or 2 bytes read for each bit written; 16 comparisons of AVX-512 a word's quarter, so memory is the limit.
//         Of planes, a comparison and a masked or for 16 pixels: 256 channels of 14 x 14 take a microsecond from the
//         second cache level. Four lines of a plane at a time, which its neighbours' prefetching brings.
// Source: Hubara et al., Binarized Neural Networks (2016), equation 1.
//
// Single-threaded. No pointer needs to be aligned.
#pragma once

#include <cstdint>

#include "kernels/common/export.h"
#include "kernels/common/float_dtype.h"

namespace tersetorch {

inline constexpr std::int64_t kSignBits = 64;  // of a word

static inline std::int64_t SignWords(std::int64_t columns) { return (columns + kSignBits - 1) / kSignBits; }

struct SignPackArgs {
  const void* x;  // [samples, columns]
  FloatDtype stored_as;
  std::int64_t columns;
  std::uint64_t* bits;  // [samples, words]
};

// Words [word_begin, word_end) of the samples * words there are.
TERSETORCH_API void SignPack(const SignPackArgs& args, std::int64_t word_begin, std::int64_t word_end) noexcept;

struct SignPackPlanesArgs {
  const void* x;  // [groups * channels, pixels], of one image
  FloatDtype stored_as;
  std::int64_t groups, channels, pixels;  // channels of a group
  std::uint64_t* bits;                    // [pixels, groups * words]
};

TERSETORCH_API void SignPackPlanes(const SignPackPlanesArgs& args, std::int64_t pixel_begin,
                                   std::int64_t pixel_end) noexcept;

// The variants, hidden in the library; the kernel tests link them directly.
using SignPackVariant = void (*)(const SignPackArgs&, std::int64_t, std::int64_t) noexcept;
extern const SignPackVariant kSignPackScalar;
extern const SignPackVariant kSignPackAvx2;
extern const SignPackVariant kSignPackAvx512;
using SignPackPlanesVariant = void (*)(const SignPackPlanesArgs&, std::int64_t, std::int64_t) noexcept;
extern const SignPackPlanesVariant kSignPackPlanesScalar;
extern const SignPackPlanesVariant kSignPackPlanesAvx2;
extern const SignPackPlanesVariant kSignPackPlanesAvx512;

}  // namespace tersetorch
