#include "kernels/xnor_matmul/xnor_matmul.h"

#include "kernels/common/cpu_isa.h"

namespace tersetorch {

void XnorMatmul(const XnorMatmulArgs& args, std::int64_t tile_begin, std::int64_t tile_end) noexcept {
  switch (ProcessCpuIsa().active) {
    case CpuIsa::kAvx512Bf16:
    case CpuIsa::kAvx512:
      return kXnorMatmulAvx512(args, tile_begin, tile_end);
    case CpuIsa::kAvx2:
      return kXnorMatmulAvx2(args, tile_begin, tile_end);
    case CpuIsa::kScalar:
      return kXnorMatmulScalar(args, tile_begin, tile_end);
  }
}

}  // namespace tersetorch
