#include "kernels/common/cuda.cuh"
#include "kernels/common/fixed_sums.h"
#include "kernels/fixed_matmul/fixed_matmul_cuda.h"

namespace tersetorch {
namespace {

struct PanelTile {
  static constexpr int kRows = static_cast<int>(kFixedPanel), kSamples = 8, kWarps = 8, kThreads = kWarps * kWarpSize;
  static constexpr int kParts = kThreads / kRows;  // of the words
  static_assert(kWarpSize == 2 * kRows);

  struct Memory {
    long long of_warp[kWarps][kSamples][kRows];
  };
};

template <typename Tile, typename X, typename Whole>
__global__ void __launch_bounds__(Tile::kThreads) MultiplyPanels(FixedCudaArgs a) {
  constexpr int kOfWord = static_cast<int>(kFixedWord / sizeof(Whole));
  struct alignas(kFixedWord) Word {
    Whole number[kOfWord];
  };
  auto& memory = SharedMemory<typename Tile::Memory>();
  const int thread = static_cast<int>(threadIdx.x), row = thread % Tile::kRows, warp = thread / kWarpSize;
  const std::int64_t segment = a.columns / a.segments, segment_words = CeilDiv(segment, kOfWord);
  const std::int64_t words = a.segments * segment_words;
  const auto* w = static_cast<const Word*>(a.packed) + blockIdx.x * (words + 1) * Tile::kRows + row;
  const std::int64_t first_row = std::int64_t{blockIdx.x} * Tile::kRows;
  for (std::int64_t first = std::int64_t{blockIdx.y} * Tile::kSamples; first < a.samples;
       first += std::int64_t{gridDim.y} * Tile::kSamples) {
    const std::int64_t left = a.samples - first;
    const int samples = static_cast<int>(left < Tile::kSamples ? left : Tile::kSamples);
    long long sums[Tile::kSamples] = {};
    for (std::int64_t i = thread / Tile::kRows; i < words; i += Tile::kParts) {
      const Word numbers = w[i * Tile::kRows];
      const std::int64_t within = i % segment_words * kOfWord;
      const auto* x = static_cast<const X*>(a.x) + first * a.columns + i / segment_words * segment + within;
#pragma unroll
      for (int k = 0; k < kOfWord; ++k) {
        if (within + k >= segment) break;
        const int number = numbers.number[k];
#pragma unroll
        for (int s = 0; s < Tile::kSamples; ++s) {
          if (s < samples) sums[s] += number * static_cast<int>(x[s * a.columns + k]);  // at most 2^30
        }
      }
    }
#pragma unroll
    for (int s = 0; s < Tile::kSamples; ++s) {
      const long long both = sums[s] + __shfl_xor_sync(kWholeWarp, sums[s], Tile::kRows);
      if (thread % kWarpSize < Tile::kRows) memory.of_warp[warp][s][row] = both;
    }
    __syncthreads();
    const int s = thread / Tile::kRows;
    if (s < samples && first_row + row < a.rows) {
      long long sum = 0;
      for (int one = 0; one < Tile::kWarps; ++one) sum += memory.of_warp[one][s][row];
      a.sums[(first + s) * a.rows + first_row + row] = sum;
    }
    __syncthreads();
  }
}

struct ConvertTile {
  static constexpr int kThreads = 256;
};

template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads) ConvertValues(FixedConvertArgs a, std::int64_t size) {
  const std::int64_t i = std::int64_t{blockIdx.x} * Tile::kThreads + threadIdx.x;
  if (i >= size) return;
  const std::int64_t n = i / a.rows, r = i % a.rows, value = n * a.y_stride + r;
  const std::int64_t of_row = a.added == nullptr ? 0 : a.added[r];
  const std::int64_t added = of_row < -kFixedMostBias ? -kFixedMostBias : min(of_row, kFixedMostBias);
  const FixedConversion conversion(a.sum_fraction_bits, a.integer_bits, a.fraction_bits, a.stochastic, a.relu);
  const std::uint32_t u = conversion.random ? RandomBits(a.seed, a.offset + static_cast<std::uint64_t>(value)) : 0;
  PutFixed(a.y, value, conversion.Of(a.sums[n * a.sums_stride + r] + added, u), a.fraction_bits, a.as);
}

}  // namespace

int FixedMatmulCuda(const FixedCudaArgs& a, void* stream) noexcept {
  if (a.rows == 0 || a.samples == 0) return cudaSuccess;
  using Tile = PanelTile;
  constexpr unsigned kMost = 1024;  // with one panel they fill a GPU
  const dim3 grid(static_cast<unsigned>(CeilDiv(a.rows, Tile::kRows)),
                  std::min(BlocksOnY(a.samples, Tile::kSamples), kMost));
  const auto launch = [&](auto* kernel) { return Launch(kernel, grid, Tile::kThreads, stream, a); };
  if (!a.wide) return launch(MultiplyPanels<Tile, std::int8_t, std::int8_t>);
  return a.x_wide ? launch(MultiplyPanels<Tile, std::int16_t, std::int16_t>)
                  : launch(MultiplyPanels<Tile, std::int8_t, std::int16_t>);
}

int FixedConvertCuda(const FixedConvertArgs& a, std::int64_t samples, void* stream) noexcept {
  const std::int64_t size = samples * a.rows;
  if (size == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(CeilDiv(size, ConvertTile::kThreads)));
  return Launch(ConvertValues<ConvertTile>, grid, ConvertTile::kThreads, stream, a, size);
}

}  // namespace tersetorch
