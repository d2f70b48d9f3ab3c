#include "kernels/common/cuda.cuh"
#include "kernels/csr_matmul/csr_weight.cuh"
#include "kernels/sparse_conv2d/sparse_conv2d_cuda.h"

namespace tersetorch {
namespace {

// ---- tiles

// A block computes so many outputs of one filter.
struct ConvTile {
  static constexpr int kThreads = 128;
};

// A non-zero, as all outputs of its filter see it.
struct Tap {
  std::int64_t offset;       // in x, from the input that an output's first tap multiplies in channel 0
  std::int64_t down, right;  // of that input
  float value;
};

// The non-zeros that the block works on.
template <typename Tile>
struct Taps {
  Tap taps[Tile::kThreads];
};

// A damaged one lies below every image, so that nothing is read for it.
template <typename Values>
__device__ Tap TapAt(const ConvCudaArgs& a, std::int64_t filter, std::int32_t k) {
  const ConvShape& s = a.shape;
  const std::int32_t column = ColumnAt(a.weight, k);
  if (Outside(a.weight, column) || Values::Damaged(a.weight, k)) return {0, a.height + a.pad_h, 0, DamagedWeight()};
  const std::int64_t row = column / s.kernel_w, group = filter / (s.out_channels / s.groups);
  const std::int64_t channel = group * (s.in_channels / s.groups) + row / s.kernel_h;
  const std::int64_t down = row % s.kernel_h * s.dilation_h, right = column % s.kernel_w * s.dilation_w;
  return {channel * a.x_steps.channel + down * a.x_steps.row + right * a.x_steps.column, down, right,
          Values::At(a.weight, k)};
}

// ---- kernel

// Neighbouring blocks compute the same outputs of other filters: what one reads, the next finds in the cache.
template <typename Tile, typename Values, typename Float>
__global__ void __launch_bounds__(Tile::kThreads) ConvKernel(ConvCudaArgs a) {
  auto& taps = SharedMemory<Taps<Tile>>().taps;
  const int thread = static_cast<int>(threadIdx.x);
  const std::int64_t filter = blockIdx.x % a.weight.rows, columns = a.out_width, rows = a.out_height;
  const std::int64_t output = blockIdx.x / a.weight.rows * Tile::kThreads + thread;
  const std::int64_t j = output % columns, i = output / columns % rows, image = output / columns / rows;
  const bool inside = image < a.images;  // the others decode with them
  const std::int64_t top = i * a.shape.stride_h - a.pad_h, left = j * a.shape.stride_w - a.pad_w;
  const Float* x = static_cast<const Float*>(a.x);
  const std::int64_t origin = image * a.x_steps.image + top * a.x_steps.row + left * a.x_steps.column;
  const Row row = RowAt(a.weight, filter);
  float sum = row.damaged ? DamagedWeight() : 0.0f;
  for (std::int64_t first = row.begin; first < row.end; first += Tile::kThreads) {
    const int count = static_cast<int>(min(std::int64_t{Tile::kThreads}, row.end - first));
    if (thread < count) taps[thread] = TapAt<Values>(a, filter, static_cast<std::int32_t>(first + thread));
    __syncthreads();
    if (inside) {
      for (int t = 0; t < count; ++t) {
        const Tap& tap = taps[t];
        const std::int64_t h = top + tap.down, w = left + tap.right;
        const bool read = 0 <= h && h < a.height && 0 <= w && w < a.width;
        sum += tap.value * (read ? ToFloat(x[origin + tap.offset]) : 0.0f);
      }
    }
    __syncthreads();
  }
  if (!inside) return;
  if (a.bias != nullptr) sum += a.bias[filter];
  if (a.relu && sum < 0) sum = 0;  // NaN stays
  const std::int64_t at =
      image * a.y_steps.image + filter * a.y_steps.channel + i * a.y_steps.row + j * a.y_steps.column;
  static_cast<Float*>(a.y)[at] = FromFloat<Float>(sum);
}

}  // namespace

int ConvCuda(const ConvCudaArgs& a, void* stream) noexcept {
  const std::int64_t outputs = a.images * a.out_height * a.out_width;
  if (a.weight.rows == 0 || outputs == 0) return cudaSuccess;
  const dim3 blocks(static_cast<unsigned>(CeilDiv(outputs, ConvTile::kThreads) * a.weight.rows), 1, 1);
  return WithValues(a.weight.stored_as, [&](auto values) {
    return WithFloat(a.stored_as, [&](auto number) {
      return Launch(ConvKernel<ConvTile, decltype(values), decltype(number)>, blocks, ConvTile::kThreads, stream, a);
    });
  });
}

}  // namespace tersetorch
