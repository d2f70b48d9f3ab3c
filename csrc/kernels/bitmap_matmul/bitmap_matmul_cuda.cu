#include <cmath>

#include "kernels/bitmap_matmul/bitmap_matmul_cuda.h"
#include "kernels/bitmap_matmul/bitmap_tiles_cuda.h"
#include "kernels/bitmap_matmul/bitmap_weight.cuh"
#include "kernels/common/cuda.cuh"

namespace tersetorch {
namespace {

// ---- the weight

__device__ bool IsSet(std::uint64_t word, int bit) { return (word >> bit & 1) != 0; }
__device__ int SetBefore(std::uint64_t word, int bit) { return __popcll(word & ((std::uint64_t{1} << bit) - 1)); }

// ---- tiles

// A warp multiplies one row with some samples. It lists the columns of 32 words at a time: their values then lie one
// after the other, and every lane has as many.
template <int kSamplesOfTile>
struct ListTile {
  static constexpr int kWarps = 8;
  static constexpr int kSamples = kSamplesOfTile;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kChunk = kWarpSize * kWordBits;
  static_assert(kSamples <= kWarpSize, "lane s stores sample s");

  struct Memory {
    std::uint16_t columns[kWarps][kChunk];
  };
};

// A warp computes the outputs of some words for one sample, a lane two of each word.
struct WordsTile {
  static constexpr int kWarps = 4;
  static constexpr int kWords = 4;
  static constexpr int kHalves = kWordBits / kWarpSize;
  static constexpr int kThreads = kWarps * kWarpSize;

  __device__ static std::int64_t FirstWordOfWarp() {
    return (std::int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarpSize) * kWords;
  }
};

// ---- kernels

// What is added up: floats, or integers where x is quantized.
__device__ float Widened(float x) { return x; }
__device__ float Widened(BFloat16 x) { return ToFloat(x); }
__device__ float Widened(Float16 x) { return ToFloat(x); }
__device__ int Widened(std::int8_t x) { return x; }

// The columns of a chunk's set bits, one word of each lane, as places in the chunk; all lanes call it. How many.
template <typename Tile>
__device__ int ListColumns(std::uint64_t word, int lane, std::uint16_t (&list)[Tile::kChunk]) {
  const int count = __popcll(word), until = SumThroughLane(count);
  for (int place = until - count; word != 0; ++place, word &= word - 1) {
    list[place] = static_cast<std::uint16_t>(lane * kWordBits + __ffsll(static_cast<long long>(word)) - 1);
  }
  __syncwarp();
  return __shfl_sync(kWholeWarp, until, kWarpSize - 1);
}

// Two blocks a multiprocessor: left to itself, ptxas spills a register to fit more of them.
template <typename Tile, typename Values, typename X, typename Y>
__global__ void __launch_bounds__(Tile::kThreads, 2) BitmapMatmulKernel(BitmapMatmulCudaArgs a) {
  using Sum = decltype(Widened(X{}));
  const BitmapWeight& w = a.weight;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, warp = static_cast<int>(threadIdx.x) / kWarpSize;
  auto& list = SharedMemory<typename Tile::Memory>().columns[warp];
  const std::int64_t r = std::int64_t{blockIdx.x} * Tile::kWarps + warp;
  if (r >= w.rows) return;
  const Row row = RowAt(w, r);
  const std::int64_t words = CeilDiv(w.columns, kWordBits);
  const std::uint64_t* bits = w.bitmap + r * words;
  const float scale = w.stored_as == BitmapValues::kInt8 ? w.scales[r] : 1.0f;
  const float bias = a.bias == nullptr ? 0.0f : a.bias[r];
  [[maybe_unused]] const X* x = static_cast<const X*>(a.x);
  [[maybe_unused]] const auto* panels = static_cast<const PanelColumn<X>*>(a.scratch);
  Y* y = static_cast<Y*>(a.y);
  const std::int64_t step = std::int64_t{gridDim.y} * Tile::kSamples;
  for (std::int64_t first = std::int64_t{blockIdx.y} * Tile::kSamples; first < a.samples; first += step) {
    const int count = static_cast<int>(min(std::int64_t{Tile::kSamples}, a.samples - first));
    Sum sums[Tile::kSamples] = {};
    bool damaged = row.damaged;
    std::int64_t next = row.begin;  // the value of the chunk's first bit
    for (std::int64_t i = 0; i < words; i += kWarpSize) {
      const std::int64_t mine = i + lane;
      const std::uint64_t word = mine < words ? bits[mine] : 0;
      const std::int64_t left = w.columns - mine * kWordBits;
      damaged |= left < kWordBits && left > 0 && word >> left != 0;
      const int listed = ListColumns<Tile>(word, lane, list);
      damaged = __any_sync(kWholeWarp, damaged || next + listed > row.end) != 0;
      if (damaged) break;
      const std::int64_t of_chunk = first / Tile::kSamples * w.columns + i * kWordBits;
#pragma unroll 4
      for (int j = lane; j < listed; j += kWarpSize) {
        const std::int64_t k = next + j;
        const bool outside = Values::Damaged(w, k);
        damaged |= outside;
        const auto value = outside ? 0 : Values::At(w, k);
        if constexpr (Tile::kSamples == 1) {
          sums[0] += value * Widened(x[of_chunk + list[j]]);
        } else {
          const PanelColumn<X> numbers = panels[of_chunk + list[j]];
#pragma unroll
          for (int s = 0; s < Tile::kSamples; ++s) sums[s] += value * Widened(numbers.of_sample[s]);
        }
      }
      __syncwarp();
      next += listed;
    }
    damaged = __any_sync(kWholeWarp, damaged || next != row.end) != 0;
#pragma unroll
    for (int s = 0; s < Tile::kSamples; ++s) {
      if (s >= count) break;
      const Sum sum = WarpSum(sums[s]);
      if (s != lane) continue;
      const float x_scale = a.x_scales == nullptr ? 1.0f : a.x_scales[first + s];
      const float result = damaged ? DamagedWeight() : fmaf(static_cast<float>(sum), scale * x_scale, bias);
      y[(first + s) * w.rows + r] = FromFloat<Y>(a.relu && result < 0 ? 0.0f : result);
    }
  }
}

// BitmapScaleOf on the device.
__device__ BitmapScale ScaleOf(float largest) {
  if (!(largest <= 3.4028234e38f)) return {DamagedWeight(), 0.0f};
  const float inverse = largest == 0 ? 0.0f : 127.0f / largest;
  if (!(inverse <= 3.4028234e38f)) return {0.0f, 0.0f};
  return {largest / 127.0f, inverse};
}

template <typename Tile, typename Float>
__global__ void __launch_bounds__(Tile::kThreads) BitmapQuantizeKernel(BitmapQuantizeCudaArgs a) {
  const std::int64_t n = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x);
  const Float* x = static_cast<const Float*>(a.x) + n * a.columns;
  const std::uint32_t largest = LargestBits<Tile>(x, a.columns);
  const BitmapScale scale = ScaleOf(__uint_as_float(largest));
  if (thread == 0) a.x_scales[n] = scale.scale;
  for (std::int64_t c = thread; c < a.columns; c += Tile::kThreads) {
    const float q = scale.inverse == 0 ? 0.0f : ToFloat(x[c]) * scale.inverse;
    a.quantized[n * a.columns + c] = static_cast<std::int8_t>(rintf(q));
  }
}

template <typename Tile, typename Values, typename Float>
__global__ void __launch_bounds__(Tile::kThreads) BitmapColumnsKernel(BitmapColumnsCudaArgs a) {
  const BitmapWeight& w = a.weight;
  const std::int64_t words = CeilDiv(w.columns, kWordBits), first = Tile::FirstWordOfWarp();
  if (first >= words) return;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int bits_of_last = static_cast<int>(w.columns % kWordBits);
  const Float* x = static_cast<const Float*>(a.x);
  Float* y = static_cast<Float*>(a.y);
  for (std::int64_t n = blockIdx.y; n < a.samples; n += gridDim.y) {
    float sums[Tile::kWords][Tile::kHalves] = {};
    bool damaged = false;
    // All lanes take the same branches but for their bits.
    for (std::int64_t c = 0; c < w.rows && !damaged; ++c) {
      const float number = ToFloat(x[n * w.rows + c]);
      if (number == 0) continue;
      const Row row = RowAt(w, c);
      const std::uint64_t* bits = w.bitmap + c * words;
      std::int32_t before = 0, all = 0;
      for (std::int64_t i = lane; i < words; i += kWarpSize) {
        const int set = __popcll(bits[i]);
        all += set;
        if (i < first) before += set;
      }
      before = WarpSum(before);
      all = WarpSum(all);
      const bool outside = bits_of_last != 0 && bits[words - 1] >> bits_of_last != 0;
      damaged = row.damaged || outside || all != row.end - row.begin;
      if (damaged) continue;
      std::int64_t next = row.begin + before;
#pragma unroll
      for (int v = 0; v < Tile::kWords; ++v) {
        if (first + v >= words) break;
        const std::uint64_t word = bits[first + v];
#pragma unroll
        for (int half = 0; half < Tile::kHalves; ++half) {
          const int bit = half * kWarpSize + lane;
          if (!IsSet(word, bit)) continue;
          const std::int64_t k = next + SetBefore(word, bit);
          sums[v][half] += Values::Damaged(w, k) ? DamagedWeight() : Values::At(w, k) * number;
        }
        next += __popcll(word);
      }
    }
#pragma unroll
    for (int v = 0; v < Tile::kWords; ++v) {
#pragma unroll
      for (int half = 0; half < Tile::kHalves; ++half) {
        const std::int64_t output = (first + v) * kWordBits + half * kWarpSize + lane;
        if (output >= w.columns) continue;
        const float sum = damaged ? DamagedWeight() : sums[v][half] + (a.bias == nullptr ? 0.0f : a.bias[output]);
        y[n * w.columns + output] = FromFloat<Float>(a.relu && sum < 0 ? 0.0f : sum);
      }
    }
  }
}

// ---- launchers

// Calls run with the type that reads the values, which are not int8.
template <typename Run>
int WithFloatValues(BitmapValues stored_as, const Run& run) {
  switch (stored_as) {
    case BitmapValues::kFloat32:
      return run(Float32Values{});
    case BitmapValues::kBFloat16:
      return run(BFloat16Values{});
    default:
      return run(CodeValues{});
  }
}

template <typename Tile, typename Values, typename X, typename Y>
int LaunchTile(const BitmapMatmulCudaArgs& a, void* stream) {
  const dim3 grid(static_cast<unsigned>(CeilDiv(a.weight.rows, Tile::kWarps)), BlocksOnY(a.samples, Tile::kSamples));
  return Launch(BitmapMatmulKernel<Tile, Values, X, Y>, grid, Tile::kThreads, stream, a);
}

template <typename Values, typename X, typename Y>
int LaunchRows(const BitmapMatmulCudaArgs& a, void* stream) {
  if (a.samples == 1) return LaunchTile<ListTile<1>, Values, X, Y>(a, stream);
  const int packed = LaunchPackPanels<X>(a.x, a.scratch, a.samples, a.weight.columns, stream);
  return packed != cudaSuccess ? packed : LaunchTile<ListTile<kPanelSamples>, Values, X, Y>(a, stream);
}

}  // namespace

std::int64_t BitmapScratchBytes(const BitmapMatmulCudaArgs& a) noexcept {
  if (BitmapTakesTiles(a)) return BitmapTileScratchBytes(a);
  const std::int64_t item_bytes = a.x_scales != nullptr ? 1 : a.stored_as == FloatDtype::kFloat32 ? 4 : 2;
  return a.samples == 1 ? 0 : CeilDiv(a.samples, kPanelSamples) * kPanelSamples * a.weight.columns * item_bytes;
}

int BitmapMatmulCuda(const BitmapMatmulCudaArgs& a, void* stream) noexcept {
  if (a.weight.rows == 0 || a.samples == 0) return cudaSuccess;
  if (BitmapTakesTiles(a)) return BitmapTilesCuda(a, stream);
  return WithFloat(a.stored_as, [&](auto number) {
    using Float = decltype(number);
    if (a.x_scales != nullptr) return LaunchRows<Int8Values, std::int8_t, Float>(a, stream);
    if (a.weight.stored_as == BitmapValues::kInt8) return LaunchRows<Int8Values, Float, Float>(a, stream);
    return WithFloatValues(a.weight.stored_as,
                           [&](auto values) { return LaunchRows<decltype(values), Float, Float>(a, stream); });
  });
}

int BitmapQuantizeCuda(const BitmapQuantizeCudaArgs& a, void* stream) noexcept {
  if (a.samples == 0) return cudaSuccess;
  return WithFloat(a.stored_as, [&](auto number) {
    return Launch(BitmapQuantizeKernel<SampleTile, decltype(number)>, static_cast<unsigned>(a.samples),
                  SampleTile::kThreads, stream, a);
  });
}

int BitmapColumnsCuda(const BitmapColumnsCudaArgs& a, void* stream) noexcept {
  const std::int64_t words = CeilDiv(a.weight.columns, kWordBits);
  if (words == 0 || a.samples == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(CeilDiv(words, WordsTile::kWarps * WordsTile::kWords)),
                  BlocksOnY(a.samples, 1));
  return WithFloatValues(a.weight.stored_as, [&](auto values) {
    return WithFloat(a.stored_as, [&](auto number) {
      return Launch(BitmapColumnsKernel<WordsTile, decltype(values), decltype(number)>, grid, WordsTile::kThreads,
                    stream, a);
    });
  });
}

}  // namespace tersetorch
