#include <cmath>

#include "kernels/common/philox.h"
#include "kernels/common/scalars.h"
#include "kernels/fixed_round/fixed_round.h"

namespace tersetorch {
namespace {

// double has x * 2^(FL + 16) of what does not saturate and its sum with 1/2, but for sums that floor to the same.
std::int32_t Rounded(const FixedRoundArgs& a, float x, std::int64_t i) {
  const double highest = std::ldexp(1.0, a.integer_bits - 1 + a.fraction_bits) - 1, lowest = -highest - 1;
  double s = std::ldexp(static_cast<double>(x), a.fraction_bits);
  if (s <= lowest) return static_cast<std::int32_t>(lowest);
  if (s >= highest) return static_cast<std::int32_t>(highest);
  if (!a.stochastic) return static_cast<std::int32_t>(std::floor(s + 0.5));
  s = std::floor(65536 * s + 0.5) + RandomBits(a.seed, a.offset + static_cast<std::uint64_t>(i));
  return static_cast<std::int32_t>(std::floor(s / 65536));
}

bool Round(const FixedRoundArgs& a, std::int64_t begin, std::int64_t end) noexcept {
  bool undefined = false;
  for (std::int64_t i = begin; i < end; ++i) {
    const float x = Load(a.x, a.stored_as, i);
    const bool nan = x != x;
    const std::int32_t k = nan ? 0 : Rounded(a, x, i);
    if (a.as != FixedAs::kFloats) {
      WithWhole(a.as, k, [&](auto whole) { Put(a.y, i, whole); });
      undefined |= nan;
    } else if (!nan) {
      Store(a.y, a.stored_as, i, std::ldexp(static_cast<float>(k), -a.fraction_bits));
    } else if (a.stored_as == FloatDtype::kFloat32) {
      Put(a.y, i, At<std::uint32_t>(a.x, i));
    } else {
      Put(a.y, i, At<std::uint16_t>(a.x, i));
    }
  }
  return undefined;
}

}  // namespace

const FixedRoundVariant kFixedRoundScalar = &Round;

}  // namespace tersetorch
