// Arrays in unaligned memory, random numbers and sums with their error bound.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "kernels/common/float_dtype.h"

namespace tersetorch::test {

using Index = std::int64_t;

// Numbers that start one byte after an aligned address.
template <typename T>
class Unaligned {
 public:
  explicit Unaligned(const std::vector<T>& values) : bytes_(sizeof(T) * values.size() + 1), size_(values.size()) {
    if (size_ != 0) std::memcpy(bytes_.data() + 1, values.data(), sizeof(T) * size_);
  }
  T* data() { return reinterpret_cast<T*>(bytes_.data() + 1); }
  std::vector<T> Values() const {
    std::vector<T> values(size_);
    if (size_ != 0) std::memcpy(values.data(), bytes_.data() + 1, sizeof(T) * size_);
    return values;
  }

 private:
  std::vector<unsigned char> bytes_;
  std::size_t size_;
};

inline std::uint16_t Truncated(float value) {
  return static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(value) >> 16);
}
inline float Widened(std::uint16_t half) { return std::bit_cast<float>(std::uint32_t{half} << 16); }

inline std::vector<float> Random(Index count, std::mt19937& rng) {
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  // Representable in bfloat16, so that one reference serves both ways of storing.
  for (float& value : values) value = Widened(Truncated(normal(rng)));
  return values;
}

// A float32 sum of n products that were rounded once each is off by at most about (n + 1) * 2^-24 * sum |w * x|,
// whatever the order; storing it as bfloat16 adds half a unit, 2^-9 of the result, and as float16 2^-12 or the least.
struct Sum {
  double value = 0, magnitude = 0;
  Index terms = 0;

  void Add(double term) {
    value += term;
    magnitude += std::fabs(term);
    ++terms;
  }
  // rounds: how often more than that a product or sum is rounded.
  bool Near(double got, FloatDtype stored_as, int rounds = 1) const {
    const double half = stored_as == FloatDtype::kFloat32    ? 0
                        : stored_as == FloatDtype::kBFloat16 ? std::ldexp(std::fabs(value), -8)
                                                             : std::ldexp(std::fabs(value), -11) + 0x1p-24;
    return std::fabs(got - value) <= rounds * std::ldexp((terms + 1) * magnitude, -24) + half;
  }
};

inline constexpr FloatDtype kFloats[] = {FloatDtype::kFloat32, FloatDtype::kBFloat16};

// An output array that can be read as floats.
struct Output {
  Output(Index count, FloatDtype stored_as)
      : stored_as(stored_as),
        floats(std::vector<float>(count, NAN)),
        halves(std::vector<std::uint16_t>(count, 0x7fc0)) {}
  void* data() { return stored_as == FloatDtype::kFloat32 ? static_cast<void*>(floats.data()) : halves.data(); }
  std::vector<float> Values() const {
    if (stored_as == FloatDtype::kFloat32) return floats.Values();
    std::vector<float> values;
    for (const std::uint16_t half : halves.Values()) values.push_back(Widened(half));
    return values;
  }

  FloatDtype stored_as;
  Unaligned<float> floats;
  Unaligned<std::uint16_t> halves;
};

}  // namespace tersetorch::test
