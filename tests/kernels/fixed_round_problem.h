// Numbers to round to fixed point, for the tests of both devices.
#pragma once

#include <cmath>
#include <random>
#include <vector>

#include "kernels/arrays.h"
#include "kernels/check.h"
#include "kernels/fixed_round/fixed_round.h"

namespace tersetorch::test {

struct FixedFormat {
  int integer_bits, fraction_bits;
};
// The smallest and the largest, around those of the different ways, and the paper's.
inline constexpr FixedFormat kFixedFormats[] = {{1, 1},  {2, 0},  {1, 7},  {4, 4},  {2, 14}, {8, 8},
                                                {3, 14}, {4, 16}, {24, 0}, {1, 23}, {6, 10}};

// Numbers of bfloat16 and others around the steps of a format: ties, ends of the range and beyond, zeros, denormals.
inline std::vector<float> FixedNumbers(Index count, FixedFormat format, FloatDtype stored_as, std::mt19937& rng) {
  const float step = std::ldexp(1.0f, -format.fraction_bits), end = std::ldexp(1.0f, format.integer_bits - 1);
  const float special[] = {0.0f,
                           -0.0f,
                           step / 2,
                           -step / 2,
                           1.5f * step,
                           -1.5f * step,
                           end,
                           -end,
                           end - step,
                           -end - step / 2,
                           end - step / 2,
                           3e38f,
                           -3e38f,
                           INFINITY,
                           -INFINITY,
                           1e-40f,
                           -1e-40f,
                           NAN,
                           step / 3,
                           std::nextafter(step / 2, 0.0f),
                           -std::nextafter(step / 2, 1.0f),
                           1e-20f,
                           -1e-20f};
  std::normal_distribution<float> normal(0, end / 2), small(0, 3 * step);
  std::vector<float> numbers(count);
  for (Index i = 0; i < count; ++i) {
    numbers[i] = i % 3 == 0 ? special[rng() % std::size(special)] : i % 3 == 1 ? normal(rng) : small(rng);
    if (stored_as == FloatDtype::kBFloat16) numbers[i] = Widened(Truncated(numbers[i]));
  }
  return numbers;
}

inline std::vector<std::uint16_t> HalvesOf(const std::vector<float>& numbers) {
  std::vector<std::uint16_t> halves;
  for (const float number : numbers) halves.push_back(Truncated(number));
  return halves;
}

inline Index BytesOf(FixedAs as, FloatDtype stored_as) {
  if (as == FixedAs::kInt8) return 1;
  if (as == FixedAs::kInt16 || (as == FixedAs::kFloats && stored_as == FloatDtype::kBFloat16)) return 2;
  return 4;
}

inline bool Holds(FixedAs as, FixedFormat format) {
  const int bits = format.integer_bits + format.fraction_bits;
  return as == FixedAs::kInt8 ? bits <= 8 : as == FixedAs::kInt16 ? bits <= 16 : true;
}

}  // namespace tersetorch::test
