#include "kernels/sign_pack/sign_pack.h"

#include "kernels/common/cpu_isa.h"

namespace tersetorch {

void SignPack(const SignPackArgs& args, std::int64_t word_begin, std::int64_t word_end) noexcept {
  switch (ProcessCpuIsa().active) {
    case CpuIsa::kAvx512Bf16:
    case CpuIsa::kAvx512:
      return kSignPackAvx512(args, word_begin, word_end);
    case CpuIsa::kAvx2:
      return kSignPackAvx2(args, word_begin, word_end);
    case CpuIsa::kScalar:
      return kSignPackScalar(args, word_begin, word_end);
  }
}

void SignPackPlanes(const SignPackPlanesArgs& args, std::int64_t pixel_begin, std::int64_t pixel_end) noexcept {
  switch (ProcessCpuIsa().active) {
    case CpuIsa::kAvx512Bf16:
    case CpuIsa::kAvx512:
      return kSignPackPlanesAvx512(args, pixel_begin, pixel_end);
    case CpuIsa::kAvx2:
      return kSignPackPlanesAvx2(args, pixel_begin, pixel_end);
    case CpuIsa::kScalar:
      return kSignPackPlanesScalar(args, pixel_begin, pixel_end);
  }
}

}  // namespace tersetorch
