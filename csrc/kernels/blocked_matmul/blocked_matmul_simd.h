// The algorithm of every vector level, written once over vectors of `kLanes` floats. Everything here is local to the
// including file.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "kernels/blocked_matmul/blocked_matmul.h"
#include "kernels/common/vectors.h"

namespace tersetorch {
namespace {

// ---- weights

struct Float32Values {
  explicit Float32Values(const BlockedWeight& w) : values(w.values) {}
  float At(Index k) const { return LoadAt<float>(values, k, 4); }

  const void* values;
};

struct BFloat16Values {
  explicit BFloat16Values(const BlockedWeight& w) : values(w.values) {}
  float At(Index k) const { return LoadFloat(values, FloatDtype::kBFloat16, k); }

  const void* values;
};

struct CodeValues {
  explicit CodeValues(const BlockedWeight& w)
      : codes(static_cast<const std::uint8_t*>(w.values)), codebook(w.codebook) {}
  float At(Index k) const { return LoadAt<float>(codebook, codes[k], 4); }

  const std::uint8_t* codes;
  const float* codebook;
};

// The largest of array[begin, end), 0 for none; V is a vector of unsigned numbers.
template <typename V>
std::uint32_t LargestOf(const void* array, Index begin, Index end) {
  constexpr Index kSize = sizeof(V{}[0]), kCount = sizeof(V) / kSize;
  V largest{};
  Index k = begin;
  for (; k + kCount <= end; k += kCount) {
    const V values = LoadAt<V>(array, k, kSize);
    largest = values > largest ? values : largest;
  }
  if (k < end) {
    V values{};
    __builtin_memcpy(&values, static_cast<const char*>(array) + k * kSize, static_cast<std::size_t>((end - k) * kSize));
    largest = values > largest ? values : largest;
  }
  std::uint32_t result = 0;
  for (Index i = 0; i < kCount; ++i) result = largest[i] > result ? largest[i] : result;
  return result;
}

struct Block {
  Index begin, end;              // its non-zeros
  const std::int32_t* segments;  // [rows]
  Index rows, columns;
};

BlockedStatus Check(const BlockedWeight& w, const Block& b) {
  if (b.begin < 0 || b.end < b.begin || b.end > w.nnz) return BlockedStatus::kBadOffsets;
  Bits8 counts{}, largest{};
  Index i = 0;
  for (; i + 8 <= b.rows; i += 8) {
    const Bits8 segment = LoadAt<Bits8>(b.segments, i, 4);
    counts += segment & 0xffff;
    largest = segment > largest ? segment : largest;
  }
  Index count = 0;
  std::uint32_t last = 0;
  for (int j = 0; j < 8; ++j) {
    count += counts[j];
    last = largest[j] > last ? largest[j] : last;
  }
  for (; i < b.rows; ++i) {
    const auto segment = LoadAt<std::uint32_t>(b.segments, i, 4);
    count += segment & 0xffff;
    last = segment > last ? segment : last;
  }
  if (count != b.end - b.begin || last >> 16 >= b.rows) return BlockedStatus::kBadSegment;
  if (count == 0) return BlockedStatus::kOk;
  if (LargestOf<Halves16>(w.indices, b.begin, b.end) >= b.columns) return BlockedStatus::kBadIndex;
  if (w.stored_as == BlockedValues::kCodes && LargestOf<Bytes32>(w.values, b.begin, b.end) >= w.entries) {
    return BlockedStatus::kBadCode;
  }
  return BlockedStatus::kOk;
}

// ---- sums

// Adds kCount non-zeros from k on; columns holds their indices, the first in the lowest 16 bits.
template <int kLanes, int kVectors, int kChains, int kCount, typename Values>
void Add(const Values& values, const float* panel, std::uint64_t columns, Index k, Vector<kLanes> (*sums)[kVectors]) {
#pragma GCC unroll 4
  for (int i = 0; i < kCount; ++i) {
    const float* x = panel + (columns >> 16 * i & 0xffff) * (kLanes * kVectors);
    const Vector<kLanes> value = Splat<kLanes>(values.At(k + i));
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sums[i % kChains][v] += value * Load<Vector<kLanes>>(x + v * kLanes);
  }
}

// Adds a row's non-zeros [k, end) to its sums.
template <int kLanes, int kWidth, typename Values>
void AddRow(const BlockedWeight& w, const Values& values, const float* panel, Index k, Index end, float* row_sums) {
  constexpr int kVectors = kWidth / kLanes;
  constexpr int kChains = kVectors >= 8 ? 1 : kVectors == 4 ? 2 : 4;  // against the latency of a fused multiply-add
  Vector<kLanes> sums[kChains][kVectors] = {};
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) sums[0][v] = Load<Vector<kLanes>>(row_sums + v * kLanes);
  for (; k + 4 <= end; k += 4) {
    Add<kLanes, kVectors, kChains, 4>(values, panel, LoadAt<std::uint64_t>(w.indices, k, 2), k, sums);
  }
  for (; k < end; ++k)
    Add<kLanes, kVectors, kChains, 1>(values, panel, LoadAt<std::uint16_t>(w.indices, k, 2), k, sums);
#pragma GCC unroll 2
  for (int half = kChains / 2; half > 0; half /= 2) {
#pragma GCC unroll 2
    for (int chain = 0; chain < half; ++chain) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sums[chain][v] += sums[chain + half][v];
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) Store(row_sums + v * kLanes, sums[0][v]);
}

template <int kMaxLanes, int kWidth, typename Values>
BlockedStatus Multiply(const BlockedMatmulArgs& a, Index row_block) {
  constexpr int kLanes = kWidth < kMaxLanes ? kWidth : kMaxLanes;
  const BlockedWeight& w = a.weight;
  const Values values(w);
  const Index column_blocks = (w.columns + w.column_block - 1) / w.column_block;
  const Index row_begin = row_block * kBlockedRows;
  const Index rows = w.rows - row_begin < kBlockedRows ? w.rows - row_begin : kBlockedRows;
  for (Index r = 0; r < rows; ++r) {
    const Float8 start = Splat<8>(a.bias == nullptr ? 0.0f : LoadAt<float>(a.bias, row_begin + r, 4));
    for (Index n = 0; n < kWidth; n += 8) Store(a.sums + r * kWidth + n, start);
  }
  for (Index j = 0; j < column_blocks; ++j) {
    const Index block = row_block * column_blocks + j, first = j * w.column_block;
    const Block b{LoadAt<std::int32_t>(w.block_offsets, block, 4), LoadAt<std::int32_t>(w.block_offsets, block + 1, 4),
                  w.segments + row_begin * column_blocks + j * rows, rows,
                  w.columns - first < w.column_block ? w.columns - first : w.column_block};
    if (const BlockedStatus status = Check(w, b); status != BlockedStatus::kOk) return status;
    const float* panel = a.panel + first * kWidth;
    Index k = b.begin;
    for (Index i = 0; i < rows && k < b.end; ++i) {
      const auto segment = LoadAt<std::uint32_t>(b.segments, i, 4);
      const Index end = k + (segment & 0xffff);
      AddRow<kLanes, kWidth>(w, values, panel, k, end, a.sums + (segment >> 16) * kWidth);
      k = end;
    }
  }
  if (a.relu) {
    for (Index i = 0; i < rows * kWidth; i += 8) {
      const Float8 sums = Load<Float8>(a.sums + i);
      Store(a.sums + i, sums < 0 ? Float8{} : sums);  // keeps NaN
    }
  }
  StoreTransposed<kWidth>(a.sums, rows, a.samples, a.y, a.y_stored_as, w.rows, row_begin);
  return BlockedStatus::kOk;
}

// ---- from the arguments to the template

template <int kMaxLanes, int kWidth>
BlockedStatus ForValues(const BlockedMatmulArgs& a, Index row_block) {
  switch (a.weight.stored_as) {
    case BlockedValues::kFloat32:
      return Multiply<kMaxLanes, kWidth, Float32Values>(a, row_block);
    case BlockedValues::kBFloat16:
      return Multiply<kMaxLanes, kWidth, BFloat16Values>(a, row_block);
    case BlockedValues::kCodes:
      break;
  }
  return Multiply<kMaxLanes, kWidth, CodeValues>(a, row_block);
}

template <int kMaxLanes>
BlockedStatus ForWidth(const BlockedMatmulArgs& a, Index row_block) noexcept {
  switch (a.width) {
    case 8:
      return ForValues<kMaxLanes, 8>(a, row_block);
    case 16:
      return ForValues<kMaxLanes, 16>(a, row_block);
    case 32:
      return ForValues<kMaxLanes, 32>(a, row_block);
    default:
      return ForValues<kMaxLanes, 64>(a, row_block);
  }
}

}  // namespace
}  // namespace tersetorch
