// What the vector levels share: blocks of 64 values and the constants of a format. Local to the including file.
#pragma once

#include <cstdint>

#include "kernels/common/philox.h"
#include "kernels/common/vectors.h"
#include "kernels/fixed_round/fixed_round.h"

namespace tersetorch {
namespace {

// Up to 16 bits a stochastic sum of 65536 s and u fits 32 bits; beyond, the number next to s is taken off first.
enum class Way { kNearest, kStochastic, kWideStochastic };

struct Format {
  explicit Format(const FixedRoundArgs& a)
      : scale(PowerOf2(a.fraction_bits)),
        step(PowerOf2(-a.fraction_bits)),
        lowest(-PowerOf2(a.integer_bits + a.fraction_bits - 1)),
        highest(-lowest - 1),
        way(!a.stochastic                            ? Way::kNearest
            : a.integer_bits + a.fraction_bits <= 16 ? Way::kStochastic
                                                     : Way::kWideStochastic) {}

  static float PowerOf2(int exponent) {
    return __builtin_bit_cast(float, static_cast<std::uint32_t>(127 + exponent) << 23);
  }

  float scale, step, lowest, highest;
  Way way;
};

inline Index OutputBytes(const FixedRoundArgs& a) {
  if (a.as == FixedAs::kFloats) return a.stored_as == FloatDtype::kFloat32 ? 4 : 2;
  return a.as == FixedAs::kInt8 ? 1 : a.as == FixedAs::kInt16 ? 2 : 4;
}

// Calls whole(i, block) for the values of x from i on that are a whole block of random bits, and part(i, block, first,
// count) for those that have its places from first on.
template <typename Whole, typename Part>
void ForBlocks(const FixedRoundArgs& a, Index begin, Index end, const Whole& whole, const Part& part) {
  for (Index i = begin; i < end;) {
    const std::uint64_t n = a.offset + static_cast<std::uint64_t>(i), block = n / kRandomBlock;
    const Index first = static_cast<Index>(n % kRandomBlock), room = kRandomBlock - first;
    const Index count = end - i < room ? end - i : room;
    if (count == kRandomBlock) {
      whole(i, block);
    } else {
      part(i, block, first, count);
    }
    i += count;
  }
}

}  // namespace
}  // namespace tersetorch
