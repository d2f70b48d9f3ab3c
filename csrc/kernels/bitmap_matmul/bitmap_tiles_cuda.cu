#include <cmath>
#include <limits>
#include <type_traits>

#include "kernels/bitmap_matmul/bitmap_tiles_cuda.h"
#include "kernels/bitmap_matmul/bitmap_weight.cuh"
#include "kernels/common/tensor_cores.cuh"

namespace tersetorch {
namespace {

// In parts, for the sum of a damaged row; no sum of kBitmapMaxQuantizedColumns products is as low.
constexpr int kDamagedSum = std::numeric_limits<std::int32_t>::min();

// ---- scratch

constexpr std::int64_t kUnitBytes = sizeof(uint4);

// Of x, of samples that are not finite, and of parts of sums, where there are several.
struct TileScratch {
  std::uint32_t* odd;  // [samples], whether an infinity or NaN is in it
  uint4* packed;       // [samples, words * units of a word]
  void* parts;         // [part_count, samples, rows]
  int part_count;
};

// ---- numbers

// What 64 columns of one row or sample are in shared memory: kUnits of 16 bytes, a quarter of which lane t of 4 puts
// into its fragments, those of columns 16 t to 16 t + 15. With kPitch, rows g and g + 1 of 8 lanes that read together
// meet in no bank.
struct BFloat16Tiles {
  using X = BFloat16;
  using Sum = float;
  using Bits = std::uint16_t;  // of a number, and of two in neighbouring columns
  using Pair = std::uint32_t;
  static constexpr int kUnits = 8, kPitch = 9;
};
struct Int8Tiles {
  using X = std::int8_t;
  using Sum = int;
  using Bits = std::uint8_t;
  using Pair = std::uint16_t;
  static constexpr int kUnits = 4, kPitch = 4;
};

// ---- tiles

// Warps lie in a grid over the tile; a warp has kSlots times 16 rows and kGroups times 8 samples.
template <int kRowWarpsOfTile, int kSampleWarpsOfTile, int kSlotsOfWarp, int kGroupsOfWarp, int kStagesOfTile,
          int kBlocks>
struct BitmapTile {
  static constexpr int kRowWarps = kRowWarpsOfTile, kSampleWarps = kSampleWarpsOfTile;
  static constexpr int kWarps = kRowWarps * kSampleWarps, kThreads = kWarps * kWarpSize;
  static constexpr int kSlots = kSlotsOfWarp, kGroups = kGroupsOfWarp, kBlocksAtOnce = kBlocks;
  static constexpr int kRows = kRowWarps * kSlots * 16, kSamples = kSampleWarps * kGroups * 8;
  static constexpr int kStages = kStagesOfTile;  // of x
  static_assert(kRows <= kThreads, "thread r has row r's place");

  static_assert(kRows % kWarpSize == 0, "a warp stores rows of one sample");

  // No access has a bank conflict: pairs are stored as lanes follow each other, a place is read by all lanes of a half
  // warp at once, units are as BFloat16Tiles says, and 2 t rows of sums lie 8 t banks apart.
  template <typename Numbers>
  struct Memory {
    union {
      struct {
        uint4 weights[2][kRows][Numbers::kPitch];
        uint4 x[kStages][kSamples][Numbers::kPitch];
        uint4 places[2][kRows];  // of both halves of a word: its bits and its first value
      };
      typename Numbers::Sum sums[kSamples][kRows + 4];
    };
    std::int32_t first[kRows];  // the row's first value in the block's columns
    std::uint32_t damaged[kRows];
  };
};
using SmallTile = BitmapTile<2, 2, 2, 4, 3, 3>;
using LargeTile = BitmapTile<2, 4, 2, 4, 2, 2>;

struct PartsTile {
  static constexpr int kThreads = 256;
};

// ---- results

__device__ void StoreResult(const BitmapMatmulCudaArgs& a, std::int64_t n, std::int64_t r, float sum, bool damaged) {
  const float scale = a.x_scales == nullptr ? 1.0f : a.weight.scales[r] * a.x_scales[n];
  const float y = damaged ? DamagedWeight() : fmaf(sum, scale, a.bias == nullptr ? 0.0f : a.bias[r]);
  PutFloat(a.y, a.stored_as, n * a.weight.rows + r, a.relu && y < 0 ? 0.0f : y);
}

// The sum of the block's part of the columns.
template <typename Sum>
__device__ void StoreSum(const BitmapMatmulCudaArgs& a, const TileScratch& scratch, std::int64_t n, std::int64_t r,
                         Sum sum, bool damaged) {
  if (scratch.part_count == 1) return StoreResult(a, n, r, static_cast<float>(sum), damaged);
  if (damaged) sum = std::is_same_v<Sum, float> ? static_cast<Sum>(DamagedWeight()) : static_cast<Sum>(kDamagedSum);
  static_cast<Sum*>(scratch.parts)[(blockIdx.z * a.samples + n) * a.weight.rows + r] = sum;
}

// Of a row that is not damaged, without a product for absent weights; all lanes call it.
template <typename X>
__device__ float SumOfSetBits(const BitmapWeight& w, std::int64_t r, const X* x) {
  const std::int64_t words = CeilDiv(w.columns, kWordBits);
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  std::int64_t next = w.row_offsets[r];
  float sum = 0;
  for (std::int64_t i = 0; i < words; i += kWarpSize) {
    std::uint64_t word = i + lane < words ? w.bitmap[r * words + i + lane] : 0;
    const int own = __popcll(word), through = SumThroughLane(own);
    for (std::int64_t k = next + through - own; word != 0; ++k, word &= word - 1) {
      const std::int64_t c = (i + lane) * kWordBits + __ffsll(static_cast<long long>(word)) - 1;
      sum += BFloat16Values::At(w, k) * ToFloat(x[c]);
    }
    next += __shfl_sync(kWholeWarp, through, kWarpSize - 1);
  }
  return WarpSum(sum);
}

// ---- kernels

template <typename Tile, typename Numbers>
__global__ void __launch_bounds__(Tile::kThreads) BitmapPackKernel(BitmapMatmulCudaArgs a, TileScratch scratch) {
  using X = typename Numbers::X;
  constexpr int kOfUnit = kUnitBytes / sizeof(X);
  auto& memory = SharedMemory<typename Tile::Memory>();
  LetNextBegin();
  const std::int64_t n = blockIdx.x, columns = a.weight.columns;
  const std::int64_t units = CeilDiv(columns, kWordBits) * Numbers::kUnits;
  const int thread = static_cast<int>(threadIdx.x);
  const X* x = static_cast<const X*>(a.x) + n * columns;
  bool odd = false;
  for (std::int64_t unit = thread; unit < units; unit += Tile::kThreads) {
    union {
      X numbers[kOfUnit];
      uint4 whole;
    } packed;
#pragma unroll
    for (int i = 0; i < kOfUnit; ++i) {
      const std::int64_t c = unit * kOfUnit + i;
      X number = c < columns ? x[c] : X{};
      if constexpr (std::is_same_v<X, BFloat16>) {
        const bool finite = (number.bits & 0x7f80) != 0x7f80;
        odd = odd || !finite;
        if (!finite) number = X{};
      }
      packed.numbers[i] = number;
    }
    scratch.packed[n * units + unit] = packed.whole;
  }
  odd = __any_sync(kWholeWarp, odd) != 0;
  if (thread % kWarpSize == 0) memory.largest[thread / kWarpSize] = odd ? 1 : 0;
  __syncthreads();
  if (thread != 0) return;
  std::uint32_t any = 0;
  for (int warp = 0; warp < Tile::kWarps; ++warp) any |= memory.largest[warp];
  scratch.odd[n] = any;
}

template <typename Tile, typename Numbers>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocksAtOnce)
    BitmapTileKernel(BitmapMatmulCudaArgs a, TileScratch scratch) {
#if TERSETORCH_TENSOR_CORES
  using Sum = typename Numbers::Sum;
  using Bits = typename Numbers::Bits;
  using Pair = typename Numbers::Pair;
  constexpr int kSlots = Tile::kSlots, kGroups = Tile::kGroups, kStages = Tile::kStages, kUnits = Numbers::kUnits;
  constexpr int kLaneUnits = kUnits / 4, kRowsOfWarp = Tile::kRows / Tile::kWarps;  // that it decodes
  auto& memory = *DynamicSharedMemory<typename Tile::template Memory<Numbers>>();
  const BitmapWeight& w = a.weight;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarpSize, lane = thread % kWarpSize;
  const int g = lane / 4, t = lane % 4;
  const std::int64_t block_row = std::int64_t{blockIdx.x} * Tile::kRows;
  const std::int64_t words = CeilDiv(w.columns, kWordBits);
  const int begin = static_cast<int>(words * blockIdx.z / gridDim.z);
  const int steps = static_cast<int>(words * (blockIdx.z + 1) / gridDim.z) - begin,
            bits_of_last = static_cast<int>(w.columns % kWordBits);

  for (int i = 0; i < kRowsOfWarp; ++i) {
    const int of_block = warp * kRowsOfWarp + i;
    const std::int64_t r = block_row + of_block;
    const Row row = r < w.rows ? RowAt(w, r) : Row{0, 0, true};
    int before = 0, all = 0;
    bool outside = false;
    for (std::int64_t j = lane; j < words && !row.damaged; j += kWarpSize) {
      const std::uint64_t word = w.bitmap[r * words + j];
      const int set = __popcll(word);
      all += set;
      if (j < begin) before += set;
      outside |= j == words - 1 && bits_of_last != 0 && word >> bits_of_last != 0;
    }
    before = WarpSum(before);
    all = WarpSum(all);
    outside = __any_sync(kWholeWarp, outside) != 0;
    if (lane != 0) continue;
    memory.first[of_block] = row.begin + before;
    memory.damaged[of_block] = row.damaged || outside || all != row.end - row.begin ? 1 : 0;
  }
  WaitForPrevious();

  const int first_slot = warp % Tile::kRowWarps * kSlots, first_group = warp / Tile::kRowWarps * kGroups;
  const auto tiles = static_cast<unsigned>(CeilDiv(a.samples, Tile::kSamples));
  for (unsigned tile = blockIdx.y; tile < tiles; tile += gridDim.y) {
    const std::int64_t first = std::int64_t{tile} * Tile::kSamples;
    __syncthreads();  // rows are counted, and the samples before are done
    // Copies a step of x into its stage; past the last one nothing, as an empty group.
    const auto copy = [&](int step) {
#pragma unroll 1
      for (int item = thread; item < Tile::kSamples * kUnits && step < steps; item += Tile::kThreads) {
        const std::int64_t n = min(first + item / kUnits, a.samples - 1);
        CopyAsync16(&memory.x[step % kStages][item / kUnits][item % kUnits],
                    scratch.packed + (n * words + begin + step) * kUnits + item % kUnits);
      }
      CommitCopies();
    };
    // Thread r walks row r's words, one step ahead of those who need the place.
    const bool has_row = thread < Tile::kRows && memory.damaged[thread % Tile::kRows] == 0;
    const std::uint64_t* bits = w.bitmap + (has_row ? (block_row + thread) * words + begin : 0);
    const auto word_of = [&](int step) { return has_row && step < steps ? bits[step] : 0; };
    std::uint64_t ahead = word_of(0);
    const auto place = [&](int step) {
      if (thread < Tile::kRows) {
        const uint4 last = memory.places[(step + 1) % 2][thread];  // of the step before, or the place of no bits
        const std::uint32_t next = last.w + static_cast<std::uint32_t>(__popc(last.z));
        const auto low = static_cast<std::uint32_t>(ahead);
        const std::uint32_t middle = next + static_cast<std::uint32_t>(__popc(low));
        memory.places[step % 2][thread] = {low, next, static_cast<std::uint32_t>(ahead >> 32), middle};
      }
      ahead = word_of(step + 1);
    };
    if (thread < Tile::kRows) memory.places[1][thread] = {0, 0, 0, static_cast<std::uint32_t>(memory.first[thread])};
    // A lane's pairs of a step's rows, on their way from values to memory.
    std::uint32_t pairs[kRowsOfWarp][2];
    const auto load = [&](int step) {
      const auto* values = static_cast<const Bits*>(w.values);
      const int shift = 2 * (lane % 16);
#pragma unroll
      for (int i = 0; i < kRowsOfWarp; ++i) {
        const auto* halves = reinterpret_cast<const uint2*>(&memory.places[step % 2][warp * kRowsOfWarp + i]);
        const uint2 half = halves[lane / 16];
        const std::uint32_t own = half.x >> shift;
        const std::int32_t k = static_cast<std::int32_t>(half.y) + __popc(half.x & ((1u << shift) - 1));
        pairs[i][0] = (own & 1) != 0 ? values[k] : 0;
        pairs[i][1] = (own & 2) != 0 ? values[k + static_cast<std::int32_t>(own & 1)] : 0;
      }
    };
    const auto store = [&](int step) {
#pragma unroll
      for (int i = 0; i < kRowsOfWarp; ++i) {
        auto* row = reinterpret_cast<Pair*>(memory.weights[step % 2][warp * kRowsOfWarp + i]);
        row[lane] = static_cast<Pair>(pairs[i][0] | pairs[i][1] << 8 * sizeof(Bits));
      }
    };

    Sum sums[kSlots][kGroups][4] = {};
#pragma unroll
    for (int step = 0; step < kStages - 1; ++step) copy(step);
    place(0);
    place(1);
    __syncthreads();
    if (steps > 0) {
      load(0);
      store(0);
    }
    WaitForCopies<kStages - 2>();
    __syncthreads();
    for (int step = 0; step < steps; ++step) {
      copy(step + kStages - 1);
      place(step + 2);
      if (step + 1 < steps) load(step + 1);
      const auto& rows = memory.weights[step % 2];
      const auto& samples = memory.x[step % kStages];
#pragma unroll 1  // loads of the next unit would take registers that spill
      for (int i = 0; i < kLaneUnits; ++i) {
        const int unit = t * kLaneUnits + i;
        uint4 low[kSlots], high[kSlots];
#pragma unroll
        for (int slot = 0; slot < kSlots; ++slot) {
          low[slot] = rows[(first_slot + slot) * 16 + g][unit];
          high[slot] = rows[(first_slot + slot) * 16 + 8 + g][unit];
        }
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
          const uint4 x = samples[(first_group + group) * 8 + g][unit];
#pragma unroll
          for (int slot = 0; slot < kSlots; ++slot) {
            MultiplyFragments(sums[slot][group], {low[slot].x, high[slot].x, low[slot].y, high[slot].y}, x.x, x.y);
            MultiplyFragments(sums[slot][group], {low[slot].z, high[slot].z, low[slot].w, high[slot].w}, x.z, x.w);
          }
        }
      }
      if (step + 1 < steps) store(step + 1);
      WaitForCopies<kStages - 2>();
      __syncthreads();  // all have the next step, and all are done with this one
    }
    WaitForCopies<0>();

#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          memory.sums[(first_group + group) * 8 + 2 * t + i % 2][(first_slot + slot) * 16 + i / 2 * 8 + g] =
              sums[slot][group][i];
        }
      }
    }
    __syncthreads();
    // A warp has one sample at a time, and keeps its rows.
    const int own_row = thread % Tile::kRows;
    const std::int64_t r = block_row + own_row;
#pragma unroll 1
    for (int i = thread / Tile::kRows; i < Tile::kSamples && first + i < a.samples; i += Tile::kThreads / Tile::kRows) {
      const std::int64_t n = first + i;
      Sum sum = memory.sums[i][own_row];
      if constexpr (std::is_same_v<Sum, float>) {
        if (scratch.odd[n] != 0) {
          sum = 0;
#pragma unroll 1
          for (int of_warp = 0; of_warp < kWarpSize && blockIdx.z == 0; ++of_warp) {
            const int row = own_row - lane + of_warp;
            if (memory.damaged[row] != 0) continue;
            const float whole = SumOfSetBits(w, block_row + row, static_cast<const BFloat16*>(a.x) + n * w.columns);
            if (lane == of_warp) sum = whole;
          }
        }
      }
      if (r < w.rows) StoreSum(a, scratch, n, r, sum, memory.damaged[own_row] != 0);
    }
  }
#endif
}

template <typename Tile, typename Sum>
__global__ void __launch_bounds__(Tile::kThreads) BitmapAddPartsKernel(BitmapMatmulCudaArgs a, TileScratch scratch) {
  const std::int64_t r = std::int64_t{blockIdx.x} * Tile::kThreads + threadIdx.x;
  if (r >= a.weight.rows) return;
  for (std::int64_t n = blockIdx.y; n < a.samples; n += gridDim.y) {
    Sum sum{};
    bool damaged = false;  // NaN tells of itself
    for (int part = 0; part < scratch.part_count; ++part) {
      const Sum one = static_cast<const Sum*>(scratch.parts)[(part * a.samples + n) * a.weight.rows + r];
      if (std::is_same_v<Sum, int> && one == static_cast<Sum>(kDamagedSum)) {
        damaged = true;
      } else {
        sum += one;
      }
    }
    StoreResult(a, n, r, static_cast<float>(sum), damaged);
  }
}

// ---- launchers

bool IsLarge(const BitmapMatmulCudaArgs& a) { return a.samples > SmallTile::kSamples; }

// As many parts of the columns as fill the device; each has some words, so that its sums are worth their way.
template <typename Tile>
int PartsFor(const BitmapMatmulCudaArgs& a) {
  constexpr std::int64_t kWords = 8, kMost = 16;
  int device = 0, processors = 1;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) {
    return 1;
  }
  const std::int64_t blocks = CeilDiv(a.weight.rows, Tile::kRows) * CeilDiv(a.samples, Tile::kSamples);
  const std::int64_t fit = std::int64_t{processors} * Tile::kBlocksAtOnce / std::max<std::int64_t>(1, blocks);
  return static_cast<int>(
      std::max<std::int64_t>(1, std::min({fit, CeilDiv(a.weight.columns, kWordBits) / kWords, kMost})));
}

// Where scratch has what, and how many bytes it takes.
std::int64_t LayOut(const BitmapMatmulCudaArgs& a, TileScratch& scratch) {
  const std::int64_t units = a.x_scales != nullptr ? Int8Tiles::kUnits : BFloat16Tiles::kUnits;
  const std::int64_t odd = CeilDiv(4 * a.samples, kUnitBytes) * kUnitBytes;
  const std::int64_t packed = a.samples * CeilDiv(a.weight.columns, kWordBits) * units * kUnitBytes;
  auto* bytes = static_cast<unsigned char*>(a.scratch);
  scratch.part_count = IsLarge(a) ? PartsFor<LargeTile>(a) : PartsFor<SmallTile>(a);
  if (bytes != nullptr) {
    scratch.odd = reinterpret_cast<std::uint32_t*>(bytes);
    scratch.packed = reinterpret_cast<uint4*>(bytes + odd);
    scratch.parts = bytes + odd + packed;
  }
  return odd + packed + (scratch.part_count == 1 ? 0 : 4 * scratch.part_count * a.samples * a.weight.rows);
}

template <typename Tile, typename Numbers>
int LaunchTiles(const BitmapMatmulCudaArgs& a, const TileScratch& scratch, void* stream) {
  const dim3 grid(static_cast<unsigned>(CeilDiv(a.weight.rows, Tile::kRows)), BlocksOnY(a.samples, Tile::kSamples),
                  static_cast<unsigned>(scratch.part_count));
  return LaunchEarly(BitmapTileKernel<Tile, Numbers>, grid, Tile::kThreads,
                     sizeof(typename Tile::template Memory<Numbers>), stream, a, scratch);
}

template <typename Numbers>
int LaunchAll(const BitmapMatmulCudaArgs& a, const TileScratch& scratch, void* stream) {
  int error = Launch(BitmapPackKernel<SampleTile, Numbers>, static_cast<unsigned>(a.samples), SampleTile::kThreads,
                     stream, a, scratch);
  if (error != cudaSuccess) return error;
  error = IsLarge(a) ? LaunchTiles<LargeTile, Numbers>(a, scratch, stream)
                     : LaunchTiles<SmallTile, Numbers>(a, scratch, stream);
  if (error != cudaSuccess || scratch.part_count == 1) return error;
  const dim3 grid(static_cast<unsigned>(CeilDiv(a.weight.rows, PartsTile::kThreads)), BlocksOnY(a.samples, 1));
  return Launch(BitmapAddPartsKernel<PartsTile, typename Numbers::Sum>, grid, PartsTile::kThreads, stream, a, scratch);
}

}  // namespace

bool BitmapTakesTiles(const BitmapMatmulCudaArgs& a) noexcept {
  const bool exact =
      a.x_scales != nullptr || (a.weight.stored_as == BitmapValues::kBFloat16 && a.stored_as == FloatDtype::kBFloat16);
  return exact && a.samples > kPanelSamples && HasTensorCores();
}

std::int64_t BitmapTileScratchBytes(const BitmapMatmulCudaArgs& a) noexcept {
  TileScratch scratch{};
  return LayOut(a, scratch);
}

int BitmapTilesCuda(const BitmapMatmulCudaArgs& a, void* stream) noexcept {
  TileScratch scratch{};
  LayOut(a, scratch);
  return a.x_scales != nullptr ? LaunchAll<Int8Tiles>(a, scratch, stream)
                               : LaunchAll<BFloat16Tiles>(a, scratch, stream);
}

}  // namespace tersetorch
