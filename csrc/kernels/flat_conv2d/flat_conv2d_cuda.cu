#include "kernels/common/cuda.cuh"
#include "kernels/flat_conv2d/flat_conv2d_cuda.h"

namespace tersetorch {
namespace {

// ---- tiles

// A block multiplies so many pixels with a panel of lateral filters, so many channels at a time; a thread has one pixel
// and half of the panel.
struct LateralTile {
  static constexpr int kPixels = 64, kChannels = 16, kMaps = 8;
  static constexpr int kLanes = 16;
  static constexpr int kThreads = kPixels * kLanes / kMaps;
  static_assert(kLanes == kFlatLanes, "a block takes a panel");
};

// A block computes so many outputs of one channel.
struct PlaneTile {
  static constexpr int kThreads = 128;
};

// ---- kernels

template <typename Tile>
struct LateralMemory {
  float x[Tile::kChannels][Tile::kPixels];
  float weights[Tile::kChannels][Tile::kLanes];
};

// Neighbouring blocks take the same pixels for other panels: what one reads, the next finds in the cache.
template <typename Tile, typename Float>
__global__ void __launch_bounds__(Tile::kThreads) LateralKernel(FlatConvCudaArgs a) {
  auto& memory = SharedMemory<LateralMemory<Tile>>();
  const FlatStage& s = a.stage;
  const int thread = static_cast<int>(threadIdx.x);
  const std::int64_t panels = s.rank * s.Panels(), panel = blockIdx.x % panels;
  const std::int64_t plane = s.height * s.width, pixels = a.images * plane;
  const std::int64_t first = blockIdx.x / panels * Tile::kPixels;
  const int lane = thread % Tile::kPixels, maps = thread / Tile::kPixels * Tile::kMaps;
  const float* weights = s.packed + panel * s.in_channels * Tile::kLanes;
  const float* bias = s.packed + panels * s.in_channels * Tile::kLanes + panel * Tile::kLanes;
  float sums[Tile::kMaps];
#pragma unroll
  for (int m = 0; m < Tile::kMaps; ++m) sums[m] = bias[maps + m];
  for (std::int64_t from = 0; from < s.in_channels; from += Tile::kChannels) {
    for (int i = thread; i < Tile::kChannels * Tile::kPixels; i += Tile::kThreads) {
      const std::int64_t c = from + i / Tile::kPixels, pixel = first + i % Tile::kPixels;
      const std::int64_t image = pixel / plane, row = pixel % plane / s.width, column = pixel % s.width;
      const bool there = c < s.in_channels && pixel < pixels;
      const std::int64_t at =
          image * a.x_steps.image + c * a.x_steps.channel + row * a.x_steps.row + column * a.x_steps.column;
      memory.x[i / Tile::kPixels][i % Tile::kPixels] = there ? ToFloat(static_cast<const Float*>(a.x)[at]) : 0.0f;
    }
    for (int i = thread; i < Tile::kChannels * Tile::kLanes; i += Tile::kThreads) {
      const std::int64_t c = from + i / Tile::kLanes;
      memory.weights[i / Tile::kLanes][i % Tile::kLanes] =
          c < s.in_channels ? weights[c * Tile::kLanes + i % Tile::kLanes] : 0.0f;
    }
    __syncthreads();
    const int count = static_cast<int>(min(std::int64_t{Tile::kChannels}, s.in_channels - from));
    for (int c = 0; c < count; ++c) {
      const float x = memory.x[c][lane];
#pragma unroll
      for (int m = 0; m < Tile::kMaps; ++m) sums[m] += memory.weights[c][maps + m] * x;
    }
    __syncthreads();
  }
  const std::int64_t pixel = first + lane;
  if (pixel >= pixels) return;
  float* to = a.l + ((pixel / plane * panels + panel) * Tile::kLanes + maps) * plane + pixel % plane;
#pragma unroll
  for (int m = 0; m < Tile::kMaps; ++m) to[m * plane] = sums[m];
}

template <typename Tile, typename Float>
__global__ void __launch_bounds__(Tile::kThreads) PlaneKernel(FlatConvCudaArgs a) {
  const FlatStage& s = a.stage;
  const std::int64_t channel = blockIdx.x % s.out_channels;
  const std::int64_t output = blockIdx.x / s.out_channels * Tile::kThreads + threadIdx.x;
  const std::int64_t j = output % s.out_width, i = output / s.out_width % s.out_height;
  const std::int64_t image = output / s.out_width / s.out_height;
  if (image >= a.images) return;
  const std::int64_t panels = s.rank * s.Panels(), lanes = panels * kFlatLanes, plane = s.height * s.width;
  const float* vertical = s.packed + lanes * (s.in_channels + 1);
  const float* vertical_bias = vertical + lanes * s.kernel_h;
  const float* horizontal = vertical_bias + lanes;
  const float* bias = horizontal + lanes * s.kernel_w;
  const std::int64_t lane = channel % kFlatLanes;
  const std::int64_t top = i * s.stride_h - s.pad_h, left = j * s.stride_w - s.pad_w;
  float sum = bias[channel];
  for (std::int64_t r = 0; r < s.rank; ++r) {
    const std::int64_t panel = r * s.Panels() + channel / kFlatLanes;
    const float* l = a.l + ((image * panels + panel) * kFlatLanes + lane) * plane;
    for (std::int64_t k = 0; k < s.kernel_w; ++k) {
      const std::int64_t w = left + k;
      if (w < 0 || w >= s.width) continue;
      float of_column = vertical_bias[panel * kFlatLanes + lane];
      for (std::int64_t t = 0; t < s.kernel_h; ++t) {
        const std::int64_t h = top + t;
        const float number = 0 <= h && h < s.height ? l[h * s.width + w] : 0.0f;
        of_column += vertical[(panel * s.kernel_h + t) * kFlatLanes + lane] * number;
      }
      sum += horizontal[(panel * s.kernel_w + k) * kFlatLanes + lane] * of_column;
    }
  }
  const std::int64_t at =
      image * a.y_steps.image + channel * a.y_steps.channel + i * a.y_steps.row + j * a.y_steps.column;
  static_cast<Float*>(a.y)[at] = FromFloat<Float>(a.relu && sum < 0 ? 0.0f : sum);
}

}  // namespace

int FlatConvCuda(const FlatConvCudaArgs& a, void* stream) noexcept {
  const FlatStage& s = a.stage;
  const std::int64_t pixels = a.images * s.height * s.width, outputs = a.images * s.out_height * s.out_width;
  if (s.out_channels == 0 || outputs == 0) return cudaSuccess;
  if (pixels > 0) {
    const dim3 blocks(static_cast<unsigned>(CeilDiv(pixels, LateralTile::kPixels) * s.rank * s.Panels()), 1, 1);
    const int error = WithFloat(a.x_stored_as, [&](auto number) {
      using Float = decltype(number);
      return Launch(LateralKernel<LateralTile, Float>, blocks, LateralTile::kThreads, stream, a);
    });
    if (error != cudaSuccess) return error;
  }
  const dim3 blocks(static_cast<unsigned>(CeilDiv(outputs, PlaneTile::kThreads) * s.out_channels), 1, 1);
  return WithFloat(a.y_stored_as, [&](auto number) {
    using Float = decltype(number);
    return Launch(PlaneKernel<PlaneTile, Float>, blocks, PlaneTile::kThreads, stream, a);
  });
}

}  // namespace tersetorch
