#include "kernels/common/scalars.h"
#include "kernels/planes/planes.h"

namespace tersetorch {
namespace {

using Index = std::int64_t;

std::uint32_t Pair(const WordPlanesArgs&, float x) { return ToBFloat16(x); }

std::uint32_t Quad(const WordPlanesArgs& a, float x) {
  const float q = a.inverse == 0 ? 0.0f : __builtin_rintf(x * a.inverse);
  return static_cast<std::uint8_t>(static_cast<int>(q) + a.offset);
}

template <Index kChannels, std::uint32_t (*kNumber)(const WordPlanesArgs&, float)>
void Planes(const WordPlanesArgs& a, Index begin, Index end) noexcept {
  const Index of_group = a.channels / a.groups, words = (of_group + kChannels - 1) / kChannels;
  for (Index w = 0; w < a.groups * words; ++w) {
    for (Index i = begin; i < end; ++i) {
      std::uint32_t word = 0;
      for (Index j = 0; j < kChannels; ++j) {
        const Index in_group = w % words * kChannels + j, c = w / words * of_group + in_group;
        const Index at = a.channels_last ? i * a.channels + c : c * a.pixels + i;
        const float x = in_group < of_group ? Load(a.x, a.stored_as, at) : 0.0f;
        word |= kNumber(a, x) << (32 / kChannels * j);
      }
      Put(a.planes, w * a.pixels + i, word);
    }
  }
}

}  // namespace

const WordPlanesFunctions kWordPlanesScalar{Planes<2, Pair>, Planes<4, Quad>};

}  // namespace tersetorch
