// The loops end, do something at every level this CPU has, and read no byte outside their buffer's blocks.
#include <vector>

#include "kernels/check.h"
#include "kernels/machine_rates/machine_rates.h"

using tersetorch::CpuIsa;
using tersetorch::test::Expect;

int main() {
  const int detected = static_cast<int>(tersetorch::ProcessCpuIsa().detected);
  const std::vector<char> buffer(3 * tersetorch::kRatesReadBlock, 1);
  std::int64_t float32_before = 1;  // avx512bf16 multiplies float32 as avx512 does
  for (int level = 0; level <= detected; ++level) {
    const char* name = CpuIsaName(static_cast<CpuIsa>(level));
    const tersetorch::MachineRateLoops& loops = MachineRates(static_cast<CpuIsa>(level));
    for (int i = 0; i < 3; ++i) {
      Expect((loops.operations[i] > 0) == (loops.arithmetic[i] != nullptr), "loop %d of %s", i, name);
      for (const std::int64_t passes : {0, 1, 7}) {
        if (loops.arithmetic[i] != nullptr) loops.arithmetic[i](passes);
      }
    }
    Expect(loops.operations[0] >= float32_before, "float32 of %s", name);
    float32_before = loops.operations[0];
    for (const std::int64_t blocks : {0, 1, 3}) {
      for (const std::int64_t passes : {0, 1, 2}) loops.read(buffer.data(), blocks, passes);
    }
  }
  return tersetorch::test::Failures() != 0;
}
