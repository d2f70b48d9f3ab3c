#include "kernels/common/scalars.h"
#include "kernels/sign_pack/sign_pack.h"

namespace tersetorch {
namespace {

void Pack(const SignPackArgs& a, std::int64_t word_begin, std::int64_t word_end) noexcept {
  const std::int64_t words = SignWords(a.columns);
  for (std::int64_t i = word_begin; i < word_end; ++i) {
    const std::int64_t sample = i / words, first = i % words * kSignBits;
    std::uint64_t bits = 0;
    for (std::int64_t c = first; c < a.columns && c < first + kSignBits; ++c) {
      if (!(Load(a.x, a.stored_as, sample * a.columns + c) >= 0)) bits |= std::uint64_t{1} << (c - first);
    }
    Put(a.bits, i, bits);
  }
}

void PackPlanes(const SignPackPlanesArgs& a, std::int64_t pixel_begin, std::int64_t pixel_end) noexcept {
  const std::int64_t words = SignWords(a.channels);
  for (std::int64_t p = pixel_begin; p < pixel_end; ++p) {
    for (std::int64_t i = 0; i < a.groups * words; ++i) {
      const std::int64_t group = i / words, first = i % words * kSignBits;
      std::uint64_t bits = 0;
      for (std::int64_t c = first; c < a.channels && c < first + kSignBits; ++c) {
        const bool negative = !(Load(a.x, a.stored_as, (group * a.channels + c) * a.pixels + p) >= 0);
        bits |= std::uint64_t{negative} << (c - first);
      }
      Put(a.bits, p * a.groups * words + i, bits);
    }
  }
}

}  // namespace

const SignPackPlanesVariant kSignPackPlanesScalar = &PackPlanes;
const SignPackVariant kSignPackScalar = &Pack;

}  // namespace tersetorch
