#include <cmath>

#include "kernels/common/fixed_sums.h"
#include "kernels/common/scalars.h"
#include "kernels/fixed_matmul/fixed_matmul.h"

namespace tersetorch {
namespace {

void Multiply(const FixedMatmulArgs& a, std::int64_t row_begin, std::int64_t row_end) noexcept {
  const auto number = [&](const void* array, std::int64_t i) {
    return a.wide ? std::int64_t{At<std::int16_t>(array, i)} : std::int64_t{At<std::int8_t>(array, i)};
  };
  for (std::int64_t n = 0; n < a.samples; ++n) {
    for (std::int64_t r = row_begin; r < row_end; ++r) {
      const std::int64_t bias = a.bias == nullptr ? 0 : At<std::int64_t>(a.bias, r);
      std::int64_t sum = bias < -kMostBias ? -kMostBias : bias > kMostBias ? kMostBias : bias;
      for (std::int64_t c = 0; c < a.columns; ++c) {
        sum += number(a.x, n * a.columns + c) * number(a.weight, r * a.columns + c);
      }
      Put(a.sums, n * a.rows + r, sum);
    }
  }
}

void Convert(const FixedConvertArgs& a, std::int64_t begin, std::int64_t end) noexcept {
  const FixedConversion conversion(a.sum_fraction_bits, a.integer_bits, a.fraction_bits, a.stochastic, a.relu);
  for (std::int64_t i = begin; i < end; ++i) {
    const std::uint32_t u = conversion.random ? RandomBits(a.seed, a.offset + static_cast<std::uint64_t>(i)) : 0;
    const std::int32_t k = conversion.Of(At<std::int64_t>(a.sums, i), u);
    switch (a.as) {
      case FixedAs::kFloats:
        Put(a.y, i, std::ldexp(static_cast<float>(k), -a.fraction_bits));
        break;
      case FixedAs::kInt8:
        Put(a.y, i, static_cast<std::int8_t>(k));
        break;
      case FixedAs::kInt16:
        Put(a.y, i, static_cast<std::int16_t>(k));
        break;
      case FixedAs::kInt32:
        Put(a.y, i, k);
        break;
    }
  }
}

}  // namespace

const FixedMatmulKernels kFixedMatmulScalar = {&Multiply, &Convert};

}  // namespace tersetorch
