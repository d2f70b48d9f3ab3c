#include "kernels/xnor_conv2d/xnor_conv2d.h"

#include <algorithm>

#include "kernels/common/cpu_isa.h"
#include "kernels/common/scalars.h"

namespace tersetorch {

std::int64_t XnorSpans(std::int64_t outputs, std::int64_t size, std::int64_t kernel, std::int64_t stride,
                       std::int64_t padding, std::int64_t dilation, XnorSpan* spans) noexcept {
  // Taps whose place is below `place`.
  const auto taps_below = [&](std::int64_t place) {
    return std::clamp<std::int64_t>(place <= 0 ? 0 : (place + dilation - 1) / dilation, 0, kernel);
  };
  std::int64_t count = 0;
  for (std::int64_t i = 0; i < outputs; ++i) {
    const std::int64_t origin = i * stride - padding;
    const std::int64_t begin = taps_below(-origin), end = std::max(begin, taps_below(size - origin));
    if (count > 0 && spans[count - 1].tap_begin == begin && spans[count - 1].tap_end == end) {
      spans[count - 1].end = i + 1;
    } else {
      spans[count++] = {i, i + 1, begin, end};
    }
  }
  return count;
}

void XnorSplitGroups(const std::uint64_t* x, std::int64_t groups, std::int64_t channels, std::uint64_t* split,
                     std::int64_t begin, std::int64_t end) noexcept {
  const std::int64_t words = (channels + 63) / 64, pixel_words = (groups * channels + 63) / 64;
  for (std::int64_t p = begin; p < end; ++p) {
    for (std::int64_t g = 0; g < groups; ++g) {
      for (std::int64_t i = 0; i < words; ++i) {
        const std::int64_t first = g * channels + 64 * i, word = p * pixel_words + first / 64, shift = first % 64;
        const std::int64_t count = std::min<std::int64_t>(64, channels - 64 * i);
        std::uint64_t bits = At<std::uint64_t>(x, word) >> shift;
        if (shift + count > 64) bits |= At<std::uint64_t>(x, word + 1) << (64 - shift);
        Put(split, (p * groups + g) * words + i, bits & ~std::uint64_t{0} >> (64 - count));
      }
    }
  }
}

void XnorConv2d(const XnorConv2dArgs& args, const XnorConvPart& part) noexcept {
  switch (ProcessCpuIsa().active) {
    case CpuIsa::kAvx512Bf16:
    case CpuIsa::kAvx512:
      return kXnorConv2dAvx512(args, part);
    case CpuIsa::kAvx2:
      return kXnorConv2dAvx2(args, part);
    case CpuIsa::kScalar:
      return kXnorConv2dScalar(args, part);
  }
}

}  // namespace tersetorch
