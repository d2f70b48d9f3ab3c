#include "codec/numbers.h"

#include <algorithm>
#include <array>
#include <bit>
#include <stdexcept>
#include <type_traits>

#include "codec/range_coder.h"

namespace tersetorch {
namespace {

constexpr int kExponentBits = 8;

template <typename Coder, typename Pattern>
void CodeRising(Coder& coder, std::span<Pattern> patterns, int zeros) {
  std::vector<AdaptiveTree<7>> widths(65);  // by the width before
  std::uint32_t width_before = 0;
  std::array<AdaptiveBit, 128> second;
  std::uint64_t last = 0;
  for (Pattern& pattern : patterns) {
    const std::uint64_t given = std::is_const_v<Pattern> ? (pattern >> zeros) - last : 0;
    const std::uint32_t width = widths[width_before].Code(coder, static_cast<std::uint32_t>(std::bit_width(given)));
    if (width > 64) throw std::invalid_argument("numbers: differences must have at most 64 bits, got more");
    std::uint64_t difference = width > 0;
    int below = static_cast<int>(width) - 1;
    if (below > 0) {
      --below;
      difference = 2 | second[width].Code(coder, static_cast<std::uint32_t>(given >> below & 1));
    }
    if (below > 0) difference = difference << below | CodePlainBits(coder, given, below);
    width_before = width;
    last += difference;
    if constexpr (!std::is_const_v<Pattern>) pattern = last << zeros;
  }
}

template <typename Coder, typename Pattern>
void CodeOthers(Coder& coder, std::span<Pattern> patterns, int width, int zeros) {
  AdaptiveTree<kExponentBits> exponents;
  AdaptiveBit signs;
  const int below_sign = width - 1;
  const int rest = std::max(0, below_sign - kExponentBits);  // the bits after the exponent
  const int plain = std::max(0, rest - zeros);
  for (Pattern& pattern : patterns) {
    const std::uint64_t given = std::is_const_v<Pattern> ? pattern : 0;
    const auto exponent = static_cast<std::uint32_t>(given >> rest & 255);
    std::uint64_t found = std::uint64_t{exponents.Code(coder, exponent)} << rest;
    if (below_sign < kExponentBits) found &= (std::uint64_t{1} << below_sign) - 1;
    found |= std::uint64_t{signs.Code(coder, static_cast<std::uint32_t>(given >> below_sign & 1))} << below_sign;
    if (plain > 0) found |= CodePlainBits(coder, given >> zeros, plain) << zeros;
    if constexpr (!std::is_const_v<Pattern>) pattern = found;
  }
}

template <typename Coder, typename Pattern>
void CodeNumbers(Coder& coder, std::span<Pattern> patterns, int width) {
  std::uint64_t all = 0;
  bool rise = true;
  if constexpr (std::is_const_v<Pattern>) {
    for (const std::uint64_t pattern : patterns) all |= pattern;
    rise = std::is_sorted(patterns.begin(), patterns.end());
  }
  rise = CodePlainBits(coder, rise, 1) == 1;
  const std::uint64_t counted = static_cast<std::uint64_t>(all == 0 ? 0 : std::countr_zero(all));
  const int zeros = static_cast<int>(CodePlainBits(coder, counted, 6));
  rise ? CodeRising(coder, patterns, zeros) : CodeOthers(coder, patterns, width, zeros);
}

}  // namespace

std::vector<std::uint8_t> EncodeNumbers(std::span<const std::uint64_t> patterns, int width) {
  RangeEncoder encoder;
  CodeNumbers(encoder, patterns, width);
  return encoder.Finish();
}

void DecodeNumbers(std::span<const std::uint8_t> stream, int width, std::span<std::uint64_t> patterns) {
  RangeDecoder decoder(stream);
  CodeNumbers(decoder, patterns, width);
  decoder.Finish();
  const std::uint64_t above = width == 64 ? 0 : ~std::uint64_t{0} << width;
  for (const std::uint64_t pattern : patterns) {
    if (pattern & above) throw std::invalid_argument("numbers: patterns must fit their width, got a wider one");
  }
}

}  // namespace tersetorch
