#include "kernels/planes/planes.h"

#include "kernels/common/cpu_isa.h"

namespace tersetorch {
namespace {

const WordPlanesFunctions& Active() {
  switch (ProcessCpuIsa().active) {
    case CpuIsa::kAvx512Bf16:
    case CpuIsa::kAvx512:
      return kWordPlanesAvx512;
    case CpuIsa::kAvx2:
      return kWordPlanesAvx2;
    case CpuIsa::kScalar:
      break;
  }
  return kWordPlanesScalar;
}

}  // namespace

void PairPlanes(const WordPlanesArgs& args, std::int64_t begin, std::int64_t end) noexcept {
  Active().pairs(args, begin, end);
}

void QuadPlanes(const WordPlanesArgs& args, std::int64_t begin, std::int64_t end) noexcept {
  Active().quads(args, begin, end);
}

}  // namespace tersetorch
