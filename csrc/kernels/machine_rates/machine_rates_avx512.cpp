#include "kernels/machine_rates/machine_rates_simd.h"

namespace tersetorch {

const MachineRateLoops kMachineRatesAvx512 = {{2 * 16 * kSums, 0, 2 * 64 * kSums}, {Float32, nullptr, Int8}, Read};

}  // namespace tersetorch
