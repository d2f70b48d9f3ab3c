#include "kernels/panels/panels.h"

#include "kernels/common/cpu_isa.h"

namespace tersetorch {

namespace {

PackPanelFunction Active() {
  switch (ProcessCpuIsa().active) {
    case CpuIsa::kAvx512Bf16:
    case CpuIsa::kAvx512:
      return kPackPanelAvx512;
    case CpuIsa::kAvx2:
      return kPackPanelAvx2;
    case CpuIsa::kScalar:
      break;
  }
  return kPackPanelScalar;
}

}  // namespace

void PackPanel(const PanelPackArgs& args, std::int64_t feature_begin, std::int64_t feature_end) noexcept {
  Active()(args, feature_begin, feature_end);
}

}  // namespace tersetorch
