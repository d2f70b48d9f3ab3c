#include <cmath>

#include "kernels/bitplane_matmul/bitplane_matmul_cuda.h"
#include "kernels/common/cuda.cuh"
#include "kernels/common/sign_tables.cuh"

namespace tersetorch {
namespace {

struct Rows {
  const std::uint8_t* x;
  std::int64_t columns;

  __device__ const std::uint8_t* At(std::int64_t n, std::int64_t c) const { return x + n * columns + c; }
};

// Null outside the image.
struct Patches {
  const std::uint8_t* x;
  BitplaneImages i;

  __device__ const std::uint8_t* At(std::int64_t n, std::int64_t c) const {
    const std::int64_t of_image = i.out_height * i.out_width, position = n % of_image;
    const std::int64_t ky = c / i.kernel_width % i.kernel_height, kx = c % i.kernel_width;
    const std::int64_t row = position / i.out_width * i.stride_y - i.padding_y + ky * i.dilation_y;
    const std::int64_t column = position % i.out_width * i.stride_x - i.padding_x + kx * i.dilation_x;
    if (row < 0 || row >= i.height || column < 0 || column >= i.width) return nullptr;
    return x + n / of_image * i.image_stride + c / (i.kernel_width * i.kernel_height) * i.channel_stride +
           row * i.row_stride + column * i.column_stride;
  }
};

struct Numbers {
  std::int64_t columns;
  std::int32_t step, zero;
};

template <typename Tile, typename Samples>
__global__ void __launch_bounds__(Tile::kThreads) BitplaneKernel(Samples samples, Numbers v, BitplaneMatmulArgs a) {
  const auto number = [&](std::int64_t n, std::int64_t c) {
    const std::uint8_t* from = c < v.columns ? samples.At(n, c) : nullptr;
    return from == nullptr ? 0 : v.step * *from - v.zero;
  };
  const auto store = [&](std::int64_t tile, std::int64_t n, int lane, int dot) {
    const std::int64_t r = tile * kXnorRows + lane;
    const bool within = r < a.rows;
    if (a.bits != nullptr) {
      const unsigned signs = __ballot_sync(kWholeWarp, within && dot < a.thresholds[r]);
      auto* y = reinterpret_cast<std::uint32_t*>(a.bits) + n * 2 * CeilDiv(a.rows, 64);
      if (lane == 0) y[tile] = signs;
      // The second half of the last word, where no tile has it.
      if (lane == 0 && tile % 2 == 0 && (tile + 1) * kXnorRows >= a.rows) y[tile + 1] = 0;
    } else if (within && a.dots != nullptr) {
      a.dots[n * a.rows + r] = dot;
    } else if (within) {
      const float scale = a.scale == nullptr ? 1.0f : a.scale[r], bias = a.bias == nullptr ? 0.0f : a.bias[r];
      a.floats[n * a.rows + r] = fmaf(static_cast<float>(dot), scale, bias);
    }
  };
  MultiplySigns<Tile, int>(a.weight, a.rows, a.words, a.samples, number, store);
}

}  // namespace

int BitplaneMatmulCuda(const BitplaneTablesArgs& x, const BitplaneMatmulArgs& a, void* stream) noexcept {
  if (a.samples == 0 || a.rows == 0) return cudaSuccess;
  using Tile = SignTablesTile;
  const Numbers numbers{x.columns, x.step, x.zero};
  const dim3 grid = Tile::Grid(a.rows, a.samples);
  if (x.images == nullptr) {
    const Rows rows{x.x, x.columns};
    return Launch(BitplaneKernel<Tile, Rows>, grid, Tile::kThreads, stream, rows, numbers, a);
  }
  const Patches patches{x.x, *x.images};
  return Launch(BitplaneKernel<Tile, Patches>, grid, Tile::kThreads, stream, patches, numbers, a);
}

}  // namespace tersetorch
