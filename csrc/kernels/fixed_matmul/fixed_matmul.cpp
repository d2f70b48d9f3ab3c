#include "kernels/fixed_matmul/fixed_matmul.h"

#include "kernels/common/cpu_isa.h"

namespace tersetorch {
namespace {

const FixedMatmulKernels& Active() {
  switch (ProcessCpuIsa().active) {
    case CpuIsa::kAvx512Bf16:
    case CpuIsa::kAvx512:
      return kFixedMatmulAvx512;
    case CpuIsa::kAvx2:
      return kFixedMatmulAvx2;
    case CpuIsa::kScalar:
      break;
  }
  return kFixedMatmulScalar;
}

}  // namespace

void FixedMatmul(const FixedMatmulArgs& args, std::int64_t row_begin, std::int64_t row_end) noexcept {
  Active().multiply(args, row_begin, row_end);
}

void FixedConvert(const FixedConvertArgs& args, std::int64_t begin, std::int64_t end) noexcept {
  Active().convert(args, begin, end);
}

}  // namespace tersetorch
