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
  static constexpr int kWords = 8;  // whose tables the block has at a time
  static constexpr int kFours = kWords * 16;
  static_assert(kFours == kThreads, "a thread makes one table of each sample");

  static dim3 Grid(std::int64_t rows, std::int64_t samples) {
    return {BlocksOnX(XnorTiles(rows), kWarps), BlocksOnY(samples, kSamples), 1};
  }
};

// The products of four numbers with each four signs; not a power of two long, so that neighbouring tables lie in
// different banks.
template <typename Sum>
struct alignas(16) SignTable {
  Sum entries[20];

  __device__ void Make(const Sum (&x)[4]) {
    const auto pair = [&](int j, int signs) {
      return ((signs & 1) != 0 ? -x[j] : x[j]) + ((signs & 2) != 0 ? -x[j + 1] : x[j + 1]);
    };
#pragma unroll
    for (int entry = 0; entry < 16; ++entry) entries[entry] = pair(0, entry & 3) + pair(2, entry >> 2);
  }
};

template <int kSamples>
struct Samples {
  static constexpr int kCount = kSamples;
};

// Calls store(tile, n, lane, sum) in all lanes of a warp, for weight [tiles, words, 32] and number(n, column), which is
// 0 past the last column.
template <typename Tile, typename Sum, typename Number, typename StoreSum>
__device__ void MultiplySigns(const std::uint64_t* weight, std::int64_t rows, std::int64_t words, std::int64_t samples,
                              const Number& number, const StoreSum& store) {
  struct Memory {
    SignTable<Sum> tables[Tile::kSamples][Tile::kFours];
  };
  Memory& memory = SharedMemory<Memory>();
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const std::int64_t tile = std::int64_t{blockIdx.x} * Tile::kWarps + warp;
  const bool exists = tile < CeilDiv(rows, kXnorRows);
  const std::int64_t step = std::int64_t{gridDim.y} * Tile::kSamples;
  for (std::int64_t first = std::int64_t{blockIdx.y} * Tile::kSamples; first < samples; first += step) {
    const auto here = static_cast<int>(min(std::int64_t{Tile::kSamples}, samples - first));
    const int made = here == 1 ? 1 : Tile::kSamples;
    Sum sums[Tile::kSamples] = {};
    for (std::int64_t word = 0; word < words; word += Tile::kWords) {
      const auto count = static_cast<int>(min(std::int64_t{Tile::kWords}, words - word));
      std::uint32_t bits[Tile::kWords][2] = {};
#pragma unroll
      for (int k = 0; k < Tile::kWords; ++k) {
        if (!exists || k >= count) continue;
        const std::uint64_t of_row = weight[(tile * words + word + k) * kXnorRows + lane];
        bits[k][0] = static_cast<std::uint32_t>(of_row), bits[k][1] = static_cast<std::uint32_t>(of_row >> 32);
      }
      __syncthreads();
      for (int s = 0; s < made; ++s) {
        Sum x[4] = {};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (s < here) x[j] = number(first + s, word * 64 + static_cast<int>(threadIdx.x) * 4 + j);
        }
        memory.tables[s][threadIdx.x].Make(x);
      }
      __syncthreads();
      const auto add = [&](auto samples_here) {
#pragma unroll
        for (int k = 0; k < Tile::kWords; ++k) {
          if (!exists || k >= count) continue;
#pragma unroll
          for (int g = 0; g < 16; ++g) {
            const std::uint32_t entry = bits[k][g / 8] >> g % 8 * 4 & 15;
#pragma unroll
            for (int s = 0; s < samples_here.kCount; ++s) sums[s] += memory.tables[s][k * 16 + g].entries[entry];
          }
        }
      };
      if (made == 1) {
        add(Samples<1>{});
      } else {
        add(Samples<Tile::kSamples>{});
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
