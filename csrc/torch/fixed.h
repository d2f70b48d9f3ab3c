// What the ops on fixed point share: formats, rounding and whole numbers.
#pragma once

#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <string>

#include "kernels/fixed_round/fixed_round.h"
#include "torch/samples.h"

namespace tersetorch {

inline void CheckFixed(const char* op, std::int64_t integer_bits, std::int64_t fraction_bits) {
  STD_TORCH_CHECK(integer_bits >= 1 && fraction_bits >= 0 && integer_bits <= kFixedMaxBits &&
                      fraction_bits <= kFixedMaxBits && integer_bits + fraction_bits >= 2 &&
                      integer_bits + fraction_bits <= kFixedMaxBits,
                  op, ": a format must be <IL,FL> with IL of at least 1, for the sign, FL of at least 0 and 2 to ",
                  kFixedMaxBits, " bits together, got <", integer_bits, ",", fraction_bits, ">; pass such numbers");
}

inline bool IsStochastic(const char* op, const std::string& rounding) {
  STD_TORCH_CHECK(rounding == "nearest" || rounding == "stochastic", op,
                  ": rounding must be 'nearest' or 'stochastic', got '", rounding, "'; pass one of these");
  return rounding == "stochastic";
}

// Where value 0 takes its random bits.
inline std::uint64_t CheckedOffset(const char* op, std::int64_t offset) {
  STD_TORCH_CHECK(offset >= 0, op, ": offset must be at least 0, got ", offset, "; pass how many values came before");
  return static_cast<std::uint64_t>(offset);
}

// Whole numbers of a dtype, which must hold a format of so many bits.
inline FixedAs WholeAs(const char* op, ScalarType dtype, std::int64_t bits) {
  STD_TORCH_CHECK(dtype == ScalarType::Char || dtype == ScalarType::Short || dtype == ScalarType::Int, op,
                  ": dtype must be int8, int16 or int32, got ", torch::headeronly::toString(dtype),
                  "; pass one of these");
  const int room = dtype == ScalarType::Char ? 8 : dtype == ScalarType::Short ? 16 : 32;
  STD_TORCH_CHECK(bits <= room, op, ": dtype must hold ", bits, " bits, got ", torch::headeronly::toString(dtype),
                  "; pass a wider one");
  return room == 8 ? FixedAs::kInt8 : room == 16 ? FixedAs::kInt16 : FixedAs::kInt32;
}

}  // namespace tersetorch
