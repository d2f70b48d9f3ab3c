#include "kernels/sign_max_pool2d/sign_max_pool2d.h"

#include "kernels/common/cpu_isa.h"

namespace tersetorch {

void SignMaxPool2d(const SignMaxPool2dArgs& args, std::int64_t row_begin, std::int64_t row_end) noexcept {
  switch (ProcessCpuIsa().active) {
    case CpuIsa::kAvx512Bf16:
    case CpuIsa::kAvx512:
      return kSignMaxPool2dAvx512(args, row_begin, row_end);
    case CpuIsa::kAvx2:
      return kSignMaxPool2dAvx2(args, row_begin, row_end);
    case CpuIsa::kScalar:
      return kSignMaxPool2dScalar(args, row_begin, row_end);
  }
}

}  // namespace tersetorch
