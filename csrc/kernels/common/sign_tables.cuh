// How a block multiplies numbers by signs: for each four columns of a sample a table in shared memory has the 16 sums
// that four signs can make of them; each warp has a tile of 32 rows, each lane a row, which adds up what its bits name.
#pragma once

#include "kernels/common/cuda.cuh"
#include "kernels/xnor_matmul/xnor_matmul.h"

namespace tersetorch {
namespace {

struct SignTablesTile {
  static constexpr int kWarps = 4;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kSamples = 4;
  static constexpr int kWords = 4;  // whose tables the block has at a time
  static constexpr int kEntries = 16;
  static constexpr int kFours = kWords * 16;

  static dim3 Grid(std::int64_t rows, std::int64_t samples) {
    return {static_cast<unsigned>(CeilDiv(XnorTiles(rows), kWarps)), BlocksOnY(samples, kSamples), 1};
  }
};

// The product of four numbers with the signs that entry has.
template <typename Sum>
__device__ Sum SignedSum(const Sum (&x)[4], int entry) {
  const auto number = [&](int j) { return (entry >> j & 1) != 0 ? -x[j] : x[j]; };
  return (number(0) + number(1)) + (number(2) + number(3));
}

// Calls store(tile, n, lane, sum) in all lanes of a warp, for weight [tiles, words, 32] and number(n, column), which is
// 0 past the last column.
template <typename Tile, typename Sum, typename Number, typename StoreSum>
__device__ void MultiplySigns(const std::uint64_t* weight, std::int64_t rows, std::int64_t words, std::int64_t samples,
                              const Number& number, const StoreSum& store) {
  struct Memory {
    Sum tables[Tile::kFours][Tile::kSamples][Tile::kEntries];
  };
  Memory& memory = SharedMemory<Memory>();
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const std::int64_t tile = std::int64_t{blockIdx.x} * Tile::kWarps + warp;
  const bool exists = tile < CeilDiv(rows, kXnorRows);
  const std::int64_t step = std::int64_t{gridDim.y} * Tile::kSamples;
  for (std::int64_t first = std::int64_t{blockIdx.y} * Tile::kSamples; first < samples; first += step) {
    Sum sums[Tile::kSamples] = {};
    for (std::int64_t word = 0; word < words; word += Tile::kWords) {
      const auto count = static_cast<int>(min(std::int64_t{Tile::kWords}, words - word));
      __syncthreads();
      for (int i = static_cast<int>(threadIdx.x); i < count * 16 * Tile::kSamples * Tile::kEntries;
           i += Tile::kThreads) {
        const int entry = i % Tile::kEntries, s = i / Tile::kEntries % Tile::kSamples;
        const int four = i / (Tile::kEntries * Tile::kSamples);
        Sum x[4] = {};
        for (int j = 0; first + s < samples && j < 4; ++j) x[j] = number(first + s, word * 64 + four * 4 + j);
        memory.tables[four][s][entry] = SignedSum(x, entry);
      }
      __syncthreads();
      for (int k = 0; exists && k < count; ++k) {
        std::uint64_t bits = weight[(tile * words + word + k) * kXnorRows + lane];
#pragma unroll 4
        for (int g = 0; g < 16; ++g, bits >>= 4) {
#pragma unroll
          for (int s = 0; s < Tile::kSamples; ++s) sums[s] += memory.tables[k * 16 + g][s][bits & 15];
        }
      }
    }
#pragma unroll
    for (int s = 0; s < Tile::kSamples; ++s) {
      if (exists && first + s < samples) store(tile, first + s, lane, sums[s]);
    }
  }
}

}  // namespace
}  // namespace tersetorch
