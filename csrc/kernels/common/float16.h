// float16 (IEEE 754 binary16) without instructions for it: what the CUDA kernels do on the emulator. No CPU kernel
// takes float16.
#pragma once

#include <cstdint>

namespace tersetorch {
namespace {

inline float FromFloat16(std::uint16_t bits) {
  const std::uint32_t sign = std::uint32_t{bits & 0x8000u} << 16, rest = bits & 0x7fffu;
  if (rest >= 0x7c00) return __builtin_bit_cast(float, sign | 0x7f800000u | rest << 13);
  if (rest >= 0x0400) return __builtin_bit_cast(float, sign | ((rest << 13) + (112u << 23)));
  const float number = static_cast<float>(rest) * 0x1p-24f;
  return sign != 0 ? -number : number;
}

// Nearest, ties to even, from 65,520 on infinite; NaN stays NaN.
inline std::uint16_t ToFloat16(float value) {
  const auto bits = __builtin_bit_cast(std::uint32_t, value);
  const std::uint32_t sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
  std::uint32_t number = 0;
  if (rest > 0x7f800000u) {
    number = 0x7e00;
  } else if (rest >= 0x477ff000u) {
    number = 0x7c00;
  } else if (rest >= 113u << 23) {  // of the exponents that float16 has
    number = (rest - (112u << 23) + 0xfff + (rest >> 13 & 1)) >> 13;
  } else {  // a sum with 1/2, whose last bit is the least float16, rounds it
    const float sum = __builtin_bit_cast(float, rest) + 0.5f;
    number = __builtin_bit_cast(std::uint32_t, sum) - (126u << 23);
  }
  return static_cast<std::uint16_t>(sign | number);
}

}  // namespace
}  // namespace tersetorch
