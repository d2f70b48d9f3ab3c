#include "kernels/machine_rates/machine_rates.h"

namespace tersetorch {

const MachineRateLoops& MachineRates(CpuIsa level) noexcept {
  switch (level) {
    case CpuIsa::kAvx512Bf16:
      return kMachineRatesAvx512Bf16;
    case CpuIsa::kAvx512:
      return kMachineRatesAvx512;
    case CpuIsa::kAvx2:
      return kMachineRatesAvx2;
    case CpuIsa::kScalar:
      break;
  }
  return kMachineRatesScalar;
}

}  // namespace tersetorch
