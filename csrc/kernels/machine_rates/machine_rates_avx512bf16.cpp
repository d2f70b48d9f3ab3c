#include "kernels/machine_rates/machine_rates_simd.h"

namespace tersetorch {
namespace {

#define DOT_BFLOAT16(n) "vdpbf16ps %%zmm17, %%zmm16, %%zmm" #n "\n\t"

void BFloat16(std::int64_t passes) noexcept { ARITHMETIC_LOOP(DOT_BFLOAT16, 0x3f803f80); }

}  // namespace

const MachineRateLoops kMachineRatesAvx512Bf16 = {
    {2 * 16 * kSums, 2 * 32 * kSums, 2 * 64 * kSums, kBinaryOperations}, {Float32, BFloat16, Int8, Binary}, Read};

}  // namespace tersetorch
