#include "kernels/sign_matmul/sign_matmul.h"

#include "kernels/common/cpu_isa.h"

namespace tersetorch {
namespace {

const SignMatmulKernels& Active() {
  switch (ProcessCpuIsa().active) {
    case CpuIsa::kAvx512Bf16:
    case CpuIsa::kAvx512:
      return kSignMatmulAvx512;
    case CpuIsa::kAvx2:
      return kSignMatmulAvx2;
    case CpuIsa::kScalar:
      break;
  }
  return kSignMatmulScalar;
}

}  // namespace

void SignMatmulTables(const SignTablesArgs& args, std::int64_t word_begin, std::int64_t word_end) noexcept {
  Active().tables(args, word_begin, word_end);
}

void SignMatmul(const SignMatmulArgs& args, std::int64_t tile_begin, std::int64_t tile_end) noexcept {
  Active().multiply(args, tile_begin, tile_end);
}

}  // namespace tersetorch
