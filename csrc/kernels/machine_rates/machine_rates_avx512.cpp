#include "kernels/machine_rates/machine_rates_simd.h"

namespace tersetorch {

const MachineRateLoops kMachineRatesAvx512 = {
    {2 * 16 * kSums, 0, 2 * 64 * kSums, kBinaryOperations}, {Float32, nullptr, Int8, Binary}, Read};

}  // namespace tersetorch
