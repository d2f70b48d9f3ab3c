#include <cmath>

#include "kernels/codebook_conv2d/codebook_conv2d_cuda.h"
#include "kernels/common/cuda.cuh"

namespace tersetorch {
namespace {

// ---- tiles

// A block computes so many outputs of one filter.
struct FilterTile {
  static constexpr int kThreads = 128;
};

// ---- modes: what is multiplied and added up

struct Exact {
  using Sum = float;
  __device__ static float Weight(const CodebookConvCudaArgs& a, std::int64_t table, std::uint32_t code) {
    return a.weight.codebook[table * a.weight.entries + code];
  }
  template <typename Float>
  __device__ static float X(const CodebookConvCudaArgs& a, std::int64_t at) {
    return ToFloat(static_cast<const Float*>(a.x)[at]);
  }
  __device__ static float Number(const CodebookConvCudaArgs&, float sum, std::int64_t, std::int64_t, float bias) {
    return sum + bias;
  }
};

struct Rounded : Exact {
  __device__ static float Weight(const CodebookConvCudaArgs& a, std::int64_t table, std::uint32_t code) {
    return ToFloat(FromFloat<BFloat16>(Exact::Weight(a, table, code)));
  }
  template <typename Float>
  __device__ static float X(const CodebookConvCudaArgs& a, std::int64_t at) {
    return ToFloat(FromFloat<BFloat16>(Exact::X<Float>(a, at)));
  }
};

struct Integers {
  using Sum = int;
  __device__ static int Weight(const CodebookConvCudaArgs& a, std::int64_t table, std::uint32_t code) {
    return a.tables[table * a.table_stride + code];
  }
  template <typename Float>
  __device__ static int X(const CodebookConvCudaArgs& a, std::int64_t at) {
    return static_cast<const std::int8_t*>(a.x)[at];
  }
  __device__ static float Number(const CodebookConvCudaArgs& a, int sum, std::int64_t n, std::int64_t r, float bias) {
    const float of_table = a.table_scales[a.weight.per_row ? r : 0], of_image = a.image_scales[n];
    const float low = of_image < of_table ? of_image : of_table, high = of_image < of_table ? of_table : of_image;
    return fmaf(static_cast<float>(sum) * low, high, bias);
  }
};

// ---- kernels

// A weight, as all outputs of its filter see it.
template <typename Number>
struct Tap {
  std::int64_t offset;       // in x, from the input that an output's first tap multiplies in channel 0
  std::int64_t down, right;  // of that input
  Number weight;
  bool damaged;
};

// The weights that the block works on.
template <typename Tile, typename Number>
struct Taps {
  Tap<Number> taps[Tile::kThreads];
};

template <typename Mode>
__device__ Tap<typename Mode::Sum> TapAt(const CodebookConvCudaArgs& a, std::int64_t filter, std::int64_t column) {
  const ConvShape& s = a.shape;
  const std::uint32_t code = CodeAt(a.weight, filter, column);
  const bool damaged = code >= a.weight.entries;
  const std::int64_t row = column / s.kernel_w, group = filter / (s.out_channels / s.groups);
  const std::int64_t channel = group * (s.in_channels / s.groups) + row / s.kernel_h;
  const std::int64_t down = row % s.kernel_h * s.dilation_h, right = column % s.kernel_w * s.dilation_w;
  const std::int64_t table = a.weight.per_row ? filter : column / a.weight.column_block;
  return {channel * a.x_steps.channel + down * a.x_steps.row + right * a.x_steps.column, down, right,
          damaged ? typename Mode::Sum{} : Mode::Weight(a, table, code), damaged};
}

// Neighbouring blocks compute the same outputs of other filters: what one reads, the next finds in the cache.
template <typename Tile, typename Mode, typename Float>
__global__ void __launch_bounds__(Tile::kThreads) CodebookConvKernel(CodebookConvCudaArgs a) {
  using Number = typename Mode::Sum;
  auto& taps = SharedMemory<Taps<Tile, Number>>().taps;
  const int thread = static_cast<int>(threadIdx.x);
  const std::int64_t filter = blockIdx.x % a.weight.rows;
  const std::int64_t output = blockIdx.x / a.weight.rows * Tile::kThreads + thread;
  const std::int64_t j = output % a.out_width, i = output / a.out_width % a.out_height;
  const std::int64_t image = output / a.out_width / a.out_height;
  const bool inside = image < a.images;  // the others decode with them
  const std::int64_t top = i * a.shape.stride_h - a.pad_h, left = j * a.shape.stride_w - a.pad_w;
  const std::int64_t origin = image * a.x_steps.image + top * a.x_steps.row + left * a.x_steps.column;
  bool damaged = false;
  Number total{};
  for (std::int64_t first = 0; first < a.weight.columns; first += Tile::kThreads) {
    const int count = static_cast<int>(min(std::int64_t{Tile::kThreads}, a.weight.columns - first));
    if (thread < count) taps[thread] = TapAt<Mode>(a, filter, first + thread);
    __syncthreads();
    if (inside) {
      for (int t = 0; t < count; ++t) {
        const Tap<Number>& tap = taps[t];
        const std::int64_t h = top + tap.down, w = left + tap.right;
        const bool read = 0 <= h && h < a.height && 0 <= w && w < a.width;
        damaged |= tap.damaged;
        total += tap.weight * (read ? Mode::template X<Float>(a, origin + tap.offset) : Number{});
      }
    }
    __syncthreads();
  }
  if (!inside) return;
  const float bias = a.bias == nullptr ? 0.0f : a.bias[filter];
  const float number = damaged ? DamagedWeight() : Mode::Number(a, total, image, filter, bias);
  const std::int64_t at =
      image * a.y_steps.image + filter * a.y_steps.channel + i * a.y_steps.row + j * a.y_steps.column;
  static_cast<Float*>(a.y)[at] = FromFloat<Float>(a.relu && number < 0 ? 0.0f : number);
}

}  // namespace

int CodebookConvCuda(const CodebookConvCudaArgs& a, void* stream) noexcept {
  const std::int64_t outputs = a.images * a.out_height * a.out_width;
  if (a.weight.rows == 0 || outputs == 0) return cudaSuccess;
  const dim3 blocks(static_cast<unsigned>(CeilDiv(outputs, FilterTile::kThreads) * a.weight.rows), 1, 1);
  return WithFloat(a.stored_as, [&](auto number) {
    using Float = decltype(number);
    switch (a.mode) {
      case CodebookMode::kExact:
        return Launch(CodebookConvKernel<FilterTile, Exact, Float>, blocks, FilterTile::kThreads, stream, a);
      case CodebookMode::kBFloat16:
        return Launch(CodebookConvKernel<FilterTile, Rounded, Float>, blocks, FilterTile::kThreads, stream, a);
      default:
        return Launch(CodebookConvKernel<FilterTile, Integers, Float>, blocks, FilterTile::kThreads, stream, a);
    }
  });
}

}  // namespace tersetorch
