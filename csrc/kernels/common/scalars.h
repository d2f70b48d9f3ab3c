// What the scalar references share: elements of arrays that may be unaligned, and bfloat16.
#pragma once

#include <cstdint>

#include "kernels/common/float_dtype.h"

namespace tersetorch {
namespace {

// Element i of an array that may be unaligned.
template <typename T>
T At(const void* array, std::int64_t i) {
  T value;
  __builtin_memcpy(&value, static_cast<const char*>(array) + i * static_cast<std::int64_t>(sizeof(T)), sizeof value);
  return value;
}

template <typename T>
void Put(void* array, std::int64_t i, T value) {
  __builtin_memcpy(static_cast<char*>(array) + i * static_cast<std::int64_t>(sizeof(T)), &value, sizeof value);
}

inline float FromBFloat16(std::uint16_t high_half) { return __builtin_bit_cast(float, std::uint32_t{high_half} << 16); }

// Nearest, ties to even; NaN stays NaN.
inline std::uint16_t ToBFloat16(float value) {
  const auto bits = __builtin_bit_cast(std::uint32_t, value);
  if (value != value) return static_cast<std::uint16_t>(bits >> 16 | 0x40);
  return static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float Load(const void* array, FloatDtype stored_as, std::int64_t i) {
  return stored_as == FloatDtype::kFloat32 ? At<float>(array, i) : FromBFloat16(At<std::uint16_t>(array, i));
}

inline void Store(void* array, FloatDtype stored_as, std::int64_t i, float value) {
  if (stored_as == FloatDtype::kFloat32) {
    Put(array, i, value);
  } else {
    Put(array, i, ToBFloat16(value));
  }
}

}  // namespace
}  // namespace tersetorch
