#include <cmath>
#include <type_traits>

#include "kernels/common/cuda.cuh"
#include "kernels/product_matmul/product_matmul_cuda.h"

namespace tersetorch {
namespace {

// ---- the weight

__host__ __device__ std::int64_t Tables(const ProductWeight& w) { return w.stages * w.segments; }

__host__ __device__ std::int64_t Tiles(const ProductWeight& w) { return CeilDiv(w.rows, kProductRows); }

// Tables whose codes lie together, and how many of them there are.
__host__ __device__ int UnitOf(const ProductWeight& w) { return w.entries > kProductFew ? 1 : kProductGroup; }
__host__ __device__ std::int64_t Units(const ProductWeight& w) { return CeilDiv(Tables(w), UnitOf(w)); }

// The code of a row for a table.
__device__ int CodeAt(const ProductWeight& w, std::int64_t row, std::int64_t table) {
  const std::int64_t tile = row / kProductRows, r = row % kProductRows, tables = Tables(w);
  if (w.entries > kProductFew) return w.codes[(tile * tables + table) * kProductRows + r];
  const std::int64_t groups = CeilDiv(tables, kProductGroup), j = table % kProductGroup;
  const std::int64_t word = (tile * groups + table / kProductGroup) * kProductRows + r;
  return w.codes[word * 4 + j / 2] >> 4 * (j % 2) & 15;
}

// Where the numbers of an entry and the inputs that they multiply are; no numbers of an entry that the weight does not
// have.
struct Entry {
  const float* numbers;  // the next one lies `entries` further
  std::int64_t column;
  int width, inputs;
};

__device__ Entry EntryAt(const ProductWeight& w, int table, int entry) {
  const unsigned segments = max(1u, static_cast<unsigned>(w.segments));
  const unsigned stage = static_cast<unsigned>(table) / segments, segment = static_cast<unsigned>(table) % segments;
  const std::int64_t book = stage * w.books + (w.books == 1 ? 0 : segment), column = segment * w.width;
  const int inputs = table < Tables(w) ? static_cast<int>(min(w.width, w.columns - column)) : 0;
  return {w.codebooks + book * w.width * w.entries + entry, column, entry < w.entries ? inputs : 0, inputs};
}

// Calls run with a number of the type of x. The branch is the same for all threads; a type for kernels would double
// them, and a third branch would spill registers.
template <typename Run>
__device__ void WithInputs(const ProductMatmulCudaArgs& a, const Run& run) {
  if (a.stored_as == FloatDtype::kBFloat16) {
    run(BFloat16{});
  } else {
    run(float{});
  }
}

// Products of kItems entries, of one table or not, with kSamples samples from n on; the last sample stands in for those
// past it. So many numbers are read at a time that the reads overlap.
template <bool kOneTable, int kItems, int kSamples>
__device__ void Multiply(const ProductMatmulCudaArgs& a, std::int64_t n, const Entry (&entries)[kItems],
                         float (&products)[kItems][kSamples]) {
  constexpr int kStep = 4, kTables = kOneTable ? 1 : kItems;
  std::int64_t rows[kSamples];
#pragma unroll
  for (int s = 0; s < kSamples; ++s) rows[s] = min(n + s, a.samples - 1) * a.weight.columns;
  const int pitch = static_cast<int>(a.weight.entries), width = static_cast<int>(a.weight.width);
  for (int first = 0; first < width; first += kStep) {
    float numbers[kItems][kStep], inputs[kTables][kStep][kSamples];
#pragma unroll
    for (int j = 0; j < kStep; ++j) {
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        numbers[i][j] = first + j < entries[i].width ? __ldg(entries[i].numbers + (first + j) * pitch) : 0.0f;
      }
    }
    WithInputs(a, [&](auto number) {
      const auto* x = static_cast<const decltype(number)*>(a.x);
#pragma unroll
      for (int j = 0; j < kStep; ++j) {
#pragma unroll
        for (int i = 0; i < kTables; ++i) {
          const bool is = first + j < entries[i].inputs;
#pragma unroll
          for (int s = 0; s < kSamples; ++s) {
            inputs[i][j][s] = is ? ToFloat(x[rows[s] + entries[i].column + first + j]) : 0.0f;
          }
        }
      }
    });
#pragma unroll
    for (int j = 0; j < kStep; ++j) {
      if (kOneTable && first + j >= entries[0].inputs) break;
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        const bool is = kOneTable || first + j < entries[i].inputs;
#pragma unroll
        for (int s = 0; s < kSamples; ++s) {
          const float sum = fmaf(inputs[kOneTable ? 0 : i][j][s], numbers[i][j], products[i][s]);
          products[i][s] = is ? sum : products[i][s];
        }
      }
    }
  }
}

// ---- tiles

// A block looks some tables up for the samples of a word; a warp two units of tables for 64 rows, half of it each.
template <bool kOfFew, int kOfBlock>
struct WordTile {
  static constexpr bool kNarrow = kOfFew;
  static constexpr int kThreads = kOfBlock, kWarps = kThreads / kWarpSize;
  static constexpr int kEntries = kNarrow ? kProductFew : kProductMany;
  static constexpr int kUnit = kNarrow ? kProductGroup : 1;
  static constexpr int kPairs = 16;                // of units, at most
  static constexpr int kBatch = kNarrow ? 2 : 16;  // pairs whose codes are read at a time
  static constexpr int kRows = 4;                  // of a lane
  static_assert(2 * kPairs * kUnit * 255 < 0xffff, "sums of bytes fit 16 bits, and one number is left for damage");

  // [pair][table of a unit][half][entry]: the halves of a warp read from different banks where entries are few.
  struct Memory {
    std::uint32_t words[kPairs * kUnit * 2 * kEntries];
  };
};

constexpr int kPanelWidth = 8;  // of tables, at most

// A block makes unit after unit of tables for some samples and looks each up for all its rows. A lane has four of the
// samples and 8 or 16 rows.
template <bool kOfFew, int kOfSamples, int kOfBlock, int kOfLane>
struct PanelTile {
  static constexpr bool kNarrow = kOfFew;
  static constexpr int kSamples = kOfSamples, kQuads = kSamples / 4, kThreads = kOfBlock;
  static constexpr int kEntries = kNarrow ? kProductFew : kProductMany;
  static constexpr int kUnit = kNarrow ? kProductGroup : 1;
  static constexpr int kChunks = 8;  // 16 bytes, in 32 banks
  static constexpr int kCopies = kChunks / kQuads;
  static constexpr int kSlots = kUnit * kEntries;
  static constexpr int kItems = (kSlots * kQuads + kThreads - 1) / kThreads;
  static constexpr int kRows = kOfLane;
  static constexpr int kTiles = kThreads / kQuads * kRows / kProductRows;
  static constexpr int kColumns = 256;  // of x, in memory

  struct Memory {
    float4 table[kSlots][kChunks];
    float4 x[kColumns][kQuads];
  };
};

// A block adds what the blocks of some rows left.
struct SumTile {
  static constexpr int kRows = kWarpSize, kParts = 8;
  static constexpr int kThreads = kRows * kParts;

  template <typename T>
  struct Memory {
    T sums[kParts][kRows];
  };
};

// A warp measures a table, or half of it one of few entries, for some samples.
template <bool kOfFew, int kOfSamples>
struct MeasureTile {
  static constexpr int kThreads = 256, kLanes = kOfFew ? kProductFew : kWarpSize;
  static constexpr int kTables = kThreads / kLanes, kSamples = kOfSamples;
  static constexpr int kItems = kOfFew ? 1 : kProductMany / kLanes;  // entries of a lane
};

// A block decodes some rows, a thread a row.
struct RowsTile {
  static constexpr int kThreads = kProductRows;
};

// ---- words: a float of one sample, or a byte of each of four

struct FloatWords {
  static constexpr int kSamples = 1;
  using Part = float;

  static constexpr bool kBytes = false;
  struct Rounding {
    __device__ Rounding(const ProductMatmulCudaArgs&, std::int64_t) {}
    __device__ std::uint32_t Word(const ProductMatmulCudaArgs& a, int table, int entry,
                                  const float (&products)[kSamples]) const {
      const bool damaged = entry >= a.weight.entries && table < Tables(a.weight);
      return __float_as_uint(damaged ? DamagedWeight() : products[0]);
    }
  };
  struct Sum {
    __device__ void Add(std::uint32_t word) { sum += __uint_as_float(word); }
    __device__ void AddOtherHalf() { sum += __shfl_xor_sync(kWholeWarp, sum, kWarpSize / 2); }

    float sum = 0;
  };
};

template <int kOfWord>
struct ByteWords {
  static constexpr int kSamples = kOfWord;  // 1 or 4
  using Part = std::uint16_t;
  static constexpr std::uint32_t kDamaged = 0xffff;

  static constexpr bool kBytes = true;
  struct Rounding {
    __device__ Rounding(const ProductMatmulCudaArgs& a, std::int64_t n) : first(n) {
#pragma unroll
      for (int s = 0; s < kSamples; ++s) inverses[s] = n + s < a.samples ? a.scales[n + s].inverse : 0.0f;
    }
    __device__ std::uint32_t Word(const ProductMatmulCudaArgs& a, int table, int entry,
                                  const float (&products)[kSamples]) const {
      const std::int64_t tables = Tables(a.weight);
      if (table >= tables || entry >= a.weight.entries) return 0;
      std::uint32_t word = 0;
#pragma unroll
      for (int s = 0; s < kSamples; ++s) {
        if (inverses[s] == 0) continue;
        const float above = products[s] - a.lows[(first + s) * tables + table];
        word |= static_cast<std::uint32_t>(rintf(above * inverses[s])) << 8 * s;
      }
      return word;
    }

    std::int64_t first;
    float inverses[kSamples];
  };
  // Sums of bytes mod 2^32, and those of bytes 1 and 3 in 16 bits each.
  struct Sum {
    __device__ void Add(std::uint32_t word) {
      all += word;
      if (kSamples > 1) odd += word >> 8 & 0x00ff00ff;
    }
    __device__ void AddOtherHalf() {
      all += __shfl_xor_sync(kWholeWarp, all, kWarpSize / 2);
      if (kSamples > 1) odd += __shfl_xor_sync(kWholeWarp, odd, kWarpSize / 2);
    }
    __device__ std::uint32_t Of(int s) const { return (s % 2 != 0 ? odd : all - (odd << 8)) >> s / 2 * 16 & 0xffff; }

    std::uint32_t all = 0, odd = 0;
  };
};

// ---- kernels

template <typename Tile, typename Words>
__device__ void MakeWords(const ProductMatmulCudaArgs& a, int first_table, int pairs, std::int64_t n,
                          std::uint32_t* words) {
  constexpr int kItems = 4, kOfWarp = kItems * kWarpSize;  // of one table, where it is long
  const typename Words::Rounding rounding(a, n);
  const int count = pairs * 2 * Tile::kUnit * Tile::kEntries;
  const int thread = static_cast<int>(threadIdx.x);
  for (int first = thread / kWarpSize * kOfWarp + thread % kWarpSize; first < count; first += Tile::kWarps * kOfWarp) {
    Entry entries[kItems];
    int tables[kItems];
    float products[kItems][Words::kSamples] = {};
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int at = first + i * kWarpSize, slot = at / Tile::kEntries;
      const int in_pair = slot % (2 * Tile::kUnit), unit = slot / (2 * Tile::kUnit) * 2 + in_pair % 2;
      tables[i] = first_table + unit * Tile::kUnit + in_pair / 2;
      if (Tile::kNarrow || i == 0) {
        entries[i] = EntryAt(a.weight, tables[i], at % Tile::kEntries);
      } else {
        tables[i] = tables[0];
        entries[i] = entries[0];
        entries[i].numbers += i * kWarpSize;
        entries[i].width = at % Tile::kEntries < a.weight.entries ? entries[0].inputs : 0;
      }
    }
    Multiply<!Tile::kNarrow>(a, n, entries, products);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int at = first + i * kWarpSize;
      words[at] = rounding.Word(a, tables[i], at % Tile::kEntries, products[i]);
    }
  }
}

// The low of ProductScaleOf for the samples of a word, which has one order of summation: a thread adds up a sample's.
template <typename Tile, typename Words>
__device__ void SumLows(const ProductMatmulCudaArgs& a, std::int64_t first, float* staged) {
  constexpr int kAtOnce = sizeof(typename Tile::Memory) / sizeof(float) / Words::kSamples;
  const int thread = static_cast<int>(threadIdx.x), sample = thread / kWarpSize;
  const std::int64_t tables = Tables(a.weight), samples = min(std::int64_t{Words::kSamples}, a.samples - first);
  const bool adds = thread % kWarpSize == 0 && sample < samples;
  float low = 0;
  for (std::int64_t begin = 0; begin < tables; begin += kAtOnce) {
    const int count = static_cast<int>(min(std::int64_t{kAtOnce}, tables - begin));
    __syncthreads();
    for (std::int64_t s = 0; s < samples; ++s) {
      for (int i = thread; i < count; i += Tile::kThreads) {
        staged[s * kAtOnce + i] = a.lows[(first + s) * tables + begin + i];
      }
    }
    __syncthreads();
    if (!adds) continue;
#pragma unroll 16
    for (int i = 0; i < count; ++i) low += staged[sample * kAtOnce + i];
  }
  if (adds && a.scales[first + sample].scale == a.scales[first + sample].scale) a.scales[first + sample].low = low;
}

template <typename Tile, typename Words>
__global__ void __launch_bounds__(Tile::kThreads) ProductWordsKernel(ProductMatmulCudaArgs a) {
  using Codes = std::conditional_t<Tile::kNarrow, uint4, std::uint32_t>;
  constexpr int kRows = Tile::kRows;
  auto& memory = SharedMemory<typename Tile::Memory>();
  const ProductWeight& w = a.weight;
  const std::int64_t groups = CeilDiv(a.samples, Words::kSamples);
  std::int64_t block = blockIdx.x;
  if (Words::kBytes) {
    if (block < groups) {
      SumLows<Tile, Words>(a, block * Words::kSamples, reinterpret_cast<float*>(memory.words));
      return;
    }
    block -= groups;
  }
  const std::int64_t n = block % groups * Words::kSamples, split = block / groups % a.plan.splits;
  const std::int64_t all_units = Units(w), first_unit = split * 2 * a.plan.steps;
  const int units = static_cast<int>(min(2 * a.plan.steps, all_units - first_unit)), pairs = (units + 1) / 2;
  const std::int64_t tiles = Tiles(w), first_tile = block / groups / a.plan.splits * a.plan.tiles;
  const std::int64_t end_tile = min(first_tile + a.plan.tiles, tiles);

  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpSize;
  const int half = lane / (kWarpSize / 2), row = lane % (kWarpSize / 2) * kRows;
  const Codes* codes = reinterpret_cast<const Codes*>(w.codes) + row / kRows;
  // Of a batch of pairs, this half's codes of its rows.
  const auto read = [&](Codes(&out)[Tile::kBatch], std::int64_t tile, int pair) {
#pragma unroll
    for (int i = 0; i < Tile::kBatch; ++i) {
      const int unit = 2 * (pair + i) + half;
      out[i] = {};
      if (tile < end_tile && unit < units) {
        out[i] = codes[(tile * all_units + first_unit + unit) * (kProductRows / kRows)];
      }
    }
  };
  std::int64_t tile = first_tile + thread / kWarpSize;
  int pair = 0;
  Codes now[Tile::kBatch];
  read(now, tile, pair);
  MakeWords<Tile, Words>(a, static_cast<int>(first_unit) * Tile::kUnit, pairs, n, memory.words);
  __syncthreads();

  typename Words::Sum sums[kRows];
  // Codes plus what makes those past the entries carry, rows 0 and 2, then 1 and 3; of few entries each row's.
  std::uint32_t carries[Tile::kNarrow ? kRows : 2] = {};
  const bool compare = Words::kBytes && w.entries < Tile::kEntries;
  const std::uint32_t carry =
      static_cast<std::uint32_t>(Tile::kEntries - w.entries) * (Tile::kNarrow ? 0x01010101u : 0x00010001u);
  while (tile < end_tile) {
    const bool last = pair + Tile::kBatch >= pairs;
    const std::int64_t next_tile = last ? tile + Tile::kWarps : tile;
    const int next_pair = last ? 0 : pair + Tile::kBatch;
    Codes next[Tile::kBatch];
    read(next, next_tile, next_pair);
#pragma unroll
    for (int i = 0; i < Tile::kBatch; ++i) {
      if (pair + i >= pairs) break;
      const std::uint32_t* words = memory.words + ((pair + i) * Tile::kUnit * 2 + half) * Tile::kEntries;
      std::uint32_t of_rows[Tile::kNarrow ? kRows : 1];
      if constexpr (Tile::kNarrow) {
        of_rows[0] = now[i].x, of_rows[1] = now[i].y, of_rows[2] = now[i].z, of_rows[3] = now[i].w;
      } else {
        of_rows[0] = now[i];
      }
#pragma unroll
      for (int j = 0; j < Tile::kUnit; ++j) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const std::uint32_t code =
              Tile::kNarrow ? of_rows[Tile::kNarrow ? r : 0] >> 4 * j & 15 : of_rows[0] >> 8 * r & 255;
          sums[r].Add(words[j * 2 * Tile::kEntries + code]);
        }
      }
      if (!compare) continue;
      if constexpr (Tile::kNarrow) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          carries[r] |= ((of_rows[r] & 0x0f0f0f0f) + carry) | ((of_rows[r] >> 4 & 0x0f0f0f0f) + carry);
        }
      } else {
        carries[0] |= (of_rows[0] & 0x00ff00ff) + carry;
        carries[1] |= (of_rows[0] >> 8 & 0x00ff00ff) + carry;
      }
    }
    if (last) {
      const std::int64_t padded = tiles * kProductRows;
#pragma unroll
      for (int r = 0; r < kRows; ++r) sums[r].AddOtherHalf();
      if constexpr (Words::kBytes) {
        bool damaged[kRows];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const std::uint32_t carried =
              Tile::kNarrow ? carries[Tile::kNarrow ? r : 0] & 0x10101010 : carries[r % 2] >> r / 2 * 16 & 0x100;
          damaged[r] = carried != 0;
          damaged[r] = __shfl_xor_sync(kWholeWarp, static_cast<int>(damaged[r]), kWarpSize / 2) != 0 || damaged[r];
        }
#pragma unroll
        for (int s = 0; s < Words::kSamples; ++s) {
          if (s / 2 != half || n + s >= a.samples) continue;
          std::uint32_t of_row[kRows];
#pragma unroll
          for (int r = 0; r < kRows; ++r) of_row[r] = damaged[r] ? Words::kDamaged : sums[r].Of(s);
          auto* part = static_cast<std::uint16_t*>(a.parts) + (split * a.samples + n + s) * padded;
          *reinterpret_cast<uint2*>(part + tile * kProductRows + row) = {of_row[0] | of_row[1] << 16,
                                                                         of_row[2] | of_row[3] << 16};
        }
      } else if (half == 0) {
        float* part = static_cast<float*>(a.parts) + (split * a.samples + n) * padded;
        *reinterpret_cast<float4*>(part + tile * kProductRows + row) = {sums[0].sum, sums[1].sum, sums[2].sum,
                                                                        sums[3].sum};
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) sums[r] = {};
#pragma unroll
      for (std::uint32_t& carried : carries) carried = 0;
    }
    tile = next_tile;
    pair = next_pair;
#pragma unroll
    for (int i = 0; i < Tile::kBatch; ++i) now[i] = next[i];
  }
}

template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1) ProductPanelsKernel(ProductMatmulCudaArgs a) {
  constexpr int kQuads = Tile::kQuads, kRows = Tile::kRows, kItems = Tile::kItems;
  auto& memory = SharedMemory<typename Tile::Memory>();
  const ProductWeight& w = a.weight;
  // 32 bits hold every number but those of elements.
  const int samples = static_cast<int>(a.samples), groups = (samples + Tile::kSamples - 1) / Tile::kSamples;
  const int block = static_cast<int>(blockIdx.x), splits = static_cast<int>(a.plan.splits);
  const int n = block % groups * Tile::kSamples, split = block / groups % splits;
  const int units = static_cast<int>(Units(w)), steps = static_cast<int>(a.plan.steps);
  const int begin = split * steps, end = min(begin + steps, units);
  const int tiles = static_cast<int>(Tiles(w)), first_tile = block / groups / splits * Tile::kTiles;
  const int thread = static_cast<int>(threadIdx.x), quad = thread % kQuads, slot = thread / kQuads;
  const int chunk = thread % Tile::kChunks;
  const int width = static_cast<int>(w.width), entries = static_cast<int>(w.entries);

  // Few entries: the lane has four rows of each of four tiles; else 16 of one.
  constexpr int kTilesOfLane = Tile::kNarrow ? kRows / 4 : 1, kLanesOfTile = kProductRows * kTilesOfLane / kRows;
  const int tile = first_tile + slot / kLanesOfTile * kTilesOfLane;
  const int row = slot % kLanesOfTile * (kRows / kTilesOfLane);
  const std::int64_t pitch = std::int64_t{units} * (Tile::kNarrow ? 4 * kProductRows : kProductRows);  // of a tile
  const std::uint8_t* own_codes = w.codes + tile * pitch + row * (Tile::kNarrow ? 4 : 1);
  using Codes = std::conditional_t<Tile::kNarrow || kRows == 16, uint4, uint2>;
  const auto codes_of = [&](int unit, int of_lane) {
    Codes codes{};
    if (unit < end && tile + of_lane < tiles) {
      codes = *reinterpret_cast<const Codes*>(own_codes + of_lane * pitch +
                                              std::int64_t{unit} * (Tile::kNarrow ? 4 * kProductRows : kProductRows));
    }
    return codes;
  };

  // So many units' columns of x are in memory.
  const int staged = Tile::kColumns / (Tile::kUnit * width);
  const auto stage = [&](int unit) {
    const int count = min(staged, end - unit) * Tile::kUnit * width * Tile::kSamples;
    float* to = reinterpret_cast<float*>(memory.x);
    WithInputs(a, [&](auto number) {
      const auto* x = static_cast<const decltype(number)*>(a.x);
#pragma unroll 2
      for (int i = thread; i < count; i += Tile::kThreads) {
        const int sample = min(n + i % Tile::kSamples, samples - 1), at = i / Tile::kSamples, j = at % width;
        const Entry entry = EntryAt(w, unit * Tile::kUnit + at / width, 0);
        to[i] = j < entry.width ? ToFloat(x[sample * w.columns + entry.column + j]) : 0.0f;
      }
    });
  };

  // A thread's entries of a unit's tables, whose numbers are read a unit before they are used. What a table ends with
  // past the columns counts as 0.
  struct Item {
    int slot, entry, table, segment, stage;  // the last three of the unit that is read next
    bool is;                                 // whether the weight has it
  };
  const int tables = static_cast<int>(Tables(w)), segments = max(1, static_cast<int>(w.segments));
  const int book_size = width * entries, last_width = static_cast<int>(w.columns) - (segments - 1) * width;
  Item items[kItems];
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int slot = (thread + i * Tile::kThreads) / kQuads, table = begin * Tile::kUnit + slot / Tile::kEntries;
    const int entry = slot % Tile::kEntries;
    items[i] = {slot, entry, table, table % segments, table / segments, slot < Tile::kSlots && entry < entries};
  }
  float ahead[kItems][kPanelWidth];
  const auto look_ahead = [&](int unit) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      Item& item = items[i];
      const float* numbers =
          w.codebooks + std::int64_t{w.books == 1 ? item.stage : item.table} * book_size + item.entry;
      const bool is = item.is && unit < end && item.table < tables;
      const int own = !is ? 0 : item.segment == segments - 1 ? last_width : width;
      const auto read = [&](int j) { ahead[i][j] = j < own ? __ldg(numbers + j * entries) : 0.0f; };
#pragma unroll
      for (int j = 0; j < kPanelWidth / 2; ++j) read(j);
      if (width > kPanelWidth / 2) {
#pragma unroll
        for (int j = kPanelWidth / 2; j < kPanelWidth; ++j) read(j);
      }
      item.table += Tile::kUnit;
      item.segment += Tile::kUnit;
      if (item.segment >= segments) item.segment = item.table % segments, item.stage = item.table / segments;
    }
  };
  int in_memory = 0;  // which of the units of x
  float4 products[kItems];
  const auto multiply = [&] {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (items[i].slot >= Tile::kSlots) continue;
      const float4* x = &memory.x[(in_memory * Tile::kUnit + items[i].slot / Tile::kEntries) * width][quad];
      float4 sum{0, 0, 0, 0};
      const auto add = [&](int j) {
        if (j >= width) return;
        const float4 input = x[j * kQuads];
        sum.x = fmaf(input.x, ahead[i][j], sum.x);
        sum.y = fmaf(input.y, ahead[i][j], sum.y);
        sum.z = fmaf(input.z, ahead[i][j], sum.z);
        sum.w = fmaf(input.w, ahead[i][j], sum.w);
      };
#pragma unroll
      for (int j = 0; j < kPanelWidth / 2; ++j) add(j);
      if (width > kPanelWidth / 2) {
#pragma unroll
        for (int j = kPanelWidth / 2; j < kPanelWidth; ++j) add(j);
      }
      // Its table is one before the one that is read next.
      const bool damaged = items[i].entry >= entries && items[i].table - Tile::kUnit < tables;
      const float nan = DamagedWeight();
      products[i] = damaged ? float4{nan, nan, nan, nan} : sum;
    }
  };
  // The lanes that write at once begin with different copies.
  const auto write = [&] {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (items[i].slot >= Tile::kSlots) continue;
#pragma unroll
      for (int copy = 0; copy < Tile::kCopies; ++copy) {
        memory.table[items[i].slot][(copy + items[i].slot) % Tile::kCopies * kQuads + quad] = products[i];
      }
    }
  };

  float sums[kRows][4] = {};
  const auto add = [&](int r, int at) {
    const float4 product = memory.table[at][chunk];
    sums[r][0] += product.x;
    sums[r][1] += product.y;
    sums[r][2] += product.z;
    sums[r][3] += product.w;
  };

  Codes now = codes_of(begin, 0);
  look_ahead(begin);
  stage(begin);
  __syncthreads();
  multiply();
  write();
  __syncthreads();
#pragma unroll 1
  for (int unit = begin; unit < end; ++unit) {
    look_ahead(unit + 1);
    if (++in_memory == staged && unit + 1 < end) {
      in_memory = 0;
      stage(unit + 1);
      __syncthreads();
    }
#pragma unroll
    for (int t = 0; t < kTilesOfLane; ++t) {
      const Codes next = t + 1 < kTilesOfLane ? codes_of(unit, t + 1) : codes_of(unit + 1, 0);
      std::uint32_t words[sizeof(Codes) / 4] = {now.x, now.y};
      if constexpr (sizeof(Codes) == 16) words[2] = now.z, words[3] = now.w;
#pragma unroll
      for (int i = 0; i < static_cast<int>(sizeof(Codes) / 4); ++i) {
        if constexpr (Tile::kNarrow) {
#pragma unroll
          for (int j = 0; j < Tile::kUnit; ++j) {
            add(4 * t + i, j * Tile::kEntries + static_cast<int>(words[i] >> 4 * j & 15));
          }
        } else {
#pragma unroll
          for (int j = 0; j < 4; ++j) add(4 * i + j, static_cast<int>(words[i] >> 8 * j & 255));
        }
      }
      now = next;
    }
    if (unit + 1 == end) break;
    multiply();
    __syncthreads();
    write();
    __syncthreads();
  }

#pragma unroll
  for (int t = 0; t < kTilesOfLane; ++t) {
    if (tile + t >= tiles) break;
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      const int sample = n + 4 * quad + s;
      if (sample >= samples) break;
      float* part = static_cast<float*>(a.parts) + (std::int64_t{split} * samples + sample) * tiles * kProductRows;
      float4* to = reinterpret_cast<float4*>(part + (tile + t) * kProductRows + row);
#pragma unroll
      for (int i = 0; i < kRows / kTilesOfLane / 4; ++i) {
        const int r = t * (kRows / kTilesOfLane) + 4 * i;
        to[i] = {sums[r][s], sums[r + 1][s], sums[r + 2][s], sums[r + 3][s]};
      }
    }
  }
}

// y from the parts: a warp adds every eighth of them, and one warp what the warps added.
template <typename Tile, typename Words>
__global__ void __launch_bounds__(Tile::kThreads) ProductSumKernel(ProductMatmulCudaArgs a) {
  constexpr std::uint32_t kDamaged = 0xffffffffu;
  using Sum = std::conditional_t<Words::kBytes, std::uint32_t, float>;
  auto& sums = SharedMemory<typename Tile::template Memory<Sum>>().sums;
  const ProductWeight& w = a.weight;
  const int lane = static_cast<int>(threadIdx.x) % Tile::kRows, part = static_cast<int>(threadIdx.x) / Tile::kRows;
  const std::int64_t r = std::int64_t{blockIdx.x} * Tile::kRows + lane, padded = Tiles(w) * kProductRows;
  for (std::int64_t n = blockIdx.y; n < a.samples; n += gridDim.y) {
    const auto* parts = static_cast<const typename Words::Part*>(a.parts) + n * padded + r;
    Sum sum = 0;
    bool damaged = false;
#pragma unroll 8
    for (std::int64_t split = part; split < a.plan.splits; split += Tile::kParts) {
      const auto number = parts[split * a.samples * padded];
      sum += number;
      if constexpr (Words::kBytes) damaged = damaged || number == Words::kDamaged;
    }
    if constexpr (Words::kBytes) sum = damaged ? kDamaged : sum;
    sums[part][lane] = sum;
    __syncthreads();
    if (part == 0 && r < w.rows) {
#pragma unroll
      for (int p = 1; p < Tile::kParts; ++p) {
        if constexpr (Words::kBytes) damaged = damaged || sums[p][lane] == kDamaged;
        sum += sums[p][lane];
      }
      float y;
      if constexpr (Words::kBytes) {
        y = damaged ? DamagedWeight() : fmaf(a.scales[n].scale, static_cast<float>(sum), a.scales[n].low);
      } else {
        y = sum;
      }
      if (a.bias != nullptr) y += a.bias[r];
      y = a.relu && y < 0 ? 0.0f : y;
      PutFloat(a.y, a.stored_as, n * w.rows + r, y);
    }
    __syncthreads();
  }
}

// lows and ranges: of equal numbers with different signs of 0 any may be the least, since what is added makes it +0.
template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads) ProductMeasureKernel(ProductMatmulCudaArgs a) {
  constexpr int kSamples = Tile::kSamples, kItems = Tile::kItems;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % Tile::kLanes;
  const int table = static_cast<int>(blockIdx.x) * Tile::kTables + thread / Tile::kLanes;
  const std::int64_t tables = Tables(a.weight);
  Entry entries[kItems];
  entries[0] = EntryAt(a.weight, table, lane);
#pragma unroll
  for (int i = 1; i < kItems; ++i) {
    entries[i] = entries[0];
    entries[i].numbers += i * Tile::kLanes;
    entries[i].width = lane + i * Tile::kLanes < a.weight.entries ? entries[0].inputs : 0;
  }
  for (std::int64_t n = std::int64_t{blockIdx.y} * kSamples; n < a.samples; n += std::int64_t{gridDim.y} * kSamples) {
    float low[kSamples], high[kSamples], nothing[kSamples], products[kItems][kSamples] = {};
    Multiply<true>(a, n, entries, products);
#pragma unroll
    for (int s = 0; s < kSamples; ++s) {
      low[s] = INFINITY, high[s] = -INFINITY, nothing[s] = 0;
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        if (lane + i * Tile::kLanes >= a.weight.entries) break;
        low[s] = fminf(low[s], products[i][s]);
        high[s] = fmaxf(high[s], products[i][s]);
        nothing[s] += products[i][s] - products[i][s];
      }
#pragma unroll
      for (int distance = Tile::kLanes / 2; distance > 0; distance /= 2) {
        low[s] = fminf(low[s], __shfl_xor_sync(kWholeWarp, low[s], distance));
        high[s] = fmaxf(high[s], __shfl_xor_sync(kWholeWarp, high[s], distance));
        nothing[s] += __shfl_xor_sync(kWholeWarp, nothing[s], distance);
      }
      if (lane != 0 || table >= tables || n + s >= a.samples) continue;
      a.lows[(n + s) * tables + table] = low[s] + nothing[s];
      a.ranges[(n + s) * tables + table] = high[s] - low[s] + nothing[s];
    }
  }
}

// ProductScaleOf for a sample without its low, a sum of one order, which ProductWordsKernel finds meanwhile.
template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads) ProductScaleKernel(ProductMatmulCudaArgs a) {
  const std::int64_t n = blockIdx.x, tables = Tables(a.weight);
  const std::uint32_t bits = LargestBits<Tile>(a.ranges + n * tables, tables);
  if (threadIdx.x != 0) return;
  const float range = __uint_as_float(bits);
  if (bits > 0x7f7fffffu) {
    a.scales[n] = {DamagedWeight(), DamagedWeight(), 0.0f};
  } else if (range < 0x1p-100f) {
    a.scales[n] = {0.0f, 0.0f, 0.0f};
  } else {
    a.scales[n] = {0.0f, range / 255, 255 / range};
  }
}

template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads) ProductDecodeKernel(ProductDecodeArgs a) {
  const ProductWeight& w = a.weight;
  const std::int64_t r = std::int64_t{blockIdx.x} * Tile::kThreads + threadIdx.x;
  if (r >= w.rows) return;
  for (std::int64_t segment = blockIdx.y; segment < w.segments; segment += gridDim.y) {
    float* out = a.dense + r * w.columns + segment * w.width;
    const std::int64_t width = min(w.width, w.columns - segment * w.width);
    for (std::int64_t j = 0; j < width; ++j) {
      float sum = 0;
#pragma unroll 1
      for (std::int64_t stage = 0; stage < w.stages; ++stage) {
        const std::int64_t table = stage * w.segments + segment;
        const int code = CodeAt(w, r, table);
        const Entry of_code = EntryAt(w, static_cast<int>(table), code);
        const float entry = code < w.entries ? of_code.numbers[j * w.entries] : DamagedWeight();
        sum = stage == 0 ? entry : sum + entry;
      }
      out[j] = sum;
    }
  }
}

}  // namespace

// ---- launchers

namespace {

// Multiprocessors of the devices that the plans are made for, about.
constexpr std::int64_t kBlocks = 132;

using WideWords = WordTile<false, 512>;
using NarrowWords = WordTile<true, 256>;

template <typename Run>
int WithWordTile(const ProductWeight& w, const Run& run) {
  return UnitOf(w) == 1 ? run(WideWords{}) : run(NarrowWords{});
}

// Few entries make cheap tables, so that blocks need not have many rows.
template <typename Run>
int WithPanelTile(const ProductWeight& w, const ProductCudaPlan& plan, const Run& run) {
  if (UnitOf(w) != 1) return plan.lanes == 4 ? run(PanelTile<true, 4, 256, 16>{}) : run(PanelTile<true, 8, 256, 16>{});
  return plan.lanes == 4 ? run(PanelTile<false, 4, 256, 16>{}) : run(PanelTile<false, 8, 512, 16>{});
}

}  // namespace

ProductCudaPlan ProductPlanCuda(const ProductWeight& w, std::int64_t samples, bool quantized) noexcept {
  const std::int64_t units = Units(w), tiles = Tiles(w);
  ProductCudaPlan plan{};
  const bool wide = UnitOf(w) == 1;
  if (quantized || samples <= (wide ? 2 : 3) || w.width > kPanelWidth) {
    plan.lanes = quantized && samples > 1 ? ByteWords<4>::kSamples : 1;
    plan.threads = wide ? WideWords::kThreads : NarrowWords::kThreads;
    const std::int64_t groups = CeilDiv(samples, plan.lanes), pairs = CeilDiv(units, 2);
    if (wide) {
      // A block makes its tables once, for all rows; as few rounds of blocks as their memory allows.
      const std::int64_t rounds = CeilDiv(pairs * groups, kBlocks * WideWords::kPairs);
      plan.steps = std::max<std::int64_t>(2, CeilDiv(pairs * groups, kBlocks * std::max<std::int64_t>(1, rounds)));
      plan.tiles = std::max<std::int64_t>(1, tiles);
    } else {
      constexpr std::int64_t kWarps = NarrowWords::kWarps;
      plan.steps = quantized ? 8 : 4;
      const std::int64_t wanted = tiles * groups * CeilDiv(pairs, plan.steps) / kBlocks / kWarps;
      plan.tiles = kWarps * std::min<std::int64_t>(4, std::max<std::int64_t>(1, wanted));
    }
    plan.splits = CeilDiv(pairs, plan.steps);
  } else {
    plan.lanes = samples <= 4 ? 4 : 8;
    plan.threads = wide && samples > 4 ? 512 : 256;
    plan.tiles = plan.threads * 4 / plan.lanes * 16 / kProductRows;
    const std::int64_t others = std::max<std::int64_t>(1, CeilDiv(samples, plan.lanes) * CeilDiv(tiles, plan.tiles));
    const std::int64_t splits = std::max<std::int64_t>(1, kBlocks / others);
    plan.steps = std::max<std::int64_t>(wide ? 4 : 2, CeilDiv(units, splits));
    plan.splits = CeilDiv(units, plan.steps);
  }
  plan.row_blocks = CeilDiv(tiles, plan.tiles);
  return plan;
}

std::int64_t ProductPartsBytes(const ProductWeight& w, const ProductCudaPlan& plan, std::int64_t samples,
                               bool quantized) noexcept {
  return plan.splits * samples * Tiles(w) * kProductRows * (quantized ? sizeof(std::uint16_t) : sizeof(float));
}

int ProductMatmulCuda(const ProductMatmulCudaArgs& a, void* stream) noexcept {
  const ProductWeight& w = a.weight;
  if (w.rows == 0 || a.samples == 0) return cudaSuccess;
  const bool quantized = a.scales != nullptr;
  const std::int64_t groups = CeilDiv(a.samples, a.plan.lanes);
  const std::int64_t shares = a.plan.splits * a.plan.row_blocks * groups + (quantized ? groups : 0);
  const dim3 blocks{BlocksOnX(shares), 1, 1};
  const dim3 sums{BlocksOnX(w.rows, SumTile::kRows), BlocksOnY(a.samples, 1), 1};
  const auto words = [&](auto kind) {
    return WithWordTile(w, [&](auto tile) {
      using Tile = decltype(tile);
      return Launch(ProductWordsKernel<Tile, decltype(kind)>, blocks, Tile::kThreads, stream, a);
    });
  };
  const auto panels = [&](auto tile) {
    using Tile = decltype(tile);
    return Launch(ProductPanelsKernel<Tile>, blocks, Tile::kThreads, stream, a);
  };
  const auto measure = [&](auto tile) {
    using Tile = decltype(tile);
    const dim3 tables{BlocksOnX(Tables(w), Tile::kTables), BlocksOnY(a.samples, Tile::kSamples), 1};
    return Launch(ProductMeasureKernel<Tile>, tables, Tile::kThreads, stream, a);
  };
  int error = cudaSuccess;
  if (quantized) {
    if (Tables(w) != 0) {
      const auto with_samples = [&](auto one, auto some) { return a.samples == 1 ? measure(one) : measure(some); };
      error = UnitOf(w) == 1 ? with_samples(MeasureTile<false, 1>{}, MeasureTile<false, 4>{})
                             : with_samples(MeasureTile<true, 1>{}, MeasureTile<true, 4>{});
    }
    if (error != cudaSuccess) return error;
    const dim3 all{BlocksOnX(a.samples), 1, 1};
    error = Launch(ProductScaleKernel<SampleTile>, all, SampleTile::kThreads, stream, a);
    if (error != cudaSuccess) return error;
    error = a.plan.lanes == 1 ? words(ByteWords<1>{}) : words(ByteWords<4>{});
  } else if (shares != 0) {
    error = a.plan.lanes == 1 ? words(FloatWords{}) : WithPanelTile(w, a.plan, panels);
  }
  if (error != cudaSuccess) return error;
  return quantized ? Launch(ProductSumKernel<SumTile, ByteWords<4>>, sums, SumTile::kThreads, stream, a)
                   : Launch(ProductSumKernel<SumTile, FloatWords>, sums, SumTile::kThreads, stream, a);
}

int ProductDecodeCuda(const ProductDecodeArgs& a, void* stream) noexcept {
  const ProductWeight& w = a.weight;
  if (w.rows == 0 || w.columns == 0) return cudaSuccess;
  const dim3 grid{BlocksOnX(w.rows, RowsTile::kThreads), BlocksOnY(w.segments, 1), 1};
  return Launch(ProductDecodeKernel<RowsTile>, grid, RowsTile::kThreads, stream, a);
}

}  // namespace tersetorch
