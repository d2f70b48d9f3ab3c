// Numbers rounded to fixed point <IL,FL>.
//
// Math:   The format has the numbers k * 2^-FL for whole k in [-2^(IL-1+FL), 2^(IL-1+FL) - 1]; IL counts the sign. Let
//         s = x * 2^FL, exactly. Nearest, ties up: k = floor(s + 1/2). Stochastic, with the 16 random bits u of the
//         value: k = floor((floor(65536 s + 1/2) + u) / 65536), which is up with the fraction of s, rounded to 16
//         bits, as its probability: a number of the format stays. Then k is saturated, infinities too; zeros are +0.0.
//         NaN stays what it is as a float. It is no whole number: FixedRound says where it met one, and puts 0.
//         y = k * 2^-FL, rounded to bfloat16 where x is stored so and k has more than 8 bits; or k itself.
// Random: value i of x has number offset + i, to which kernels/common/philox.h gives bits by the seed.
// Limits: float32 reads and writes 8 bytes a value. Philox is 10 rounds of 2 products, 2 shifts and 2 xors for 64
// values
//         of eight counters in AVX-512, without what the first round saves 57 operations on vectors, 2 more to put
//         words side by side; rounding is a product, 2 limits, a conversion, 2 for u and its sum, a shift, a
//         conversion, a comparison and a product for each 16, so 40 for 64: 99 operations on two ports are 50 cycles
//         for 64 values, 0.8 a value: at 3 GHz 30 GB/s, above what one core moves to and from memory.
// Source: Gupta, Agrawal, Gopalakrishnan, Narayanan, Deep Learning with Limited Numerical Precision (2015),
// section 3.1.
//
// Single-threaded. No pointer needs to be aligned.
#pragma once

#include <cstdint>

#include "kernels/common/everywhere.h"
#include "kernels/common/export.h"
#include "kernels/common/float_dtype.h"

namespace tersetorch {

inline constexpr std::int64_t kFixedMaxBits = 24;  // of a format: float32 has every such number

enum class FixedAs : int { kFloats, kInt8, kInt16, kInt32 };  // floats as x is stored

// Calls use with k as a number of the type that `as`, one of whole numbers, names.
template <typename Use>
TERSETORCH_EVERYWHERE void WithWhole(FixedAs as, std::int32_t k, const Use& use) {
  if (as == FixedAs::kInt8) {
    use(static_cast<std::int8_t>(k));
  } else if (as == FixedAs::kInt16) {
    use(static_cast<std::int16_t>(k));
  } else {
    use(k);
  }
}

struct FixedRoundArgs {
  const void* x;
  FloatDtype stored_as;
  int integer_bits, fraction_bits;  // at least 1, at least 0, at most kFixedMaxBits together
  bool stochastic;
  std::uint64_t seed, offset;
  void* y;
  FixedAs as;
};

// Values [begin, end). Whether one of them is NaN, where y is whole numbers; false elsewhere.
TERSETORCH_API bool FixedRound(const FixedRoundArgs& args, std::int64_t begin, std::int64_t end) noexcept;

// The variants, hidden in the library; the kernel tests link them directly.
using FixedRoundVariant = bool (*)(const FixedRoundArgs&, std::int64_t, std::int64_t) noexcept;
extern const FixedRoundVariant kFixedRoundScalar;
extern const FixedRoundVariant kFixedRoundAvx2;
extern const FixedRoundVariant kFixedRoundAvx512;

}  // namespace tersetorch
