#include <cmath>
#include <type_traits>

#include "kernels/blocked_matmul/blocked_matmul_cuda.h"
#include "kernels/common/cuda.cuh"

namespace tersetorch {
namespace {

// ---- words, and what a value adds to a sum

struct Pair {
  std::uint32_t bits;  // two bfloat16, the first column in the lower half
};
struct Quad {
  std::uint32_t bits;  // four int8, the first column in the lowest byte
};

template <typename Word>
struct WordValues {
  __device__ static bool Damaged(const BlockedWeight&, std::int64_t) { return false; }
  __device__ static Word At(const BlockedWeight& w, std::int64_t k) { return static_cast<const Word*>(w.values)[k]; }
};

template <typename Float>
__device__ float Added(float sum, float value, Float x) {
  return sum + value * ToFloat(x);
}
__device__ float Added(float sum, Pair value, Pair x) {
  sum += __uint_as_float(value.bits << 16) * __uint_as_float(x.bits << 16);
  return sum + __uint_as_float(value.bits & 0xffff0000u) * __uint_as_float(x.bits & 0xffff0000u);
}
// Modulo 2^32: damaged weights may add up to more than an int32 holds.
__device__ std::uint32_t Added(std::uint32_t sum, Quad value, Quad x) {
#pragma unroll
  for (int shift = 0; shift < 32; shift += 8) {
    const int product = static_cast<std::int8_t>(value.bits >> shift) * static_cast<std::int8_t>(x.bits >> shift);
    sum += static_cast<std::uint32_t>(product);
  }
  return sum;
}

// ---- tiles

constexpr std::uint16_t kNoColumn = 0xffff;  // for a code without an entry
static_assert(kNoColumn >= kBlockedMaxColumnBlock);

// A block multiplies a row block with some samples. Its threads take the segments in their order, so that those of a
// warp have about as many non-zeros, and find each segment's row in shared memory.
struct RowBlockTile {
  static constexpr int kThreads = kBlockedRows;
  static constexpr int kWarps = kThreads / kWarpSize;
  static constexpr int kSamples = 8;
  static constexpr int kBlocksAtOnce = 4;     // at least; leaves each thread the 64 registers that it needs
  static constexpr int kRun = kWarpSize / 2;  // non-zeros of a row that are staged at once
  static_assert(kSamples == kPanelSamples, "a panel's");

  // A half-warp stores a row's run, and another one 16 rows behind; then lanes walk rows. Neither has a bank conflict.
  template <typename Sum, typename Value>
  struct Memory {
    Sum sums[kSamples][kBlockedRows];
    Value values[kWarps][kWarpSize][kRun + 1];
    std::uint16_t indices[kWarps][kWarpSize][kRun + 2];
    std::int32_t first[kWarps][kWarpSize], lengths[kWarps][kWarpSize];  // of the lanes' segments
    std::uint32_t seen_in[kBlockedRows];  // the last column block that named the row, counted from 1
    bool damaged[kBlockedRows];
    std::int32_t counts[kWarps];
  };
};

// ---- kernels

template <typename Tile, typename Values, typename X, typename Y>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocksAtOnce) BlockedMatmulKernel(BlockedMatmulCudaArgs a) {
  constexpr bool kQuads = std::is_same_v<X, Quad>;
  using Sum = std::conditional_t<kQuads, std::uint32_t, float>;
  const BlockedWeight& w = a.weight;
  using Value = decltype(Values::At(w, 0));
  auto& memory = SharedMemory<typename Tile::template Memory<Sum, Value>>();
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarpSize, lane = thread % kWarpSize;
  const std::int64_t column_blocks = CeilDiv(w.columns, w.column_block);
  const std::int64_t row_begin = std::int64_t{blockIdx.x} * kBlockedRows;
  const int rows = static_cast<int>(min(kBlockedRows, w.rows - row_begin));
  const auto* panels = static_cast<const PanelColumn<X>*>(a.panels);
  Y* y = static_cast<Y*>(a.y);
  const std::int64_t step = std::int64_t{gridDim.y} * Tile::kSamples;
  for (std::int64_t first = std::int64_t{blockIdx.y} * Tile::kSamples; first < a.samples; first += step) {
    const int count = static_cast<int>(min(std::int64_t{Tile::kSamples}, a.samples - first));
    const float bias = a.bias == nullptr || thread >= rows ? 0.0f : a.bias[row_begin + thread];
#pragma unroll
    for (int s = 0; s < Tile::kSamples; ++s) memory.sums[s][thread] = kQuads ? Sum{} : static_cast<Sum>(bias);
    memory.seen_in[thread] = 0;
    memory.damaged[thread] = false;
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
      const std::int64_t first_column = j * w.column_block;
      const std::int64_t columns = min(w.column_block, w.columns - first_column);
      const auto* x = panels + first / Tile::kSamples * w.columns + first_column;
      Sum sums[Tile::kSamples];
#pragma unroll
      for (int s = 0; s < Tile::kSamples; ++s) sums[s] = thread < rows ? memory.sums[s][row] : Sum{};
      int left = length;
      memory.first[warp][lane] = begin + after - length;
      memory.lengths[warp][lane] = length;
      __syncwarp();
      auto& values = memory.values[warp];
      auto& indices = memory.indices[warp];
#pragma unroll 1
      for (int base = 0; __any_sync(kWholeWarp, base < left) != 0; base += Tile::kRun) {
        const int in_run = base + lane % Tile::kRun;
#pragma unroll 4
        for (int r = 0; r < kWarpSize / 2; ++r) {
          const int of_row = r + lane / Tile::kRun * (kWarpSize / 2);
          if (in_run >= memory.lengths[warp][of_row]) continue;
          const std::int32_t k = memory.first[warp][of_row] + in_run;
          const bool bad = Values::Damaged(w, k);
          indices[of_row][lane % Tile::kRun] = bad ? kNoColumn : w.indices[k];
          values[of_row][lane % Tile::kRun] = bad ? Value{} : Values::At(w, k);
        }
        __syncwarp();
        const int count_of_run = min(Tile::kRun, left - base);
        for (int e = 0; e < count_of_run; ++e) {
          const int column = indices[lane][e];
          if (column >= columns) {
            memory.damaged[row] = true;
            left = 0;
            break;
          }
          const Value value = values[lane][e];
          const PanelColumn<X> numbers = x[column];
#pragma unroll
          for (int s = 0; s < Tile::kSamples; ++s) sums[s] = Added(sums[s], value, numbers.of_sample[s]);
        }
        __syncwarp();
      }
      if (thread < rows) {
#pragma unroll
        for (int s = 0; s < Tile::kSamples; ++s) memory.sums[s][row] = sums[s];
      }
      __syncthreads();
    }
    if (thread >= rows) continue;
    damaged = damaged || memory.damaged[thread];
#pragma unroll
    for (int s = 0; s < Tile::kSamples; ++s) {
      if (s >= count) break;
      float sum;
      if constexpr (kQuads) {
        const auto integer = static_cast<float>(static_cast<std::int32_t>(memory.sums[s][thread]));
        const float of_row = a.row_scales[row_begin + thread], of_sample = a.sample_scales[first + s];
        const bool row_first = of_row < of_sample;
        sum = fmaf(integer * (row_first ? of_row : of_sample), row_first ? of_sample : of_row, bias);
      } else {
        sum = memory.sums[s][thread];
      }
      if (damaged) sum = DamagedWeight();
      y[(first + s) * w.rows + row_begin + thread] = FromFloat<Y>(a.relu && sum < 0 ? 0.0f : sum);
    }
  }
}

template <typename Tile, typename Float>
__global__ void __launch_bounds__(Tile::kThreads) BlockedPairsKernel(BlockedWordsCudaArgs a) {
  const std::int64_t n = blockIdx.x, words = CeilDiv(a.features, 2);
  const Float* x = static_cast<const Float*>(a.x) + n * a.features;
  for (std::int64_t c = threadIdx.x; c < words; c += Tile::kThreads) {
    std::uint32_t word = FromFloat<BFloat16>(ToFloat(x[2 * c])).bits;
    if (2 * c + 1 < a.features) word |= std::uint32_t{FromFloat<BFloat16>(ToFloat(x[2 * c + 1])).bits} << 16;
    a.words[n * words + c] = word;
  }
}

// ScaleOf of kernels/panels on the device.
struct DeviceScale {
  float scale, inverse;
};
__device__ DeviceScale ScaleOnDevice(std::uint32_t largest_bits) {
  if (largest_bits >= 0x7f800000u) return {DamagedWeight(), 0.0f};
  if (largest_bits < (127u - 100u) << 23) return {0.0f, 0.0f};
  const float largest = __uint_as_float(largest_bits);
  return {largest / 127.0f, 127.0f / largest};
}

template <typename Tile, typename Float>
__global__ void __launch_bounds__(Tile::kThreads) BlockedQuadsKernel(BlockedWordsCudaArgs a) {
  const std::int64_t n = blockIdx.x, words = CeilDiv(a.features, 4);
  const Float* x = static_cast<const Float*>(a.x) + n * a.features;
  const DeviceScale scale = ScaleOnDevice(LargestBits<Tile>(x, a.features));
  if (threadIdx.x == 0) a.sample_scales[n] = scale.scale;
  for (std::int64_t c = threadIdx.x; c < words; c += Tile::kThreads) {
    std::uint32_t word = 0;
    for (int j = 0; j < 4 && 4 * c + j < a.features && scale.inverse != 0; ++j) {
      const int q = static_cast<int>(rintf(ToFloat(x[4 * c + j]) * scale.inverse));
      word |= (static_cast<std::uint32_t>(q) & 0xffu) << 8 * j;
    }
    a.words[n * words + c] = word;
  }
}

// ---- launchers

// Calls run with the types that read the values and x, whose floats are of the type of number.
template <typename Float, typename Run>
int WithValues(BlockedValues stored_as, Float number, const Run& run) {
  switch (stored_as) {
    case BlockedValues::kFloat32:
      return run(Float32Values{}, number);
    case BlockedValues::kBFloat16:
      return run(BFloat16Values{}, number);
    case BlockedValues::kBFloat16Pairs:
      return run(WordValues<Pair>{}, Pair{});
    case BlockedValues::kInt8Quads:
      return run(WordValues<Quad>{}, Quad{});
    case BlockedValues::kCodes:
      break;
  }
  return run(CodeValues{}, number);
}

}  // namespace

int BlockedMatmulCuda(const BlockedMatmulCudaArgs& a, void* stream) noexcept {
  if (a.weight.rows == 0 || a.samples == 0) return cudaSuccess;
  const dim3 grid(BlocksOnX(a.weight.rows, kBlockedRows), BlocksOnY(a.samples, RowBlockTile::kSamples));
  return WithFloat(a.stored_as, [&](auto number) {
    return WithValues(a.weight.stored_as, number, [&](auto values, auto x) {
      using X = decltype(x);
      const int packed = LaunchPackPanels<X>(a.x, a.panels, a.samples, a.weight.columns, stream);
      if (packed != cudaSuccess) return packed;
      return Launch(BlockedMatmulKernel<RowBlockTile, decltype(values), X, decltype(number)>, grid,
                    RowBlockTile::kThreads, stream, a);
    });
  });
}

int BlockedPairsCuda(const BlockedWordsCudaArgs& a, void* stream) noexcept {
  if (a.samples == 0 || a.features == 0) return cudaSuccess;
  return WithFloat(a.stored_as, [&](auto number) {
    return Launch(BlockedPairsKernel<SampleTile, decltype(number)>, BlocksOnX(a.samples), SampleTile::kThreads, stream,
                  a);
  });
}

int BlockedQuadsCuda(const BlockedWordsCudaArgs& a, void* stream) noexcept {
  if (a.samples == 0) return cudaSuccess;
  return WithFloat(a.stored_as, [&](auto number) {
    return Launch(BlockedQuadsKernel<SampleTile, decltype(number)>, BlocksOnX(a.samples), SampleTile::kThreads, stream,
                  a);
  });
}

}  // namespace tersetorch
