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
  void Prefetch(Index k) const { __builtin_prefetch(static_cast<const char*>(values) + 4 * k); }

  const void* values;
};

struct BFloat16Values {
  explicit BFloat16Values(const BlockedWeight& w) : values(w.values) {}
  float At(Index k) const { return LoadFloat(values, FloatDtype::kBFloat16, k); }
  void Prefetch(Index k) const { __builtin_prefetch(static_cast<const char*>(values) + 2 * k); }

  const void* values;
};

struct CodeValues {
  explicit CodeValues(const BlockedWeight& w)
      : codes(static_cast<const std::uint8_t*>(w.values)), codebook(w.codebook) {}
  float At(Index k) const { return LoadAt<float>(codebook, codes[k], 4); }
  void Prefetch(Index k) const { __builtin_prefetch(codes + k); }

  const std::uint8_t* codes;
  const float* codebook;
};

// The largest of codes[begin, end), which are not none.
std::uint32_t LargestByte(const void* codes, Index begin, Index end) {
  Bytes32 largest{};
  Index k = begin;
  for (; k + 32 <= end; k += 32) {
    const Bytes32 values = LoadAt<Bytes32>(codes, k, 1);
    largest = values > largest ? values : largest;
  }
  std::uint32_t result = 0;
  for (; k < end; ++k) {
    const std::uint32_t code = LoadAt<std::uint8_t>(codes, k, 1);
    result = code > result ? code : result;
  }
  for (int i = 0; i < 32; ++i) result = largest[i] > result ? largest[i] : result;
  return result;
}

// Four indices below a bound of at most 2^15 stay below 2^15 when what is missing from the bound to 2^15 is added.
struct Bound {
  explicit Bound(Index columns) : missing(static_cast<std::uint64_t>(0x8000 - columns) * 0x0001'0001'0001'0001) {}
  std::uint64_t Excess(std::uint64_t indices) const { return indices | (indices + missing); }
  static bool Broken(std::uint64_t excess) { return (excess & 0x8000'8000'8000'8000) != 0; }

  std::uint64_t missing;
};

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
  const bool codes_in_doubt = w.stored_as == BlockedValues::kCodes && w.entries < kBlockedMaxEntries && count != 0;
  return codes_in_doubt && LargestByte(w.values, b.begin, b.end) >= w.entries ? BlockedStatus::kBadCode
                                                                              : BlockedStatus::kOk;
}

// ---- sums

// Lines of the next column block's part of the panel, fetched into the second cache level a few at a time: the stream
// of weights has driven it out of there since the last row block.
struct Ahead {
  const char* line;
  Index lines_per_step;

  void Step() {
    for (Index i = 0; i < lines_per_step; ++i, line += 64) __builtin_prefetch(line, 0, 2);
  }
};

// Adds the non-zeros of kRows rows of a block, those with the most of them first, to the rows' sums. All rows advance
// together, because one row's additions wait for each other; a row's own order is that of its non-zeros, whatever its
// neighbours are. k is the first row's first non-zero; returns where the next row's begin, or -1 for a bad index.
template <int kLanes, int kWidth, int kRows, typename Values>
Index AddRows(const BlockedWeight& w, const Values& values, const Bound& bound, const float* panel,
              const std::int32_t* segments, Index k, float* sums) {
  constexpr int kVectors = kWidth / kLanes;
  // A core of 2023 fetches a cache line from its last level every 7 cycles at best, as long as it asks early enough.
  constexpr Index kAhead = 1024;  // non-zeros
  Vector<kLanes> acc[kRows][kVectors];
  Index begin[kRows], end[kRows];
  float* row_sums[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    const auto segment = LoadAt<std::uint32_t>(segments, r, 4);
    begin[r] = k;
    end[r] = k += segment & 0xffff;
    row_sums[r] = sums + (segment >> 16) * kWidth;
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) acc[r][v] = Load<Vector<kLanes>>(row_sums[r] + v * kLanes);
  }
  const auto add = [&](int r, Index at, Index column) __attribute__((always_inline)) {
    const float* x = panel + column * kWidth;
    const Vector<kLanes> value = Splat<kLanes>(values.At(at));
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) acc[r][v] += value * Load<Vector<kLanes>>(x + v * kLanes);
  };
  const Index shortest = end[kRows - 1] - begin[kRows - 1];
  Index fetched = begin[0] + kAhead;
  Index i = 0;
  for (; i + 4 <= shortest; i += 4) {
    values.Prefetch(fetched);
    __builtin_prefetch(reinterpret_cast<const char*>(w.indices) + 2 * fetched);
    fetched += 4 * kRows;
    std::uint64_t columns[kRows], excess = 0;
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      columns[r] = LoadAt<std::uint64_t>(w.indices, begin[r] + i, 2);
      excess |= bound.Excess(columns[r]);
    }
    if (Bound::Broken(excess)) return -1;
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) add(r, begin[r] + i + j, columns[r] >> 16 * j & 0xffff);
    }
  }
  for (; i < shortest; ++i) {
    std::uint64_t columns[kRows], excess = 0;
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      columns[r] = LoadAt<std::uint16_t>(w.indices, begin[r] + i, 2);
      excess |= bound.Excess(columns[r]) & 0xffff;
    }
    if (Bound::Broken(excess)) return -1;
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) add(r, begin[r] + i, columns[r]);
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    if (r + 1 < kRows) {
      for (Index at = begin[r] + shortest; at < end[r]; ++at) {
        const Index column = LoadAt<std::uint16_t>(w.indices, at, 2);
        if (Bound::Broken(bound.Excess(column) & 0xffff)) return -1;
        add(r, at, column);
      }
    }
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) Store(row_sums[r] + v * kLanes, acc[r][v]);
  }
  return k;
}

template <int kMaxLanes, int kWidth, typename Values>
BlockedStatus Multiply(const BlockedMatmulArgs& a, Index row_block) {
  constexpr int kLanes = kWidth < kMaxLanes ? kWidth : kMaxLanes;
  constexpr int kVectors = kWidth / kLanes;
  // Sums of 8 vectors hide the latency of an addition; few rows end at once, so that more of them help no further.
  constexpr int kRows = kVectors >= 8 ? 1 : kVectors >= 4 || (kVectors == 2 && kLanes == 16) ? 2 : 4;
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
    const Bound bound(b.columns);
    const Index next = j + 1 < column_blocks ? first + w.column_block : 0;
    const Index steps = b.end - b.begin < 16 * rows ? kBlockedRows * 64 : rows / kRows + 1;
    Ahead ahead{reinterpret_cast<const char*>(a.panel + next * kWidth),
                (w.columns - next < w.column_block ? w.columns - next : w.column_block) * kWidth / 16 / steps};
    Index k = b.begin, i = 0;
    for (; i + kRows <= rows && k < b.end; i += kRows) {
      ahead.Step();
      k = AddRows<kLanes, kWidth, kRows>(w, values, bound, panel, b.segments + i, k, a.sums);
      if (k < 0) return BlockedStatus::kBadIndex;
    }
    for (; i < rows && k < b.end; ++i) {
      k = AddRows<kLanes, kWidth, 1>(w, values, bound, panel, b.segments + i, k, a.sums);
      if (k < 0) return BlockedStatus::kBadIndex;
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
