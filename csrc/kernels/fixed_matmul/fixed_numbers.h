// How x becomes what FixedMatmul multiplies. Local to the including file.
#pragma once

#include <cstdint>

#include "kernels/common/scalars.h"

namespace tersetorch {
namespace {

// Of a number or a vector of them, in the type of a sample's numbers.
struct Raised {
  template <typename T>
  auto operator()(T x) const {
    return x + 128;
  }
};
struct Same {
  template <typename T>
  T operator()(T x) const {
    return x;
  }
};
// 256 * high + low, of which low lies in [-128, 128).
struct High {
  template <typename T>
  auto operator()(T x) const {
    return (x >> 8) + (x >> 7 & 1);
  }
};
struct Low {
  template <typename T>
  auto operator()(T x) const {
    return ((x & 255) ^ 128) - 128;
  }
};

// Calls run(number of x, number of a sample, change, copy): the types, what becomes of a number, and 1 for the second
// of two.
template <typename Run>
void WithNumbers(bool x_wide, bool wide, bool split, const Run& run) {
  if (!wide) return run(std::int8_t{}, std::uint8_t{}, Raised{}, 0);
  if (!x_wide) return run(std::int8_t{}, std::int16_t{}, Same{}, 0);
  if (!split) return run(std::int16_t{}, std::int16_t{}, Same{}, 0);
  run(std::int16_t{}, std::int16_t{}, High{}, 0);
  run(std::int16_t{}, std::int16_t{}, Low{}, 1);
}

template <typename From, typename To, typename Change>
To NumberOf(const void* from, std::int64_t i, const Change& change) {
  return static_cast<To>(change(static_cast<To>(At<From>(from, i))));
}

template <typename From, typename To, typename Change>
void CopyNumbers(const void* from, std::int64_t first, std::int64_t count, char* to, const Change& change) {
  for (std::int64_t i = 0; i < count; ++i) Put(to, i, NumberOf<From, To>(from, first + i, change));
}

}  // namespace
}  // namespace tersetorch
