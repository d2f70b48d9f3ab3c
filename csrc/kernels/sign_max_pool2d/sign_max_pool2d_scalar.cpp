#include "kernels/common/scalars.h"
#include "kernels/sign_max_pool2d/sign_max_pool2d.h"

namespace tersetorch {
namespace {

void Pool(const SignMaxPool2dArgs& a, std::int64_t row_begin, std::int64_t row_end) noexcept {
  for (std::int64_t r = row_begin; r < row_end; ++r) {
    const std::int64_t n = r / a.out_height, i = r % a.out_height;
    for (std::int64_t j = 0; j < a.out_width; ++j) {
      for (std::int64_t k = 0; k < a.words; ++k) {
        std::uint64_t signs = ~std::uint64_t{0};
        for (std::int64_t kh = 0; kh < a.kernel_h; ++kh) {
          for (std::int64_t kw = 0; kw < a.kernel_w; ++kw) {
            const std::int64_t row = i * a.stride_h + kh * a.dilation_h - a.pad_h;
            const std::int64_t column = j * a.stride_w + kw * a.dilation_w - a.pad_w;
            if (row < 0 || row >= a.height || column < 0 || column >= a.width) continue;
            signs &= At<std::uint64_t>(a.x, ((n * a.height + row) * a.width + column) * a.words + k);
          }
        }
        if (a.flips != nullptr) signs ^= At<std::uint64_t>(a.flips, k);
        Put(a.y, (r * a.out_width + j) * a.words + k, signs);
      }
    }
  }
}

}  // namespace

const SignMaxPool2dVariant kSignMaxPool2dScalar = &Pool;

}  // namespace tersetorch
