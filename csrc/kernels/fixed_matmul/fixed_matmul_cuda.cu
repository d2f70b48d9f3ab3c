#include "kernels/common/cuda.cuh"
#include "kernels/common/fixed_sums.h"
#include "kernels/fixed_matmul/fixed_matmul_cuda.h"

namespace tersetorch {
namespace {

template <typename Tile, typename Whole>
__global__ void __launch_bounds__(Tile::kThreads) MultiplyRows(FixedMatmulArgs a) {
  const std::int64_t r = Tile::RowOfWarp();
  if (r >= a.rows) return;
  const auto* w = static_cast<const Whole*>(a.weight) + r * a.columns;
  const int lane = static_cast<int>(threadIdx.x % kWarpSize);
  const std::int64_t of_row = a.bias == nullptr ? 0 : a.bias[r];
  const std::int64_t bias = of_row < -kMostBias ? -kMostBias : of_row > kMostBias ? kMostBias : of_row;
  for (std::int64_t first = std::int64_t{blockIdx.y} * Tile::kSamples; first < a.samples;
       first += std::int64_t{gridDim.y} * Tile::kSamples) {
    const auto* x = static_cast<const Whole*>(a.x) + first * a.columns;
    const std::int64_t left = a.samples - first;
    const int samples = static_cast<int>(left < Tile::kSamples ? left : Tile::kSamples);
    long long sums[Tile::kSamples] = {};
    for (std::int64_t c = lane; c < a.columns; c += kWarpSize) {
      const int number = w[c];
#pragma unroll
      for (int s = 0; s < Tile::kSamples; ++s) {
        if (s < samples) sums[s] += number * static_cast<int>(x[s * a.columns + c]);  // at most 2^30
      }
    }
#pragma unroll
    for (int s = 0; s < Tile::kSamples; ++s) {
      const long long sum = WarpSum(sums[s]);
      if (lane == s && s < samples) a.sums[(first + s) * a.rows + r] = sum + bias;
    }
  }
}

struct ConvertTile {
  static constexpr int kThreads = 256;
};

template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads) ConvertValues(FixedConvertArgs a, std::int64_t size) {
  const std::int64_t i = std::int64_t{blockIdx.x} * Tile::kThreads + threadIdx.x;
  if (i >= size) return;
  const FixedConversion conversion(a.sum_fraction_bits, a.integer_bits, a.fraction_bits, a.stochastic, a.relu);
  const std::uint32_t u = conversion.random ? RandomBits(a.seed, a.offset + static_cast<std::uint64_t>(i)) : 0;
  const std::int32_t k = conversion.Of(a.sums[i], u);
  switch (a.as) {
    case FixedAs::kFloats:
      static_cast<float*>(a.y)[i] =
          static_cast<float>(k) * __uint_as_float(static_cast<std::uint32_t>(127 - a.fraction_bits) << 23);
      break;
    case FixedAs::kInt8:
      static_cast<std::int8_t*>(a.y)[i] = static_cast<std::int8_t>(k);
      break;
    case FixedAs::kInt16:
      static_cast<std::int16_t*>(a.y)[i] = static_cast<std::int16_t>(k);
      break;
    case FixedAs::kInt32:
      static_cast<std::int32_t*>(a.y)[i] = k;
      break;
  }
}

}  // namespace

int FixedMatmulCuda(const FixedMatmulArgs& a, void* stream) noexcept {
  if (a.rows == 0 || a.samples == 0) return cudaSuccess;
  const dim3 grid = RowGrid(a.rows, a.samples);
  return a.wide ? Launch(MultiplyRows<RowTile, std::int16_t>, grid, RowTile::kThreads, stream, a)
                : Launch(MultiplyRows<RowTile, std::int8_t>, grid, RowTile::kThreads, stream, a);
}

int FixedConvertCuda(const FixedConvertArgs& a, std::int64_t size, void* stream) noexcept {
  if (size == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(CeilDiv(size, ConvertTile::kThreads)));
  return Launch(ConvertValues<ConvertTile>, grid, ConvertTile::kThreads, stream, a, size);
}

}  // namespace tersetorch
