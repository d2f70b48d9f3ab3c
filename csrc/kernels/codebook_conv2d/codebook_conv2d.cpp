#include "kernels/codebook_conv2d/codebook_conv2d.h"

#include "kernels/common/cpu_isa.h"

namespace tersetorch {
namespace {

const CodebookConvKernels& Active() {
  switch (ProcessCpuIsa().active) {
    case CpuIsa::kAvx512Bf16:
    case CpuIsa::kAvx512:
      return kCodebookConvAvx512;
    case CpuIsa::kAvx2:
      return kCodebookConvAvx2;
    case CpuIsa::kScalar:
      break;
  }
  return kCodebookConvScalar;
}

}  // namespace

void CodebookPad(const CodebookPadArgs& args, std::int64_t channel_begin, std::int64_t channel_end) noexcept {
  Active().pad(args, channel_begin, channel_end);
}

void CodebookPackWindows(const CodebookWindowsArgs& args, std::int64_t chunk_begin, std::int64_t chunk_end) noexcept {
  Active().pack_windows(args, chunk_begin, chunk_end);
}

}  // namespace tersetorch
