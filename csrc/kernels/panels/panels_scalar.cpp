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

}  // namespace

const PackPanelFunction kPackPanelScalar = Pack;

}  // namespace tersetorch
