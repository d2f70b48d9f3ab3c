// How x becomes what FixedMatmul multiplies. Local to the including file.
#pragma once

#include <cstdint>

#include "kernels/common/scalars.h"

namespace tersetorch {
namespace {

struct Raised {
  int operator()(int x) const { return x + 128; }
};
struct Same {
  int operator()(int x) const { return x; }
};
// 256 * high + low, of which low lies in [-128, 128).
struct High {
  int operator()(int x) const { return (x + 128) >> 8; }
};
struct Low {
  int operator()(int x) const { return x - 256 * ((x + 128) >> 8); }
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
void CopyNumbers(const void* from, std::int64_t first, std::int64_t count, char* to, const Change& change) {
  for (std::int64_t i = 0; i < count; ++i) Put(to, i, static_cast<To>(change(int{At<From>(from, first + i)})));
}

}  // namespace
}  // namespace tersetorch
