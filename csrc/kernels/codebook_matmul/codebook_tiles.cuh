// Many samples: a block multiplies a tile of rows with a tile of samples. Where that makes few blocks, several share a
// tile and take parts of its columns; their sums meet in scratch, and are added in the order of the parts.
#pragma once

#include <cmath>
#include <limits>
#include <type_traits>

#include "kernels/codebook_matmul/codebook_fragments.cuh"
#include "kernels/codebook_matmul/codebook_paths_cuda.h"

namespace tersetorch {
namespace {

// In scratch, for the sum of a row with a damaged code; no sum of kCodebookMaxQuantizedColumns products is as low.
constexpr int kDamagedSum = std::numeric_limits<std::int32_t>::min();

// Some samples' sums of a tile of kRows rows, on their way from the threads that have them to results or parts.
template <int kRows, int kSamples>
struct SumsOfTile {
  static constexpr int kPitch = kRows + 4;  // lanes of a fragment meet in no bank
  std::uint32_t sums[kSamples][kPitch];
};

// Stores them: row r of the block and sample sample_of(i) for each i. A thread keeps its row.
template <typename Tile, typename Sum, int kSamples, typename SampleOf>
__device__ void StoreSums(const CodebookMatmulCudaArgs& a, const SumsOfTile<Tile::kRows, kSamples>& tile,
                          std::int64_t block_row, float of_table, bool damaged, const SampleOf& sample_of) {
  static_assert(Tile::kThreads % Tile::kRows == 0);
  const int row = static_cast<int>(threadIdx.x) % Tile::kRows;
  const std::int64_t r = block_row + row;
  if (r >= a.weight.rows) return;
  const Output y{a};
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x) / Tile::kRows; i < kSamples; i += Tile::kThreads / Tile::kRows) {
    const std::int64_t n = sample_of(i);
    if (n >= a.samples) continue;
    Sum sum = SumOf<Sum>(tile.sums[i][row]);
    if (a.parts != nullptr) {
      if (std::is_same_v<Sum, int> && damaged) sum = static_cast<Sum>(kDamagedSum);
      static_cast<Sum*>(a.parts)[(blockIdx.z * a.samples + n) * a.weight.rows + r] = sum;
    } else {
      y.Store(n, r, y.Number(sum, n, r, of_table, damaged));
    }
  }
}

// Chunks [begin, end) of the block.
struct Part {
  __device__ explicit Part(int chunks)
      : begin(static_cast<int>(std::int64_t{chunks} * blockIdx.z / gridDim.z)),
        end(static_cast<int>(std::int64_t{chunks} * (blockIdx.z + 1) / gridDim.z)) {}
  int begin, end;
};

// ---- tensor cores

// Warps lie in a grid over the tile; each looks its own rows' codes up, into registers. A stage is a step of x.
template <int kSlotsOfWarp, int kGroupsOfWarp, int kRowWarpsOfTile, int kSampleWarpsOfTile, int kStagesOfTile,
          int kBlocks>
struct FragmentTile {
  static constexpr int kSlots = kSlotsOfWarp, kGroups = kGroupsOfWarp;
  static constexpr int kRowWarps = kRowWarpsOfTile, kSampleWarps = kSampleWarpsOfTile;
  static constexpr int kThreads = kRowWarps * kSampleWarps * kWarpSize, kBlocksAtOnce = kBlocks;
  static constexpr int kRows = kRowWarps * kSlots * kRowsOfSlot, kSamples = kSampleWarps * kGroups * 8;
  static constexpr int kStages = kStagesOfTile;

  template <typename Mode>
  struct Memory {
    uint4 x[kStages][kSamples][kLanesOfRow];
    std::uint32_t table[Mode::TableWords(kRows / kRowsOfSlot)];
  };
};

template <typename Tile, typename Mode>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocksAtOnce) CodebookTileKernel(CodebookMatmulCudaArgs a) {
#if TERSETORCH_TENSOR_CORES
  using Sum = typename Mode::Sum;
  constexpr int kSlots = Tile::kSlots, kGroups = Tile::kGroups, kStages = Tile::kStages;
  auto& memory = *DynamicSharedMemory<typename Tile::template Memory<Mode>>();
  const CodebookWeight& w = a.weight;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarpSize, lane = thread % kWarpSize;
  const int g = lane / kLanesOfRow, t = lane % kLanesOfRow;
  const int first_slot = warp % Tile::kRowWarps * kSlots, first_group = warp / Tile::kRowWarps * kGroups;
  const std::int64_t block_row = std::int64_t{blockIdx.x} * Tile::kRows;
  const std::int64_t row_begin = block_row + first_slot * kRowsOfSlot;
  const int chunks = ChunksOfRow(w);
  const Part part(chunks);
  const CodesOfLane<kSlots, Mode::kBits> codes(w, row_begin);
  const int steps = (part.end - part.begin) * Mode::kSteps;
  const Mode mode(w, row_begin);
  Mode::FillTable(w, block_row, Tile::kRows / kRowsOfSlot, memory.table);
  WaitForPrevious();

  const std::int64_t samples_of_grid = std::int64_t{gridDim.y} * Tile::kSamples;
  for (std::int64_t first = std::int64_t{blockIdx.y} * Tile::kSamples; first < a.samples; first += samples_of_grid) {
    constexpr int kCopies = Tile::kSamples * kLanesOfRow / Tile::kThreads;
    const uint4* from[kCopies];
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int item = thread + i * Tile::kThreads;
      const std::int64_t n = min(first + item / kLanesOfRow, a.samples - 1);
      from[i] = static_cast<const uint4*>(a.packed) + (n * chunks + part.begin) * (Mode::kSteps * kLanesOfRow) +
                item % kLanesOfRow;
    }
    // Copies a step of x into its stage; past the last one nothing, as an empty group.
    const auto copy = [&](int step) {
      if (step < steps) {
        uint4* stage = &memory.x[step % kStages][0][0];
#pragma unroll
        for (int i = 0; i < kCopies; ++i) {
          CopyAsync16(stage + thread + i * Tile::kThreads, from[i] + step * kLanesOfRow);
        }
      }
      CommitCopies();
    };
    __syncthreads();  // the samples before are done
#pragma unroll
    for (int step = 0; step < kStages - 1; ++step) copy(step);
    Words ahead[kSlots] = {};
    if (steps > 0) codes.Load(part.begin, ahead);

    Sum sums[kSlots / 2][kGroups][4] = {};
    bool damaged[kSlots] = {};
    int at = 0;
    for (int chunk = part.begin; chunk < part.end; ++chunk) {
      Words words[kSlots];
      codes.Take(chunk, ahead, words);
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) {
#pragma unroll
        for (int i = 0; i < 4; ++i) Mode::Check(w, words[slot].of[i], &damaged[slot]);
      }
      if (chunk + 1 < part.end) codes.Load(chunk + 1, ahead);
      constexpr int kColumns = 512 / Mode::kBits;
      const int columns = min(static_cast<int>(w.columns) - chunk * kColumns, kColumns);
#pragma unroll
      for (int step = 0; step < Mode::kSteps; ++step, ++at) {
        WaitForCopies<kStages - 2>();
        __syncthreads();  // all have the step, and all are done with the one before, whose stage is the next to fill
        copy(at + kStages - 1);
        const auto& stage = memory.x[at % kStages];
        std::uint32_t rows[kSlots][4];
#pragma unroll
        for (int slot = 0; slot < kSlots; ++slot) {
          const std::uint32_t* table = memory.table + Mode::TableOffset(first_slot);
#pragma unroll
          for (int i = 0; i < 4; ++i) rows[slot][i] = mode.At(table, words[slot].of[i], slot, step);
        }
        if (Mode::kMasks && columns < kColumns) {
#pragma unroll
          for (int slot = 0; slot < kSlots; ++slot) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              rows[slot][i] = Mode::Inside(rows[slot][i], step * Mode::kStepColumns + 4 * t + i, columns);
            }
          }
        }
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
          const uint4 of_x = stage[(first_group + group) * 8 + g][t];
#pragma unroll
          for (int pair = 0; pair < kSlots / 2; ++pair) {
            const auto& low = rows[2 * pair];
            const auto& high = rows[2 * pair + 1];
            MultiplyFragments(sums[pair][group], {low[0], high[0], low[1], high[1]}, of_x.x, of_x.y);
            MultiplyFragments(sums[pair][group], {low[2], high[2], low[3], high[3]}, of_x.z, of_x.w);
          }
        }
      }
    }
    WaitForCopies<0>();

    // Each group of 8 samples of every warp at once, through what were the stages.
    struct Leaving {
      SumsOfTile<Tile::kRows, 8 * Tile::kSampleWarps> tile;
      std::uint32_t damaged[Tile::kRows / kRowsOfSlot];
    };
    auto& leaving = *reinterpret_cast<Leaving*>(&memory.x);
    static_assert(sizeof leaving <= sizeof memory.x);
    const int own_row = thread % Tile::kRows;
    float of_table = 0;
    if constexpr (std::is_same_v<Sum, int>) of_table = ScaleOfRow(w, block_row + own_row).scale;
#pragma unroll 1  // each group has registers of its own, but the code that stores them is long
    for (int group = 0; group < kGroups; ++group) {
      __syncthreads();
      if constexpr (std::is_same_v<Sum, int>) {
#pragma unroll
        for (int slot = 0; slot < kSlots && group == 0; ++slot) {
          const std::uint32_t lanes = __ballot_sync(kWholeWarp, damaged[slot]);
          if (lane == 0 && first_group == 0) leaving.damaged[first_slot + slot] = lanes;
        }
      }
#pragma unroll
      for (int own = 0; own < kGroups; ++own) {
        if (own != group) continue;
#pragma unroll
        for (int pair = 0; pair < kSlots / 2; ++pair) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int n = first_group / kGroups * 8 + 2 * t + i % 2;
            leaving.tile.sums[n][(first_slot + 2 * pair + i / 2) * kRowsOfSlot + g] = BitsOf(sums[pair][own][i]);
          }
        }
      }
      __syncthreads();
      bool bad = false;
      if constexpr (std::is_same_v<Sum, int>) {
        bad = (leaving.damaged[own_row / kRowsOfSlot] >> own_row % kRowsOfSlot * kLanesOfRow & 0xfu) != 0;
      }
      StoreSums<Tile, Sum>(a, leaving.tile, block_row, of_table, bad,
                           [&](int i) { return first + (i / 8 * kGroups + group) * 8 + i % 8; });
    }
  }
#endif
}

// ---- exact

// A thread sums 8 rows times kOfThread samples over tiles of 16 columns, one field of a chunk, in shared memory.
template <int kSamplesOfThread, int kBlocks>
struct ExactTile {
  static constexpr int kRowThreads = 16, kSampleThreads = 16, kOfThread = kSamplesOfThread;
  static constexpr int kThreads = kRowThreads * kSampleThreads, kBlocksAtOnce = kBlocks;
  static constexpr int kRows = 8 * kRowThreads, kSamples = kOfThread * kSampleThreads;
  static constexpr int kColumns = 16;
  static constexpr int kPitch = 4;  // added to rows of memory, so that transposing meets few banks twice

  template <int kBits>
  struct Memory {
    // The table as columns for rows, where a thread has one, or 8 bits for the lanes of a quarter of a warp.
    static constexpr int kTableColumns = kBits <= 4 ? kRows : 8;
    float table[1 << kBits][kTableColumns];
    alignas(16) float weights[2][kColumns][kRows + kPitch];
    alignas(16) float x[2][kColumns][kSamples + kPitch];
  };
};

template <typename Tile, int kBits, bool kPerRow>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocksAtOnce)
    CodebookExactTileKernel(CodebookMatmulCudaArgs a) {
  using Memory = typename Tile::template Memory<kBits>;
  constexpr int kFields = 32 / kBits, kOfThread = Tile::kOfThread;
  constexpr int kWordsOfThread = 16 * Tile::kRows / Tile::kThreads;             // of a chunk
  constexpr int kLoads = Tile::kSamples * Tile::kColumns / 4 / Tile::kThreads;  // of four numbers of x
  auto& memory = *DynamicSharedMemory<Memory>();
  const CodebookWeight& w = a.weight;
  const int thread = static_cast<int>(threadIdx.x);
  const std::int64_t row_begin = std::int64_t{blockIdx.x} * Tile::kRows;
  const Part part(ChunksOfRow(w));
  // Of decoding: the row and the words of the thread.
  const int own_row = thread % Tile::kRows, first_word = thread / Tile::kRows * kWordsOfThread;
  const std::int64_t r = min(row_begin + own_row, w.rows - 1);
  const ChunksOfCodes<kBits> place(w);
  const std::uint8_t* codes = w.codes + r * place.row_bytes + first_word * 4;
  // Columns of the block's part, from the first one, and the fields that hold them.
  const int begin = part.begin * (512 / kBits);
  const int columns = min(static_cast<int>(w.columns), part.end * (512 / kBits)) - begin;
  const int fields = static_cast<int>(CeilDiv(columns, Tile::kColumns));
  const int table_column = thread % Memory::kTableColumns;
  const FloatRows of_x(a);
  for (int i = thread; i < (Memory::kTableColumns << kBits); i += Tile::kThreads) {
    const int code = i / Memory::kTableColumns, column = i % Memory::kTableColumns;
    const float* values = TableOfRow(w, kPerRow, row_begin + column);
    memory.table[code][column] = code < w.entries ? values[code] : DamagedWeight();
  }
  WaitForPrevious();
  // Of products: rows and samples in fours, so that a warp reads whole rows of memory.
  const int first_row = thread % Tile::kRowThreads * 4, first_sample = thread / Tile::kRowThreads * kOfThread;

  const std::int64_t samples_of_grid = std::int64_t{gridDim.y} * Tile::kSamples;
  for (std::int64_t first = std::int64_t{blockIdx.y} * Tile::kSamples; first < a.samples; first += samples_of_grid) {
    std::uint32_t words[kWordsOfThread];
    float numbers[kLoads][4];
    const float* x[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int item = thread + i * Tile::kThreads;
      x[i] = of_x.data + min(first + item / 4, a.samples - 1) * of_x.stride + begin + item % 4 * 4;
    }
    const auto load_codes = [&](int chunk) {
#pragma unroll
      for (int i = 0; i < kWordsOfThread; i += 4) {
        const Words four = LoadWords(codes + place.Begin(part.begin + chunk) + 4 * i);
#pragma unroll
        for (int j = 0; j < 4; ++j) words[i + j] = place.Codes(four.of[j], part.begin + chunk);
      }
    };
    const auto load_x = [&](int field) {
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const bool inside = field * Tile::kColumns + thread % 4 * 4 < columns;
        const float4 four = inside ? Four(x[i] + field * Tile::kColumns) : float4{};
        numbers[i][0] = four.x, numbers[i][1] = four.y, numbers[i][2] = four.z, numbers[i][3] = four.w;
      }
    };
    const auto fill = [&](int buffer, int field) {
      const int shift = field % kFields * kBits, left = columns - field * Tile::kColumns - first_word;
#pragma unroll
      for (int i = 0; i < kWordsOfThread; ++i) {
        const float value = memory.table[words[i] >> shift & ((1u << kBits) - 1)][table_column];
        memory.weights[buffer][first_word + i][own_row] = i < left ? value : 0.0f;
      }
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const int item = thread + i * Tile::kThreads;
#pragma unroll
        for (int j = 0; j < 4; ++j) memory.x[buffer][item % 4 * 4 + j][item / 4] = numbers[i][j];
      }
    };

    float sums[kOfThread][8] = {};
    __syncthreads();  // the table is there, and the samples before are done
    if (fields > 0) {
      load_codes(0);
      load_x(0);
      fill(0, 0);
    }
    __syncthreads();
    for (int field = 0; field < fields; ++field) {
      const int buffer = field % 2, next = field + 1;
      if (next < fields) {
        if (next % kFields == 0) load_codes(next / kFields);
        load_x(next);
      }
#pragma unroll 8
      for (int c = 0; c < Tile::kColumns; ++c) {
        float of_rows[8], of_samples[kOfThread];
#pragma unroll
        for (int i = 0; i < 8; ++i)
          of_rows[i] = memory.weights[buffer][c][first_row + i / 4 * (Tile::kRows / 2) + i % 4];
#pragma unroll
        for (int i = 0; i < kOfThread; ++i) of_samples[i] = memory.x[buffer][c][first_sample + i];
#pragma unroll
        for (int n = 0; n < kOfThread; ++n) {
#pragma unroll
          for (int i = 0; i < 8; ++i) sums[n][i] = fmaf(of_rows[i], of_samples[n], sums[n][i]);
        }
      }
      if (next < fields) fill(buffer ^ 1, next);
      __syncthreads();
    }
    auto& tile = *reinterpret_cast<SumsOfTile<Tile::kRows, Tile::kSampleThreads>*>(&memory.weights);
    static_assert(sizeof tile <= sizeof memory.weights);
#pragma unroll 1
    for (int n = 0; n < kOfThread; ++n) {
#pragma unroll
      for (int own = 0; own < kOfThread; ++own) {
        if (own != n) continue;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int row = first_row + i / 4 * (Tile::kRows / 2) + i % 4;
          tile.sums[thread / Tile::kRowThreads][row] = __float_as_uint(sums[own][i]);
        }
      }
      __syncthreads();
      StoreSums<Tile, float>(a, tile, row_begin, 0.0f, false, [&](int i) { return first + i * kOfThread + n; });
      __syncthreads();
    }
  }
}

// ---- adding parts

struct PartsTile {
  static constexpr int kThreads = 256;
};

template <typename Tile, typename Sum>
__global__ void __launch_bounds__(Tile::kThreads) CodebookAddPartsKernel(CodebookMatmulCudaArgs a) {
  const std::int64_t n = blockIdx.y, r = std::int64_t{blockIdx.x} * Tile::kThreads + threadIdx.x;
  float of_table = 0;
  if constexpr (std::is_same_v<Sum, int>) of_table = ScaleOfRow(a.weight, r).scale;
  if (r >= a.weight.rows) return;
  const auto* parts = static_cast<const Sum*>(a.parts) + n * a.weight.rows + r;
  Sum sum{};
  bool damaged = false;
  for (int part = 0; part < a.part_count; ++part) {
    const Sum one = parts[part * a.samples * a.weight.rows];
    if (std::is_same_v<Sum, int> && one == static_cast<Sum>(kDamagedSum)) {
      damaged = true;
    } else {
      sum += one;
    }
  }
  const Output y{a};
  y.Store(n, r, y.Number(sum, n, r, of_table, damaged));
}

}  // namespace
}  // namespace tersetorch
