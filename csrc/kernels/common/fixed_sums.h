// How an exact sum becomes a number of fixed point: constants of a conversion, and the conversion of one sum. Local to
// the including file, as vectors.h is.
#pragma once

#include <cstdint>

#include "kernels/common/philox.h"
#include "kernels/fixed_round/fixed_round.h"

namespace tersetorch {
namespace {

// k = ((((sum + half) >> down) + (u >> less)) >> last) * scale, within the limits.
struct FixedConversion {
  TERSETORCH_ON_BOTH FixedConversion(int sum_fraction_bits, int integer_bits, int fraction_bits, bool stochastic,
                                     bool relu) {
    const int d = sum_fraction_bits - fraction_bits;
    highest = (std::int64_t{1} << (integer_bits + fraction_bits - 1)) - 1;
    lowest = relu ? 0 : -highest - 1;
    if (d < 0) {
      scale = std::int64_t{1} << -d;
    } else if (stochastic && d <= 16) {
      less = 16 - d;
      last = d;
    } else {
      down = stochastic ? d - 16 : d;
      half = down == 0 ? 0 : std::int64_t{1} << (down - 1);
      last = stochastic ? 16 : 0;
    }
    random = stochastic && d > 0;
  }

  // u: 0 where nothing is random.
  TERSETORCH_ON_BOTH std::int32_t Of(std::int64_t sum, std::uint32_t u) const {
    constexpr std::int64_t kBeyond = std::int64_t{1} << 25;  // of every format, and small enough for every scale
    std::int64_t k = (((sum + half) >> down) + (u >> less)) >> last;
    k = k < -kBeyond ? -kBeyond : k;
    k = (k > kBeyond ? kBeyond : k) * scale;
    k = k < lowest ? lowest : k;
    return static_cast<std::int32_t>(k > highest ? highest : k);
  }

  std::int64_t half = 0, scale = 1, lowest, highest;
  int down = 0, less = 0, last = 0;
  bool random;
};

// 2^-fraction_bits.
TERSETORCH_ON_BOTH inline float StepOf(int fraction_bits) {
  float step;
  const auto bits = static_cast<std::uint32_t>(127 - fraction_bits) << 23;
  __builtin_memcpy(&step, &bits, sizeof step);
  return step;
}

template <typename Number>
TERSETORCH_ON_BOTH inline void PutNumber(void* y, std::int64_t i, Number number) {
#ifdef __CUDACC__
  static_cast<Number*>(y)[i] = number;  // aligned there
#else
  __builtin_memcpy(static_cast<char*>(y) + i * static_cast<std::int64_t>(sizeof number), &number, sizeof number);
#endif
}

// Number k of fixed point as value i of y.
TERSETORCH_ON_BOTH inline void PutFixed(void* y, std::int64_t i, std::int32_t k, int fraction_bits, FixedAs as) {
  if (as == FixedAs::kFloats) return PutNumber(y, i, static_cast<float>(k) * StepOf(fraction_bits));
  WithWhole(as, k, [&](auto whole) { PutNumber(y, i, whole); });
}

}  // namespace
}  // namespace tersetorch
