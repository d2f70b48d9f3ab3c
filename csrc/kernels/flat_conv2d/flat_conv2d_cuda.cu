#include "kernels/common/cuda.cuh"
#include "kernels/flat_conv2d/flat_conv2d_cuda.h"

namespace tersetorch {
namespace {

// ---- tiles

// A block multiplies so many pixels with a panel of lateral filters, so many channels at a time; a thread loads one
// pixel and computes some of some maps.
struct LateralTile {
  static constexpr int kPixels = 64, kChannels = 32, kSide = 4;
  static constexpr int kLanes = 16;
  static constexpr int kThreads = kPixels * kLanes / (kSide * kSide);
  static_assert(kLanes == kFlatLanes, "a block takes a panel");
  static_assert(kThreads == kPixels, "a thread loads one pixel");
};

// A block computes so many outputs of one channel.
struct PlaneTile {
  static constexpr int kThreads = 128;
  static constexpr int kTaps = kFlatMaxKernel;
  static_assert(kThreads >= 2 * kTaps, "a thread loads one tap");
};

// ---- kernels

template <typename Tile>
struct LateralMemory {
  alignas(16) float x[Tile::kChannels][Tile::kPixels];
  alignas(16) float weights[Tile::kChannels][Tile::kLanes];
};

// Neighbouring blocks take the same pixels for other panels: what one reads, the next finds in the cache.
template <typename Tile, typename Float>
__global__ void __launch_bounds__(Tile::kThreads) LateralKernel(FlatConvCudaArgs a) {
  constexpr int kSide = Tile::kSide;
  auto& memory = SharedMemory<LateralMemory<Tile>>();
  const FlatStage& s = a.stage;
  const int thread = static_cast<int>(threadIdx.x);
  const std::int64_t panels = s.rank * s.Panels(), panel = blockIdx.x % panels;
  const std::int64_t plane = s.height * s.width, pixels = a.images * plane;
  const std::int64_t first = blockIdx.x / panels * Tile::kPixels, loaded = first + thread;
  const bool there = loaded < pixels;
  const std::int64_t image = loaded / plane, row = (loaded - image * plane) / s.width;
  const Float* x = static_cast<const Float*>(a.x) + image * a.x_steps.image + row * a.x_steps.row +
                   (loaded - image * plane - row * s.width) * a.x_steps.column;
  const float* weights = s.packed + panel * s.in_channels * Tile::kLanes;
  const float* bias = s.packed + panels * s.in_channels * Tile::kLanes + panel * Tile::kLanes;
  // The pixels and the maps that this thread computes.
  const int pixel = thread % (Tile::kPixels / kSide) * kSide, map = thread / (Tile::kPixels / kSide) * kSide;
  float sums[kSide][kSide];
#pragma unroll
  for (int m = 0; m < kSide; ++m) {
#pragma unroll
    for (int p = 0; p < kSide; ++p) sums[m][p] = bias[map + m];
  }
  for (std::int64_t from = 0; from < s.in_channels; from += Tile::kChannels) {
    __syncthreads();
#pragma unroll
    for (int c = 0; c < Tile::kChannels; ++c) {
      memory.x[c][thread] = there && from + c < s.in_channels ? ToFloat(x[(from + c) * a.x_steps.channel]) : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < Tile::kChannels * Tile::kLanes / Tile::kThreads; ++i) {
      const int at = i * Tile::kThreads + thread, c = at / Tile::kLanes;
      memory.weights[c][at % Tile::kLanes] = from + c < s.in_channels ? weights[from * Tile::kLanes + at] : 0.0f;
    }
    __syncthreads();
    const int count = static_cast<int>(min(std::int64_t{Tile::kChannels}, s.in_channels - from));
#pragma unroll 8
    for (int c = 0; c < count; ++c) {
      const float4 of_x = *reinterpret_cast<const float4*>(&memory.x[c][pixel]);
      const float4 of_w = *reinterpret_cast<const float4*>(&memory.weights[c][map]);
      const float xs[] = {of_x.x, of_x.y, of_x.z, of_x.w}, ws[] = {of_w.x, of_w.y, of_w.z, of_w.w};
#pragma unroll
      for (int m = 0; m < kSide; ++m) {
#pragma unroll
        for (int p = 0; p < kSide; ++p) sums[m][p] += ws[m] * xs[p];
      }
    }
  }
#pragma unroll
  for (int p = 0; p < kSide; ++p) {
    const std::int64_t at = first + pixel + p;
    if (at >= pixels) break;
    const std::int64_t of = at / plane;
    float* to = a.l + ((of * panels + panel) * Tile::kLanes + map) * plane + at - of * plane;
#pragma unroll
    for (int m = 0; m < kSide; ++m) to[m * plane] = sums[m][p];
  }
}

template <typename Tile>
struct PlaneMemory {
  float vertical[Tile::kTaps], horizontal[Tile::kTaps];  // of the block's channel
};

template <typename Tile, typename Float>
__global__ void __launch_bounds__(Tile::kThreads) PlaneKernel(FlatConvCudaArgs a) {
  auto& memory = SharedMemory<PlaneMemory<Tile>>();
  const FlatStage& s = a.stage;
  const int thread = static_cast<int>(threadIdx.x);
  const std::int64_t channel = blockIdx.x % s.out_channels;
  const std::int64_t output = blockIdx.x / s.out_channels * Tile::kThreads + thread;
  const std::int64_t j = output % s.out_width, i = output / s.out_width % s.out_height;
  const std::int64_t image = output / s.out_width / s.out_height;
  const bool inside = image < a.images;  // the others load taps with them
  const std::int64_t panels = s.rank * s.Panels(), lanes = panels * kFlatLanes, plane = s.height * s.width;
  const float* vertical = s.packed + lanes * (s.in_channels + 1);
  const float* vertical_bias = vertical + lanes * s.kernel_h;
  const float* horizontal = vertical_bias + lanes;
  const float* bias = horizontal + lanes * s.kernel_w;
  const std::int64_t lane = channel % kFlatLanes;
  const int kernel_h = static_cast<int>(s.kernel_h), kernel_w = static_cast<int>(s.kernel_w);
  const std::int64_t top = i * s.stride_h - s.pad_h, left = j * s.stride_w - s.pad_w;
  float sum = bias[channel];
  for (std::int64_t r = 0; r < s.rank; ++r) {
    const std::int64_t panel = r * s.Panels() + channel / kFlatLanes;
    __syncthreads();
    if (thread < kernel_h) memory.vertical[thread] = vertical[(panel * kernel_h + thread) * kFlatLanes + lane];
    if (const int k = thread - Tile::kTaps; 0 <= k && k < kernel_w) {
      memory.horizontal[k] = horizontal[(panel * kernel_w + k) * kFlatLanes + lane];
    }
    __syncthreads();
    if (!inside) continue;
    const float of_map = vertical_bias[panel * kFlatLanes + lane];
    const float* l = a.l + ((image * panels + panel) * kFlatLanes + lane) * plane + top * s.width + left;
    for (int k = 0; k < kernel_w; ++k) {
      if (static_cast<std::uint64_t>(left + k) >= static_cast<std::uint64_t>(s.width)) continue;
      float of_column = of_map;
#pragma unroll 4
      for (int t = 0; t < kernel_h; ++t) {
        const bool read = static_cast<std::uint64_t>(top + t) < static_cast<std::uint64_t>(s.height);
        of_column += memory.vertical[t] * (read ? l[t * s.width + k] : 0.0f);
      }
      sum += memory.horizontal[k] * of_column;
    }
  }
  if (!inside) return;
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
    const dim3 blocks(BlocksOnX(CeilDiv(pixels, LateralTile::kPixels) * s.rank * s.Panels()));
    const int error = WithFloat(a.x_stored_as, [&](auto number) {
      using Float = decltype(number);
      return Launch(LateralKernel<LateralTile, Float>, blocks, LateralTile::kThreads, stream, a);
    });
    if (error != cudaSuccess) return error;
  }
  const dim3 blocks(BlocksOnX(CeilDiv(outputs, PlaneTile::kThreads) * s.out_channels));
  return WithFloat(a.y_stored_as, [&](auto number) {
    using Float = decltype(number);
    return Launch(PlaneKernel<PlaneTile, Float>, blocks, PlaneTile::kThreads, stream, a);
  });
}

}  // namespace tersetorch
