#include "kernels/blocked_matmul/blocked_matmul_cuda.h"
#include "kernels/common/cuda.cuh"

namespace tersetorch {
namespace {

// A block multiplies a row block with some samples. Its threads take the segments in their order, so that those of a
// warp have about as many non-zeros, and find each segment's row in shared memory.
struct RowBlockTile {
  static constexpr int kThreads = kBlockedRows;
  static constexpr int kWarps = kThreads / kWarpSize;
  static constexpr int kSamples = 8;
  static constexpr int kBlocksAtOnce = 4;  // at least; leaves each thread the 64 registers that it needs

  struct Memory {
    float sums[kSamples][kBlockedRows];
    std::uint32_t seen_in[kBlockedRows];  // the last column block that named the row, counted from 1
    std::int32_t counts[kWarps];
  };
};

template <typename Tile, typename Values, typename Float>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocksAtOnce) BlockedMatmulKernel(BlockedMatmulCudaArgs a) {
  auto& memory = SharedMemory<typename Tile::Memory>();
  const BlockedWeight& w = a.weight;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarpSize, lane = thread % kWarpSize;
  const std::int64_t column_blocks = CeilDiv(w.columns, w.column_block);
  const std::int64_t row_begin = std::int64_t{blockIdx.x} * kBlockedRows;
  const int rows = static_cast<int>(min(kBlockedRows, w.rows - row_begin));
  const Float* x = static_cast<const Float*>(a.x);
  Float* y = static_cast<Float*>(a.y);
  const std::int64_t step = std::int64_t{gridDim.y} * Tile::kSamples;
  for (std::int64_t first = std::int64_t{blockIdx.y} * Tile::kSamples; first < a.samples; first += step) {
    const int count = static_cast<int>(min(std::int64_t{Tile::kSamples}, a.samples - first));
    const float bias = a.bias == nullptr || thread >= rows ? 0.0f : a.bias[row_begin + thread];
#pragma unroll
    for (int s = 0; s < Tile::kSamples; ++s) memory.sums[s][thread] = bias;
    memory.seen_in[thread] = 0;
    __syncthreads();
    bool damaged = false;
    for (std::int64_t j = 0; j < column_blocks; ++j) {
      const std::int64_t block = blockIdx.x * column_blocks + j;
      const std::int32_t begin = w.block_offsets[block], end = w.block_offsets[block + 1];
      std::uint32_t segment = 0;
      if (thread < rows)
        segment = static_cast<std::uint32_t>(w.segments[row_begin * column_blocks + j * rows + thread]);
      const int row = static_cast<int>(segment >> 16), length = static_cast<int>(segment & 0xffff);
      // How many non-zeros the segments up to this one have.
      std::int32_t after = length, total = 0;
#pragma unroll
      for (int distance = 1; distance < kWarpSize; distance *= 2) {
        const std::int32_t before = __shfl_up_sync(kWholeWarp, after, distance);
        if (lane >= distance) after += before;
      }
      if (lane == kWarpSize - 1) memory.counts[warp] = after;
      __syncthreads();
      for (int other = 0; other < Tile::kWarps; ++other) {
        if (other < warp) after += memory.counts[other];
        total += memory.counts[other];
      }
      bool bad = begin < 0 || end < begin || end > w.nnz || end - begin != total || row >= rows;
      if (thread < rows && !bad) {
        const auto turn = static_cast<std::uint32_t>(j + 1);
        bad = atomicExch(&memory.seen_in[row], turn) == turn;
      }
      damaged = __syncthreads_or(bad) != 0;
      if (damaged) break;
      if (thread < rows) {
        const std::int64_t first_column = j * w.column_block;
        const std::int64_t columns = min(w.column_block, w.columns - first_column);
        float sums[Tile::kSamples];
#pragma unroll
        for (int s = 0; s < Tile::kSamples; ++s) sums[s] = memory.sums[s][row];
        for (std::int32_t k = begin + after - length; k < begin + after; ++k) {
          const int column = w.indices[k];
          if (column >= columns || Values::Damaged(w, k)) {
#pragma unroll
            for (int s = 0; s < Tile::kSamples; ++s) sums[s] = DamagedWeight();
            break;
          }
          const float value = Values::At(w, k);
          const Float* x_of_column = x + first * w.columns + first_column + column;
#pragma unroll
          for (int s = 0; s < Tile::kSamples; ++s) {
            if (s < count) sums[s] += value * ToFloat(x_of_column[s * w.columns]);
          }
        }
#pragma unroll
        for (int s = 0; s < Tile::kSamples; ++s) memory.sums[s][row] = sums[s];
      }
      __syncthreads();
    }
    if (thread >= rows) continue;
#pragma unroll
    for (int s = 0; s < Tile::kSamples; ++s) {
      if (s >= count) break;
      const float sum = damaged ? DamagedWeight() : memory.sums[s][thread];
      y[(first + s) * w.rows + row_begin + thread] = FromFloat<Float>(a.relu && sum < 0 ? 0.0f : sum);
    }
  }
}

// Calls run with the type that reads the values.
template <typename Run>
int WithValues(BlockedValues stored_as, const Run& run) {
  switch (stored_as) {
    case BlockedValues::kFloat32:
      return run(Float32Values{});
    case BlockedValues::kBFloat16:
      return run(BFloat16Values{});
    case BlockedValues::kCodes:
      return run(CodeValues{});
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

int BlockedMatmulCuda(const BlockedMatmulCudaArgs& a, void* stream) noexcept {
  if (a.weight.rows == 0 || a.samples == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(CeilDiv(a.weight.rows, kBlockedRows)),
                  BlocksOnY(a.samples, RowBlockTile::kSamples));
  return WithValues(a.weight.stored_as, [&](auto values) {
    return WithFloat(a.stored_as, [&](auto number) {
      return Launch(BlockedMatmulKernel<RowBlockTile, decltype(values), decltype(number)>, grid, RowBlockTile::kThreads,
                    stream, a);
    });
  });
}

}  // namespace tersetorch
