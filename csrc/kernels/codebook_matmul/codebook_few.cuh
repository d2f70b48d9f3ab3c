// Few samples: a block takes some rows, its warps the chunks of these rows in turn, each code is looked up once for all
// samples, and the warps' sums meet in shared memory in the order of the warps.
#pragma once

#include <cmath>
#include <type_traits>

#include "kernels/codebook_matmul/codebook_fragments.cuh"
#include "kernels/codebook_matmul/codebook_paths_cuda.h"

namespace tersetorch {
namespace {

// ---- x as fragments

// Sample n's words of lane t in a step of 32 columns; columns are a multiple of four and rows aligned to four numbers.
template <typename Float>
struct XAsItLies {
  __device__ XAsItLies(const CodebookMatmulCudaArgs& a) : a(a) {}

  __device__ Words At(std::int64_t n, std::int64_t step, int t) const {
    const std::int64_t c = step * 32 + 4 * t;
    const Float* x = static_cast<const Float*>(a.x) + n * a.weight.columns + c;
    const bool low_inside = n < a.samples && c < a.weight.columns;
    const bool high_inside = n < a.samples && c + 16 < a.weight.columns;
    Words words;
    if constexpr (std::is_same_v<Float, float>) {
      const float4 low = low_inside ? *reinterpret_cast<const float4*>(x) : float4{};
      const float4 high = high_inside ? *reinterpret_cast<const float4*>(x + 16) : float4{};
      words.of[0] = RoundedPair(low.x, high.x);
      words.of[1] = RoundedPair(low.y, high.y);
      words.of[2] = RoundedPair(low.z, high.z);
      words.of[3] = RoundedPair(low.w, high.w);
    } else {
      const uint2 low = low_inside ? *reinterpret_cast<const uint2*>(x) : uint2{};
      const uint2 high = high_inside ? *reinterpret_cast<const uint2*>(x + 16) : uint2{};
      words.of[0] = __byte_perm(low.x, high.x, 0x5410);
      words.of[1] = __byte_perm(low.x, high.x, 0x7632);
      words.of[2] = __byte_perm(low.y, high.y, 0x5410);
      words.of[3] = __byte_perm(low.y, high.y, 0x7632);
    }
    return words;
  }

  const CodebookMatmulCudaArgs& a;
};

struct XPacked {
  __device__ XPacked(const CodebookMatmulCudaArgs& a) : a(a), steps(a.packed_stride / 64) {}
  __device__ Words At(std::int64_t n, std::int64_t step, int t) const {
    if (n >= a.samples) return {};
    const uint4 words = static_cast<const uint4*>(a.packed)[(n * steps + step) * 4 + t];
    return {{words.x, words.y, words.z, words.w}};
  }
  const CodebookMatmulCudaArgs& a;
  std::int64_t steps;
};

// ---- tensor cores

template <int kSlotsOfTile, int kGroupsOfTile, int kWarpsOfTile>
struct FewTile {
  static constexpr int kSlots = kSlotsOfTile;    // of 8 rows, two a fragment
  static constexpr int kGroups = kGroupsOfTile;  // of 8 samples
  static constexpr int kRows = kSlots * kRowsOfSlot, kSamples = kGroups * 8;
  static constexpr int kWarps = kWarpsOfTile, kThreads = kWarps * kWarpSize;
  static constexpr int kPitch = kRows + 4;  // of a sample's sums: lanes of a fragment meet in no bank

  template <typename Mode>
  struct Memory {
    static constexpr int kSums = kWarps * kSamples * kPitch, kTable = Mode::TableWords(kSlots);
    std::uint32_t words[kSums > kTable ? kSums : kTable];  // the table, then the sums
    std::uint32_t damaged[kWarps][kSlots];
    float scales[kRows];
  };
};

template <typename Tile, typename Mode, typename X>
__global__ void __launch_bounds__(Tile::kThreads, 1) CodebookFewKernel(CodebookMatmulCudaArgs a) {
#if TERSETORCH_TENSOR_CORES
  using Sum = typename Mode::Sum;
  constexpr int kSlots = Tile::kSlots, kGroups = Tile::kGroups;
  auto& memory = SharedMemory<typename Tile::template Memory<Mode>>();
  const CodebookWeight& w = a.weight;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarpSize, lane = thread % kWarpSize;
  const int g = lane / kLanesOfRow, t = lane % kLanesOfRow;
  const std::int64_t row_begin = std::int64_t{blockIdx.x} * Tile::kRows;
  const int chunks = ChunksOfRow(w);
  const CodesOfLane<kSlots, Mode::kBits> codes(w, row_begin);
  Words ahead[kSlots] = {};
  if (warp < chunks) codes.Load(warp, ahead);
  const Mode mode(w, row_begin);
  const X x(a);
  Mode::FillTable(w, row_begin, kSlots, memory.words);
  __syncthreads();
  WaitForPrevious();

  Sum sums[kSlots / 2][kGroups][4] = {};
  bool damaged[kSlots] = {};
  for (int chunk = warp; chunk < chunks; chunk += Tile::kWarps) {
    Words words[kSlots];
    codes.Take(chunk, ahead, words);
    if (chunk + Tile::kWarps < chunks) codes.Load(chunk + Tile::kWarps, ahead);
    constexpr int kColumns = 512 / Mode::kBits;
    const int columns = min(static_cast<int>(w.columns) - chunk * kColumns, kColumns);
#pragma unroll
    for (int step = 0; step < Mode::kSteps; ++step) {
      Words of_x[kGroups];
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        of_x[group] = x.At(group * 8 + g, chunk * Mode::kSteps + step, t);
      }
#pragma unroll
      for (int pair = 0; pair < kSlots / 2; ++pair) {
        std::uint32_t rows[2][4];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            rows[half][i] = mode.At(memory.words, words[2 * pair + half].of[i], 2 * pair + half, step);
          }
        }
        if (Mode::kMasks && columns < kColumns) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            rows[0][i] = Mode::Inside(rows[0][i], step * Mode::kStepColumns + 4 * t + i, columns);
            rows[1][i] = Mode::Inside(rows[1][i], step * Mode::kStepColumns + 4 * t + i, columns);
          }
        }
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
#pragma unroll
          for (int i = 0; i < 4; i += 2) {
            MultiplyFragments(sums[pair][group], {rows[0][i], rows[1][i], rows[0][i + 1], rows[1][i + 1]},
                              of_x[group].of[i], of_x[group].of[i + 1]);
          }
        }
      }
    }
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
#pragma unroll
      for (int i = 0; i < 4; ++i) Mode::Check(w, words[slot].of[i], &damaged[slot]);
    }
  }

  __syncthreads();  // nobody reads the table any more
  constexpr int kOfWarp = Tile::kSamples * Tile::kPitch;
#pragma unroll
  for (int pair = 0; pair < kSlots / 2; ++pair) {
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int n = group * 8 + 2 * t + i % 2, r = pair * 16 + i / 2 * 8 + g;
        memory.words[warp * kOfWarp + n * Tile::kPitch + r] = BitsOf(sums[pair][group][i]);
      }
    }
  }
  if constexpr (std::is_same_v<Sum, int>) {
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      const std::uint32_t lanes = __ballot_sync(kWholeWarp, damaged[slot]);
      if (lane == 0) memory.damaged[warp][slot] = lanes;
    }
    for (int r = thread; r < CeilDiv(Tile::kRows, kWarpSize) * kWarpSize; r += Tile::kThreads) {
      const float scale = ScaleOfRow(w, row_begin + r).scale;
      if (r < Tile::kRows) memory.scales[r] = scale;
    }
  }
  __syncthreads();
  const Output y{a};
  for (int at = thread; at < Tile::kRows * Tile::kSamples; at += Tile::kThreads) {
    const int r = at % Tile::kRows, n = at / Tile::kRows;
    if (row_begin + r >= w.rows || n >= a.samples) continue;
    Sum sum{};
    bool bad = false;
    for (int part = 0; part < Tile::kWarps; ++part) {
      sum += SumOf<Sum>(memory.words[part * kOfWarp + n * Tile::kPitch + r]);
      if constexpr (std::is_same_v<Sum, int>) {
        bad = bad || (memory.damaged[part][r / kRowsOfSlot] >> r % kRowsOfSlot * kLanesOfRow & 0xfu) != 0;
      }
    }
    const float of_table = std::is_same_v<Sum, int> ? memory.scales[r] : 0.0f;
    y.Store(n, row_begin + r, y.Number(sum, n, row_begin + r, of_table, bad));
  }
#endif
}

// ---- exact: the same lanes multiply what they look up, for kSamples samples a block

template <int kSlotsOfTile, int kSamplesOfTile, int kWarpsOfTile>
struct ExactFewTile {
  static constexpr int kSlots = kSlotsOfTile, kSamples = kSamplesOfTile, kRows = kSlots * kRowsOfSlot;
  static constexpr int kWarps = kWarpsOfTile, kThreads = kWarps * kWarpSize;

  template <int kBits, bool kPerRow>
  struct Memory {
    static constexpr int kWordsOfSlot = kWarpSize << kBits;
    std::uint32_t table[kWordsOfSlot * (kPerRow ? kSlots : 1)];
    float sums[kWarps][kSamples][kRows];
  };
};

template <typename Tile, int kBits, bool kPerRow>
__global__ void __launch_bounds__(Tile::kThreads, 1) CodebookExactFewKernel(CodebookMatmulCudaArgs a) {
  using Memory = typename Tile::template Memory<kBits, kPerRow>;
  constexpr int kSlots = Tile::kSlots, kFields = 32 / kBits, kChunkColumns = 512 / kBits;
  auto& memory = SharedMemory<Memory>();
  const CodebookWeight& w = a.weight;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarpSize, lane = thread % kWarpSize;
  const int g = lane / kLanesOfRow, t = lane % kLanesOfRow;
  const std::int64_t row_begin = std::int64_t{blockIdx.x} * Tile::kRows;
  const int chunks = ChunksOfRow(w);
  const CodesOfLane<kSlots, kBits> codes(w, row_begin);
  Words ahead[kSlots] = {};
  if (warp < chunks) codes.Load(warp, ahead);
  constexpr int kTableWords = Memory::kWordsOfSlot * (kPerRow ? kSlots : 1);
  for (int i = thread; i < kTableWords; i += Tile::kThreads) {
    const int slot = i / Memory::kWordsOfSlot, code = i % Memory::kWordsOfSlot / kWarpSize;
    const float* values = TableOfRow(w, kPerRow, row_begin + slot * kRowsOfSlot + i % kWarpSize / kLanesOfRow);
    memory.table[i] = __float_as_uint(code < w.entries ? values[code] : DamagedWeight());
  }
  __syncthreads();
  WaitForPrevious();

  const auto lane_bytes = static_cast<std::uint32_t>(4 * lane);
  float sums[kSlots][Tile::kSamples] = {};
  const FloatRows x(a);
  const std::int64_t first = std::int64_t{blockIdx.y} * Tile::kSamples;
  const float* from = x.data + first * x.stride + 4 * t;
  const std::int64_t last = min(a.samples - 1 - first, std::int64_t{Tile::kSamples});
  for (int chunk = warp; chunk < chunks; chunk += Tile::kWarps) {
    Words words[kSlots];
    codes.Take(chunk, ahead, words);
    if (chunk + Tile::kWarps < chunks) codes.Load(chunk + Tile::kWarps, ahead);
    const int columns = min(static_cast<int>(w.columns) - chunk * kChunkColumns, kChunkColumns);
#pragma unroll
    for (int field = 0; field < kFields; ++field) {
      const int c = chunk * kChunkColumns + field * 16;
      if (field * 16 + 4 * t >= columns) break;
      float weights[kSlots][4];
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) {
        const std::uint32_t* own = kPerRow ? memory.table + slot * Memory::kWordsOfSlot : memory.table;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          weights[slot][i] = __uint_as_float(Lookup<kBits>(own, words[slot].of[i], kBits * field, lane_bytes));
        }
      }
#pragma unroll
      for (int n = 0; n < Tile::kSamples; ++n) {
        const float4 numbers = Four(from + min(std::int64_t{n}, last) * x.stride + c);
#pragma unroll
        for (int slot = 0; slot < kSlots; ++slot) {
          float& sum = sums[slot][n];
          sum = fmaf(weights[slot][0], numbers.x, sum);
          sum = fmaf(weights[slot][1], numbers.y, sum);
          sum = fmaf(weights[slot][2], numbers.z, sum);
          sum = fmaf(weights[slot][3], numbers.w, sum);
        }
      }
    }
  }

#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) {
#pragma unroll
    for (int n = 0; n < Tile::kSamples; ++n) {
      float sum = sums[slot][n];
      sum += __shfl_xor_sync(kWholeWarp, sum, 1);
      sum += __shfl_xor_sync(kWholeWarp, sum, 2);
      if (t == 0) memory.sums[warp][n][slot * kRowsOfSlot + g] = sum;
    }
  }
  __syncthreads();
  const Output y{a};
  for (int at = thread; at < Tile::kRows * Tile::kSamples; at += Tile::kThreads) {
    const int r = at % Tile::kRows, n = at / Tile::kRows;
    if (row_begin + r >= w.rows || n > last) continue;
    float sum = 0;
    for (int part = 0; part < Tile::kWarps; ++part) sum += memory.sums[part][n][r];
    y.Store(first + n, row_begin + r, y.Number(sum, first + n, row_begin + r, 0.0f, false));
  }
}

// ---- packing x

// A block packs words of one sample: pairs of bfloat16, or float32.
struct PackTile {
  static constexpr int kThreads = 256;
  static unsigned BlocksOfSample(std::int64_t packed_stride) {
    return static_cast<unsigned>(CeilDiv(packed_stride / 4, kThreads));
  }
};

template <typename Tile, typename Float>
__global__ void __launch_bounds__(Tile::kThreads) CodebookPackKernel(CodebookMatmulCudaArgs a, unsigned blocks) {
  LetNextBegin();
  const std::int64_t n = blockIdx.x / blocks, words = a.packed_stride / 4, columns = a.weight.columns;
  const std::int64_t i = std::int64_t{blockIdx.x % blocks} * Tile::kThreads + threadIdx.x;
  if (i >= words) return;
  const Float* x = static_cast<const Float*>(a.x) + n * columns;
  const bool pairs = a.mode == CodebookMode::kBFloat16;
  const std::int64_t c = pairs ? i / 16 * 32 + i % 16 : i;
  const float low = c < columns ? ToFloat(x[c]) : 0.0f, high = pairs && c + 16 < columns ? ToFloat(x[c + 16]) : 0.0f;
  static_cast<std::uint32_t*>(a.packed)[n * words + i] =
      pairs ? FromFloat<BFloat16>(low).bits | std::uint32_t{FromFloat<BFloat16>(high).bits} << 16
            : __float_as_uint(low);
}

// A block quantises one sample.
struct QuantizeTile {
  static constexpr int kWarps = 16, kThreads = kWarps * kWarpSize;

  struct Memory {
    std::uint32_t largest[kWarps];
  };
};

template <typename Tile, typename Float>
__global__ void __launch_bounds__(Tile::kThreads) CodebookQuantizeKernel(CodebookMatmulCudaArgs a) {
  LetNextBegin();
  const std::int64_t n = blockIdx.x, words = a.packed_stride / 4, columns = a.weight.columns;
  const Float* x = static_cast<const Float*>(a.x) + n * columns;
  const TableScale scale = ScaleOfLargest(LargestBits<Tile>(x, columns));
  if (threadIdx.x == 0) a.sample_scales[n] = scale.scale;
  for (std::int64_t i = threadIdx.x; i < words; i += Tile::kThreads) {
    std::uint32_t word = 0;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const std::int64_t c = i / 16 * 64 + 16 * k + i % 16;
      if (c < columns) word |= Quantized(ToFloat(x[c]), scale.inverse) << 8 * k;
    }
    static_cast<std::uint32_t*>(a.packed)[n * words + i] = word;
  }
}

}  // namespace
}  // namespace tersetorch
