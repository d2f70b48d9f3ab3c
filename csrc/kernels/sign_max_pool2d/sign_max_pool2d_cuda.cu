#include "kernels/common/cuda.cuh"
#include "kernels/sign_max_pool2d/sign_max_pool2d_cuda.h"

namespace tersetorch {
namespace {

// A thread has a word of y.
struct WordTile {
  static constexpr int kThreads = 256;
};

template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads) SignMaxPool2dKernel(SignMaxPool2dArgs a) {
  const std::int64_t at = std::int64_t{blockIdx.x} * Tile::kThreads + threadIdx.x;
  if (at >= a.images * a.out_height * a.out_width * a.words) return;
  const std::int64_t k = at % a.words, pixel = at / a.words, j = pixel % a.out_width, r = pixel / a.out_width;
  const std::int64_t n = r / a.out_height, first_row = r % a.out_height * a.stride_h - a.pad_h;
  std::uint64_t signs = ~std::uint64_t{0};
  for (std::int64_t kh = 0; kh < a.kernel_h; ++kh) {
    const std::int64_t row = first_row + kh * a.dilation_h;
    if (row < 0 || row >= a.height) continue;
    for (std::int64_t kw = 0; kw < a.kernel_w; ++kw) {
      const std::int64_t column = j * a.stride_w - a.pad_w + kw * a.dilation_w;
      if (column >= 0 && column < a.width) signs &= a.x[((n * a.height + row) * a.width + column) * a.words + k];
    }
  }
  a.y[at] = a.flips == nullptr ? signs : signs ^ a.flips[k];
}

}  // namespace

int SignMaxPool2dCuda(const SignMaxPool2dArgs& a, void* stream) noexcept {
  const std::int64_t words = a.images * a.out_height * a.out_width * a.words;
  if (words == 0) return cudaSuccess;
  const dim3 grid(BlocksOnX(words, WordTile::kThreads));
  return Launch(SignMaxPool2dKernel<WordTile>, grid, WordTile::kThreads, stream, a);
}

}  // namespace tersetorch
