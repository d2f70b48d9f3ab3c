#include "kernels/bitplane_matmul/bitplane_matmul.h"

#include "kernels/common/cpu_isa.h"

namespace tersetorch {
namespace {

const BitplaneMatmulKernels& Active() {
  switch (ProcessCpuIsa().active) {
    case CpuIsa::kAvx512Bf16:
    case CpuIsa::kAvx512:
      return kBitplaneMatmulAvx512;
    case CpuIsa::kAvx2:
      return kBitplaneMatmulAvx2;
    case CpuIsa::kScalar:
      break;
  }
  return kBitplaneMatmulScalar;
}

}  // namespace

void BitplaneTables(const BitplaneTablesArgs& args, std::int64_t word_begin, std::int64_t word_end) noexcept {
  Active().tables(args, word_begin, word_end);
}

void BitplaneMatmul(const BitplaneMatmulArgs& args, std::int64_t tile_begin, std::int64_t tile_end) noexcept {
  Active().multiply(args, tile_begin, tile_end);
}

}  // namespace tersetorch
