// Whole numbers to multiply, for the tests of both devices.
#pragma once

#include <random>
#include <vector>

#include "kernels/arrays.h"
#include "kernels/check.h"
#include "kernels/fixed_matmul/fixed_matmul.h"

namespace tersetorch::test {

// Numbers up to the ends of int8 or int16, which stand at many places where `extreme`.
template <typename Whole>
std::vector<Whole> WholeNumbers(Index count, int bits, bool extreme, std::mt19937& rng) {
  const int end = 1 << (bits - 1);
  std::vector<Whole> numbers(count);
  for (Whole& number : numbers) {
    number = static_cast<Whole>(extreme && rng() % 8 != 0 ? -end : static_cast<int>(rng() % (2 * end)) - end);
  }
  return numbers;
}

// Sums around the halves and the ends of a conversion.
inline std::vector<Index> SumsOf(const FixedConvertArgs& a, Index count, std::mt19937& rng) {
  const int d = a.sum_fraction_bits - a.fraction_bits;
  const Index unit = d > 0 ? Index{1} << d : 1, end = (Index{1} << (a.integer_bits + a.fraction_bits - 1)) * unit;
  std::vector<Index> sums(count);
  for (Index& sum : sums) {
    const Index k = static_cast<Index>(rng() % 64) - 32, off = static_cast<Index>(rng() % 3) - 1;
    switch (rng() % 5) {
      case 0:
        sum = k * unit + unit / 2 + off;
        break;
      case 1:
        sum = (k < 0 ? -end : end) + off * unit / 2;
        break;
      case 2:
        sum = (Index{1} << 62) * (k < 0 ? -1 : 1) + off;
        break;
      case 3:
        sum = static_cast<Index>(rng() % (2 * static_cast<std::uint64_t>(unit))) - unit;
        break;
      default:
        sum = (static_cast<Index>(rng()) << 10) - (Index{1} << 41);
    }
  }
  return sums;
}

inline FixedConvertArgs Conversion(int sum_bits, int integer_bits, int fraction_bits, bool stochastic, bool relu,
                                   FixedAs as) {
  FixedConvertArgs args{};
  args.sum_fraction_bits = sum_bits;
  args.integer_bits = integer_bits;
  args.fraction_bits = fraction_bits;
  args.stochastic = stochastic;
  args.relu = relu;
  args.seed = 0x123456789abcdef0;
  args.offset = 37;
  args.as = as;
  return args;
}

// Conversions that round nothing, less than the random bits, more than them, and saturate.
inline std::vector<FixedConvertArgs> Conversions() {
  std::vector<FixedConvertArgs> conversions;
  for (const bool stochastic : {false, true}) {
    for (const bool relu : {false, true}) {
      for (const FixedAs as : {FixedAs::kFloats, FixedAs::kInt16, FixedAs::kInt32}) {
        for (const int sum_bits : {0, 10, 14, 15, 26, 30}) {
          conversions.push_back(Conversion(sum_bits, 6, 10, stochastic, relu, as));
        }
      }
      conversions.push_back(Conversion(0, 1, 23, stochastic, relu, FixedAs::kInt32));
      conversions.push_back(Conversion(30, 8, 0, stochastic, relu, FixedAs::kInt8));
    }
  }
  return conversions;
}

}  // namespace tersetorch::test
