#include "kernels/common/scalars.h"
#include "kernels/panels/panels.h"

namespace tersetorch {
namespace {

void Pack(const PanelPackArgs& a, std::int64_t feature_begin, std::int64_t feature_end) noexcept {
  for (std::int64_t c = feature_begin; c < feature_end; ++c) {
    for (std::int64_t n = 0; n < a.width; ++n) {
      Put(a.panel, c * a.width + n, n < a.samples ? Load(a.x, a.stored_as, n * a.features + c) : 0.0f);
    }
  }
}

float FeatureOf(const WordPanelArgs& a, std::int64_t n, std::int64_t c) {
  return n < a.samples && c < a.features ? Load(a.x, a.stored_as, n * a.features + c) : 0.0f;
}

void PackPairs(const WordPanelArgs& a, std::int64_t word_begin, std::int64_t word_end) noexcept {
  for (std::int64_t c = word_begin; c < word_end; ++c) {
    for (std::int64_t n = 0; n < a.width; ++n) {
      for (int j = 0; j < 2; ++j) Put(a.panel, 2 * (c * a.width + n) + j, ToBFloat16(FeatureOf(a, n, 2 * c + j)));
    }
  }
}

void PackQuads(const WordPanelArgs& a, std::int64_t word_begin, std::int64_t word_end) noexcept {
  for (std::int64_t c = word_begin; c < word_end; ++c) {
    for (std::int64_t n = 0; n < a.width; ++n) {
      const float inverse = n < a.samples ? At<float>(a.inverses, n) : 0.0f;
      for (int j = 0; j < 4; ++j) {
        const float q = inverse == 0 ? 0.0f : __builtin_rintf(FeatureOf(a, n, 4 * c + j) * inverse);
        Put(a.panel, 4 * (c * a.width + n) + j, static_cast<std::uint8_t>(static_cast<int>(q) + a.offset));
      }
    }
  }
}

void Scales(const SampleScalesArgs& a, std::int64_t sample_begin, std::int64_t sample_end) noexcept {
  for (std::int64_t n = sample_begin; n < sample_end; ++n) {
    std::uint32_t largest = 0;  // of the bits without the sign, which order as the numbers do, NaN last
    for (std::int64_t c = 0; c < a.features; ++c) {
      const auto bits = __builtin_bit_cast(std::uint32_t, Load(a.x, a.stored_as, n * a.features + c)) & 0x7fffffff;
      largest = bits > largest ? bits : largest;
    }
    const SampleScale of_sample = ScaleOf(largest);
    Put(a.scales, n, of_sample.scale);
    Put(a.inverses, n, of_sample.inverse);
  }
}

}  // namespace

const PackPanelFunction kPackPanelScalar = Pack;
const WordPanelFunctions kWordPanelsScalar = {PackPairs, PackQuads, Scales};

}  // namespace tersetorch
