// Codes as the operands of tensor cores: what the kernels of codebook_few_cuda.cu and codebook_tiles_cuda.cu share.
//
// Lane 4 g + t of a warp reads words 4 t to 4 t + 3 of a chunk of row g in one load. They are the codes of columns
// 16 s + 4 t + i, s the field and i the word, and a product may take its columns in any order that x has too: so word i
// of a step of 32 columns (bfloat16: fields 2 j and 2 j + 1) or 64 (int8: fields 4 j to 4 j + 3) is a word of a
// fragment as soon as its fields are looked up. Nothing moves between lanes.
//
// Kernels are made for codes of 4 and of 8 bits: one of 2 bits fills up to 4 in registers, and a chunk of them is two.
//
// Packed x: [samples][steps][4][4] words, word i of lane t of a step; zeros past the last column.
#pragma once

#include <cmath>
#include <type_traits>

#include "kernels/codebook_matmul/codebook_paths_cuda.h"
#include "kernels/common/cuda.cuh"
#include "kernels/common/tensor_cores.cuh"

namespace tersetorch {
namespace {

constexpr int kLanesOfRow = 4;
constexpr int kRowsOfSlot = kWarpSize / kLanesOfRow;

// A lane's four words of a chunk.
struct Words {
  std::uint32_t of[4];
};
__device__ inline Words LoadWords(const void* p) {
  const uint4 words = __ldg(static_cast<const uint4*>(p));
  return {{words.x, words.y, words.z, words.w}};
}

// Chunks of a row as the kernels count them.
__host__ __device__ inline int ChunksOfRow(const CodebookWeight& w) {
  return static_cast<int>(CodeChunks(w.columns, KernelBits(w.entries)));
}

// Where chunks lie that a kernel for codes of kBits counts.
template <int kBits>
struct ChunksOfCodes {
  __device__ explicit ChunksOfCodes(const CodebookWeight& w)
      : halves(kBits == 4 && CodeBits(w.entries) == 2),
        row_bytes(static_cast<std::uint32_t>(CodeChunks(w.columns, CodeBits(w.entries)) * kCodeChunkBytes)) {}

  __device__ std::uint32_t Begin(int chunk) const { return static_cast<std::uint32_t>(chunk) >> (halves ? 1 : 0) << 6; }
  // A chunk's word from the one that lies there.
  __device__ std::uint32_t Codes(std::uint32_t word, int chunk) const {
    if (kBits != 4 || !halves) return word;
    std::uint32_t codes = chunk % 2 == 0 ? word & 0xffffu : word >> 16;
    codes = (codes | codes << 8) & 0x00ff00ffu;
    codes = (codes | codes << 4) & 0x0f0f0f0fu;
    return (codes | codes << 2) & 0x33333333u;
  }

  bool halves;
  std::uint32_t row_bytes;
};
static_assert(kCodeChunkBytes == 1 << 6);

// A lane's words of kSlots slots of rows; rows past the last one are the last one.
template <int kSlots, int kBits>
struct CodesOfLane {
  __device__ CodesOfLane(const CodebookWeight& w, std::int64_t row_begin) : chunks(w) {
    const int lane = static_cast<int>(threadIdx.x % kWarpSize), g = lane / kLanesOfRow;
    const std::int64_t r = min(row_begin + g, w.rows - 1);
    most = static_cast<int>(min(w.rows - 1 - r, std::int64_t{kSlots * kRowsOfSlot}));
    words = w.codes + r * chunks.row_bytes + lane % kLanesOfRow * 16;
  }
  __device__ void Load(int chunk, Words (&to)[kSlots]) const {
    const std::uint8_t* begin = words + chunks.Begin(chunk);
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      const auto row = static_cast<std::uint32_t>(min(slot * kRowsOfSlot, most));
      to[slot] = LoadWords(begin + std::uint64_t{row} * chunks.row_bytes);
    }
  }
  // What was loaded, as codes; apart from loading, which nobody waits for.
  __device__ void Take(int chunk, const Words (&loaded)[kSlots], Words (&to)[kSlots]) const {
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
#pragma unroll
      for (int i = 0; i < 4; ++i) to[slot].of[i] = chunks.Codes(loaded[slot].of[i], chunk);
    }
  }

  ChunksOfCodes<kBits> chunks;
  int most;  // rows past the lane's first one
  const std::uint8_t* words;
};

// x of exact products: float32 as it lies, or packed; four numbers can be read at once.
struct FloatRows {
  __device__ explicit FloatRows(const CodebookMatmulCudaArgs& a)
      : data(static_cast<const float*>(a.packed != nullptr ? a.packed : a.x)),
        stride(a.packed != nullptr ? a.packed_stride / 4 : a.weight.columns) {}
  const float* data;
  std::int64_t stride;
};
__device__ inline float4 Four(const float* x) { return *reinterpret_cast<const float4*>(x); }

// ---- looking codes up

// Bits [kFirst, kFirst + kBits) of a word as an index into a table of words that has a column for each lane: every lane
// reads its own bank.
template <int kBits>
__device__ std::uint32_t Lookup(const std::uint32_t* table, std::uint32_t word, int first, std::uint32_t lane_bytes) {
  constexpr int kShift = 7;  // of an index to the bytes of its row, 4 * kWarpSize
  const std::uint32_t moved = first >= kShift ? word >> (first - kShift) : word << (kShift - first);
  const std::uint32_t at = (moved & (((1u << kBits) - 1) << kShift)) | lane_bytes;
  return *reinterpret_cast<const std::uint32_t*>(reinterpret_cast<const char*>(table) + at);
}

// The bits of entry k as bfloat16; a code without an entry is NaN, and so is what it is multiplied into.
__device__ inline std::uint32_t BFloat16Entry(const CodebookWeight& w, const float* table, std::uint32_t code) {
  return FromFloat<BFloat16>(code < w.entries ? table[code] : DamagedWeight()).bits;
}
__device__ inline const float* TableOfRow(const CodebookWeight& w, bool per_row, std::int64_t r) {
  return w.codebook + (per_row ? min(r, w.rows - 1) * w.entries : 0);
}

// ScaleOf of kernels/panels on the device.
struct TableScale {
  float scale, inverse;
};
__device__ inline TableScale ScaleOfLargest(std::uint32_t largest_bits) {
  if (largest_bits >= 0x7f800000u) return {DamagedWeight(), 0.0f};
  if (largest_bits < (127u - 100u) << 23) return {0.0f, 0.0f};
  const float largest = __uint_as_float(largest_bits);
  return {largest / 127.0f, 127.0f / largest};
}
__device__ inline std::uint32_t Quantized(float value, float inverse) {
  return inverse == 0 ? 0 : static_cast<std::uint32_t>(static_cast<int>(rintf(value * inverse))) & 0xffu;
}

// Of row r; every lane of the warp calls it.
__device__ inline TableScale ScaleOfRow(const CodebookWeight& w, std::int64_t r) {
  std::uint32_t largest = 0;
  if (w.per_row) {  // each lane for itself
    const float* values = TableOfRow(w, true, r);
    for (int k = 0; k < w.entries; ++k) largest = max(largest, __float_as_uint(values[k]) & 0x7fffffffu);
    return ScaleOfLargest(largest);
  }
  for (int k = static_cast<int>(threadIdx.x % kWarpSize); k < w.entries; k += kWarpSize) {
    largest = max(largest, __float_as_uint(w.codebook[k]) & 0x7fffffffu);
  }
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    largest = max(largest, __shfl_xor_sync(kWholeWarp, largest, distance));
  }
  return ScaleOfLargest(largest);
}

// ---- modes: words of codes to words of fragments, for kSlots slots of 8 rows a warp

template <int kCodeBits, bool kTableOfRow, int kSlots>
struct BFloat16Fragments {
  using Sum = float;
  static constexpr bool kMasks = true;  // what lies past the last column
  static constexpr int kBits = kCodeBits;
  static constexpr bool kPerRow = kTableOfRow;
  static constexpr int kStepColumns = 32, kSteps = 512 / kBits / kStepColumns;
  // One table for all rows is one of pairs, if it fits.
  static constexpr bool kPairs = !kPerRow && kBits <= 4;
  static constexpr int kIndexBits = kPairs ? 2 * kBits : kBits;
  static constexpr int kWordsOfSlot = kWarpSize << kIndexBits;

  // Words of shared memory for a block that has `slots` slots of rows.
  __host__ __device__ static constexpr int TableWords(int slots) { return kWordsOfSlot * (kPerRow ? slots : 1); }
  __device__ static void FillTable(const CodebookWeight& w, std::int64_t row_begin, int slots, std::uint32_t* table) {
    for (int i = static_cast<int>(threadIdx.x); i < TableWords(slots); i += static_cast<int>(blockDim.x)) {
      const int slot = i / kWordsOfSlot, lane = i % kWarpSize;
      const std::uint32_t index = static_cast<std::uint32_t>(i % kWordsOfSlot / kWarpSize);
      const float* values = TableOfRow(w, kPerRow, row_begin + slot * kRowsOfSlot + lane / kLanesOfRow);
      std::uint32_t word = BFloat16Entry(w, values, index & ((1u << kBits) - 1));
      if (kPairs) word |= BFloat16Entry(w, values, index >> kBits) << 16;
      table[i] = word;
    }
  }

  // Of a warp's first slot in the block's tables.
  __device__ static int TableOffset(int slot) { return kPerRow ? slot * kWordsOfSlot : 0; }

  __device__ BFloat16Fragments(const CodebookWeight&, std::int64_t) {}

  // A step's word of a fragment from a word of codes.
  __device__ std::uint32_t At(const std::uint32_t* table, std::uint32_t word, int slot, int step) const {
    const auto lane_bytes = static_cast<std::uint32_t>(threadIdx.x % kWarpSize * 4);
    if (kPairs) return Lookup<kIndexBits>(table, word, 2 * kBits * step, lane_bytes);
    const std::uint32_t* own = kPerRow ? table + slot * kWordsOfSlot : table;
    return __byte_perm(Lookup<kBits>(own, word, 2 * kBits * step, lane_bytes),
                       Lookup<kBits>(own, word, 2 * kBits * step + kBits, lane_bytes), 0x5410);
  }
  // The word without what lies past the last column: zeros would not do for x where an entry is infinite.
  __device__ static std::uint32_t Inside(std::uint32_t word, int first_column, int columns) {
    return first_column >= columns ? 0 : first_column + 16 >= columns ? word & 0xffffu : word;
  }

  __device__ static void Check(const CodebookWeight&, std::uint32_t, bool*) {}
};

template <int kCodeBits, bool kTableOfRow, int kSlots>
struct Int8Fragments {
  using Sum = int;
  static constexpr bool kMasks = false;
  static constexpr int kBits = kCodeBits;
  static constexpr bool kPerRow = kTableOfRow;
  static constexpr int kStepColumns = 64, kSteps = 512 / kBits / kStepColumns;
  static constexpr bool kInRegisters = kBits <= 4;
  static constexpr int kTables = kPerRow ? kSlots : 1, kRegisters = kInRegisters ? (1 << kBits) / 4 : 1;

  __host__ __device__ static constexpr int TableWords(int) { return kInRegisters ? 1 : kWarpSize << kBits; }
  // An entry stands in all four bytes of its word, so that a selection of bytes puts four of them together.
  __device__ static void FillTable(const CodebookWeight& w, std::int64_t, int slots, std::uint32_t* table) {
    if constexpr (!kInRegisters) {
      const float inverse = ScaleOfRow(w, 0).inverse;
      for (int i = static_cast<int>(threadIdx.x); i < TableWords(slots); i += static_cast<int>(blockDim.x)) {
        const int code = i / kWarpSize;
        table[i] = code < w.entries ? Quantized(w.codebook[code], inverse) * 0x01010101u : 0;
      }
    }
  }

  __device__ static int TableOffset(int) { return 0; }

  __device__ Int8Fragments(const CodebookWeight& w, std::int64_t row_begin) {
    if constexpr (kInRegisters) {
#pragma unroll
      for (int table = 0; table < kTables; ++table) {
        const auto lane = static_cast<int>(threadIdx.x % kWarpSize);
        const std::int64_t r = row_begin + table * kRowsOfSlot + lane / kLanesOfRow;
        const float inverse = ScaleOfRow(w, r).inverse;
        const float* values = TableOfRow(w, kPerRow, r);
#pragma unroll
        for (int k = 0; k < 4 * kRegisters; ++k) {
          if (k % 4 == 0) registers[table][k / 4] = 0;
          if (k < w.entries) registers[table][k / 4] |= Quantized(values[k], inverse) << 8 * (k % 4);
        }
      }
    }
  }

  __device__ std::uint32_t At(const std::uint32_t* table, std::uint32_t word, int slot, int step) const {
    const std::uint32_t* own = registers[kPerRow ? slot : 0];
    if constexpr (kBits == 4) {  // bytes by the lower three bits of a code from either half, then by its upper one
      const std::uint32_t codes = (word & 0x77777777u) >> 16 * step;
      const std::uint32_t halves = (((word >> 1) & 0x44444444u) | 0x32103210u) >> 16 * step;
      return __byte_perm(__byte_perm(own[0], own[1], codes), __byte_perm(own[2], own[3], codes), halves);
    } else {
      const auto lane_bytes = static_cast<std::uint32_t>(threadIdx.x % kWarpSize * 4);
      const std::uint32_t low =
          (Lookup<8>(table, word, 0, lane_bytes) & 0x000000ffu) | (Lookup<8>(table, word, 8, lane_bytes) & 0x0000ff00u);
      const std::uint32_t high = (Lookup<8>(table, word, 16, lane_bytes) & 0x00ff0000u) |
                                 (Lookup<8>(table, word, 24, lane_bytes) & 0xff000000u);
      return low | high;
    }
  }
  __device__ static std::uint32_t Inside(std::uint32_t word, int, int) { return word; }

  // Adds what is missing to a full table to every other field: a code without an entry carries.
  __device__ static void Check(const CodebookWeight& w, std::uint32_t word, bool* damaged) {
    constexpr std::uint32_t kFields = kBits == 4 ? 0x0f0f0f0fu : 0x00ff00ffu;
    constexpr std::uint32_t kOnes = kFields / ((1u << kBits) - 1);
    const std::uint32_t missing = ((1u << kBits) - static_cast<std::uint32_t>(w.entries)) * kOnes;
    if (missing == 0) return;
    const std::uint32_t carried = ((word & kFields) + missing) | ((word >> kBits & kFields) + missing);
    if ((carried & (kOnes << kBits)) != 0) *damaged = true;
  }

  std::uint32_t registers[kTables][kRegisters];
};

// The kernel that multiplies; its tables are there by the time that x is packed.
inline int LaunchMain(void (*kernel)(CodebookMatmulCudaArgs), dim3 blocks, dim3 threads, std::size_t bytes,
                      void* stream, const CodebookMatmulCudaArgs& a) {
  return a.packed != nullptr ? LaunchEarly(kernel, blocks, threads, bytes, stream, a)
                             : LaunchWithMemory(kernel, blocks, threads, bytes, stream, a);
}

// ---- results

__device__ inline std::uint32_t BitsOf(float value) { return __float_as_uint(value); }
__device__ inline std::uint32_t BitsOf(int value) { return static_cast<std::uint32_t>(value); }
template <typename Sum>
__device__ Sum SumOf(std::uint32_t bits) {
  if constexpr (std::is_same_v<Sum, float>) {
    return __uint_as_float(bits);
  } else {
    return static_cast<int>(bits);
  }
}

struct Output {
  __device__ void Store(std::int64_t n, std::int64_t r, float value) const {
    value = a.relu && value < 0 ? 0.0f : value;
    PutFloat(a.y, a.stored_as, Place(n, r), value);
  }
  __device__ std::int64_t Place(std::int64_t n, std::int64_t r) const {
    const std::int64_t rows = a.y_rows > 0 ? a.y_rows : a.weight.rows;
    if (a.plane == 0) return n * rows + r;
    const auto place = static_cast<std::uint32_t>(a.first_place + n), plane = static_cast<std::uint32_t>(a.plane);
    return (place / plane * rows + r) * a.plane + place % plane;
  }
  __device__ float Number(float sum, std::int64_t, std::int64_t r, float, bool) const { return sum + Bias(r); }
  __device__ float Number(int sum, std::int64_t n, std::int64_t r, float of_table, bool damaged) const {
    if (damaged) return DamagedWeight();
    const float of_sample = a.sample_scales[n];
    const float low = of_sample < of_table ? of_sample : of_table, high = of_sample < of_table ? of_table : of_sample;
    return fmaf(static_cast<float>(sum) * low, high, Bias(r));
  }
  __device__ float Bias(std::int64_t r) const { return a.bias == nullptr ? 0.0f : a.bias[r]; }

  const CodebookMatmulCudaArgs& a;
};

}  // namespace
}  // namespace tersetorch
