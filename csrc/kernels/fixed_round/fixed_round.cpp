#include "kernels/fixed_round/fixed_round.h"

#include "kernels/common/cpu_isa.h"

namespace tersetorch {

bool FixedRound(const FixedRoundArgs& args, std::int64_t begin, std::int64_t end) noexcept {
  switch (ProcessCpuIsa().active) {
    case CpuIsa::kAvx512Bf16:
    case CpuIsa::kAvx512:
      return kFixedRoundAvx512(args, begin, end);
    case CpuIsa::kAvx2:
      return kFixedRoundAvx2(args, begin, end);
    case CpuIsa::kScalar:
      break;
  }
  return kFixedRoundScalar(args, begin, end);
}

}  // namespace tersetorch
