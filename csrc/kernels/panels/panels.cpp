#include "kernels/panels/panels.h"

#include "kernels/common/cpu_isa.h"

namespace tersetorch {

// Copying waits for memory at any vector width: the levels above AVX2 use its variant.
void PackPanel(const PanelPackArgs& args, std::int64_t feature_begin, std::int64_t feature_end) noexcept {
  const bool scalar = ProcessCpuIsa().active == CpuIsa::kScalar;
  (scalar ? kPackPanelScalar : kPackPanelAvx2)(args, feature_begin, feature_end);
}

}  // namespace tersetorch
