// A few numbers as they are, to the bit: biases, codebooks, scales.
//
// Range coded. First whether the bit patterns rise, and how many zeros all of them end with (16 for float32 numbers
// that were rounded to bfloat16); those zeros are not written.
//   Rising patterns, such as a sorted codebook: the difference to the pattern before, as its width (adaptive, in the
//   context of the width before), the bit below its highest (adaptive) and the other bits.
//   Others: as in floating-point numbers, the 8 bits after the sign and the sign, both adaptive, and the other bits.
// An exponent takes about 3 bits of its 8; the rest of trained weights is noise.
//
// It takes about 100 nanoseconds a number: for many numbers, write each byte of them by rANS instead.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/common/export.h"

namespace tersetorch {

// Patterns of `width` bits, 8 <= width <= 64.
TERSETORCH_API std::vector<std::uint8_t> EncodeNumbers(std::span<const std::uint64_t> patterns, int width);

// Throws std::invalid_argument when the stream holds another number of patterns.
TERSETORCH_API void DecodeNumbers(std::span<const std::uint8_t> stream, int width, std::span<std::uint64_t> patterns);

}  // namespace tersetorch
