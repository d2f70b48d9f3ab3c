#include <cmath>

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

// A block finds the scale of one image or one filter.
struct ScaleTile {
  static constexpr int kWarps = 8;
  static constexpr int kThreads = kWarps * kWarpSize;

  struct Memory {
    std::uint32_t largest[kWarps];
  };
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

// ---- kernels

// ScaleOf of panels.h on the device.
__device__ ConvScale ScaleOf(std::uint32_t largest_bits) {
  if (largest_bits >= 0x7f800000u) return {DamagedWeight(), 0.0f};
  if (largest_bits < (127u - 100u) << 23) return {0.0f, 0.0f};
  const float largest = __uint_as_float(largest_bits);
  return {largest / 127.0f, 127.0f / largest};
}

__device__ int Rounded(float x, float inverse) { return inverse == 0 ? 0 : static_cast<int>(rintf(x * inverse)); }

// Images first. What is damaged in a filter is left to ConvKernel.
template <typename Tile, typename Values, typename Float>
__global__ void __launch_bounds__(Tile::kThreads) ConvScaleKernel(ConvCudaArgs a) {
  const int thread = static_cast<int>(threadIdx.x);
  const std::int64_t item = blockIdx.x, filter = item - a.images;
  // Compared as integers: infinities are above all numbers, and NaN above them.
  std::uint32_t largest = 0;
  if (filter < 0) {
    const Float* x = static_cast<const Float*>(a.x) + item * a.x_steps.image;
    for (std::int64_t i = thread; i < a.x_steps.image; i += Tile::kThreads) {
      largest = max(largest, __float_as_uint(ToFloat(x[i])) & 0x7fffffffu);
    }
  } else {
    const Row row = RowAt(a.weight, filter);
    for (std::int64_t k = row.begin + thread; k < row.end; k += Tile::kThreads) {
      if (!Values::Damaged(a.weight, k)) {
        largest = max(largest, __float_as_uint(Values::At(a.weight, k)) & 0x7fffffffu);
      }
    }
  }
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    largest = max(largest, __shfl_xor_sync(kWholeWarp, largest, distance));
  }
  auto& memory = SharedMemory<typename Tile::Memory>();
  if (thread % kWarpSize == 0) memory.largest[thread / kWarpSize] = largest;
  __syncthreads();
  for (int warp = 0; warp < Tile::kWarps; ++warp) largest = max(largest, memory.largest[warp]);
  if (thread == 0) a.scales[item] = ScaleOf(largest);
}

// What the sums of a mode are: floats, of numbers rounded or not, or integers.
struct FloatSums {
  using Sum = float;
  static constexpr bool kIntegers = false;
  __device__ static float Product(const ConvCudaArgs& a, float weight, float x, const ConvScale&, const ConvScale&) {
    if (a.mode == ConvMode::kExact) return weight * x;
    return ToFloat(FromFloat<BFloat16>(weight)) * ToFloat(FromFloat<BFloat16>(x));
  }
};
struct IntegerSums {
  using Sum = int;
  static constexpr bool kIntegers = true;
  __device__ static int Product(const ConvCudaArgs&, float weight, float x, const ConvScale& of_weight,
                                const ConvScale& of_x) {
    return Rounded(weight, of_weight.inverse) * Rounded(x, of_x.inverse);
  }
};

// Neighbouring blocks compute the same outputs of other filters: what one reads, the next finds in the cache.
template <typename Tile, typename Sums, typename Values, typename Float>
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
  constexpr bool kIntegers = Sums::kIntegers;
  ConvScale of_weight{}, of_x{};
  if (kIntegers) of_weight = a.scales[a.images + filter], of_x = a.scales[inside ? image : 0];
  bool damaged = row.damaged;
  typename Sums::Sum total = 0;
  for (std::int64_t first = row.begin; first < row.end; first += Tile::kThreads) {
    const int count = static_cast<int>(min(std::int64_t{Tile::kThreads}, row.end - first));
    if (thread < count) taps[thread] = TapAt<Values>(a, filter, static_cast<std::int32_t>(first + thread));
    __syncthreads();
    if (inside) {
      for (int t = 0; t < count; ++t) {
        const Tap& tap = taps[t];
        const std::int64_t h = top + tap.down, w = left + tap.right;
        const bool read = 0 <= h && h < a.height && 0 <= w && w < a.width;
        // Damage is NaN; integers have none.
        damaged |= kIntegers && tap.value != tap.value;
        total += Sums::Product(a, tap.value, read ? ToFloat(x[origin + tap.offset]) : 0.0f, of_weight, of_x);
      }
    }
    __syncthreads();
  }
  if (!inside) return;
  const float bias = a.bias == nullptr ? 0.0f : a.bias[filter];
  float sum = static_cast<float>(total);
  sum = kIntegers ? fmaf(sum * of_weight.scale, of_x.scale, bias) : sum + bias;
  if (damaged) sum = DamagedWeight();
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
      using Values = decltype(values);
      using Float = decltype(number);
      if (a.mode != ConvMode::kInt8) {
        return Launch(ConvKernel<ConvTile, FloatSums, Values, Float>, blocks, ConvTile::kThreads, stream, a);
      }
      const dim3 items(static_cast<unsigned>(a.images + a.weight.rows), 1, 1);
      const int error = Launch(ConvScaleKernel<ScaleTile, Values, Float>, items, ScaleTile::kThreads, stream, a);
      if (error != cudaSuccess) return error;
      return Launch(ConvKernel<ConvTile, IntegerSums, Values, Float>, blocks, ConvTile::kThreads, stream, a);
    });
  });
}

}  // namespace tersetorch
