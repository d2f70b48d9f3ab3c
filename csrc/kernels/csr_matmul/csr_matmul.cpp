#include "kernels/csr_matmul/csr_matmul.h"

#include "kernels/common/cpu_isa.h"

namespace tersetorch {
namespace {

const CsrKernels& Active() {
  switch (ProcessCpuIsa().active) {
    case CpuIsa::kAvx512Bf16:
    case CpuIsa::kAvx512:
      return kCsrAvx512;
    case CpuIsa::kAvx2:
      return kCsrAvx2;
    case CpuIsa::kScalar:
      break;
  }
  return kCsrScalar;
}

}  // namespace

CsrStatus CsrMatmul(const CsrMatmulArgs& args, std::int64_t row_begin, std::int64_t row_end) noexcept {
  return Active().matmul(args, row_begin, row_end);
}

CsrStatus CsrMatmulGradX(const CsrGradXArgs& args) noexcept { return Active().grad_x(args); }

CsrStatus CsrMatmulGradValues(const CsrGradValuesArgs& args, std::int64_t row_begin, std::int64_t row_end) noexcept {
  return Active().grad_values(args, row_begin, row_end);
}

}  // namespace tersetorch
