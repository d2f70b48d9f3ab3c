#include "kernels/common/vectors.h"
#include "kernels/panels/panels.h"

namespace tersetorch {
namespace {

template <int kWidth>
void Pack(const PanelPackArgs& a, Index feature_begin, Index feature_end) {
  constexpr Index kBlock = 64;  // features whose part of the panel stays in the first cache level
  for (Index begin = feature_begin; begin < feature_end; begin += kBlock) {
    const Index end = begin + kBlock < feature_end ? begin + kBlock : feature_end;
    Index full = begin;
    if constexpr (kWidth >= 8) {
      full += (end - begin) / 8 * 8;
      for (Index n = 0; n < kWidth; n += 8) {
        for (Index c = begin; c < full; c += 8) {
          Float8 block[8];
          for (Index j = 0; j < 8; ++j) {
            block[j] = n + j < a.samples ? LoadFloats(a.x, a.stored_as, (n + j) * a.features + c) : Float8{};
          }
          Transpose(block);
          for (Index j = 0; j < 8; ++j) Store(a.panel + (c + j) * kWidth + n, block[j]);
        }
      }
    }
    for (Index c = full; c < end; ++c) {
      for (Index n = 0; n < kWidth; ++n) {
        Store(a.panel + c * kWidth + n, n < a.samples ? LoadFloat(a.x, a.stored_as, n * a.features + c) : 0.0f);
      }
    }
  }
}

void PackForWidth(const PanelPackArgs& a, Index feature_begin, Index feature_end) noexcept {
  switch (a.width) {
    case 1:
      return Pack<1>(a, feature_begin, feature_end);
    case 8:
      return Pack<8>(a, feature_begin, feature_end);
    case 16:
      return Pack<16>(a, feature_begin, feature_end);
    case 32:
      return Pack<32>(a, feature_begin, feature_end);
    default:
      return Pack<64>(a, feature_begin, feature_end);
  }
}

}  // namespace

const PackPanelFunction kPackPanelAvx2 = PackForWidth;

}  // namespace tersetorch
