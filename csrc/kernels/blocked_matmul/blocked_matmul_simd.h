// The algorithm of every vector level, written once over vectors of `kLanes` floats. Everything here is local to the
// including file.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "kernels/blocked_matmul/blocked_matmul.h"
#include "kernels/common/vectors.h"

namespace tersetorch {
namespace {

// ---- weights: what is added to a row's sums for the value k and the panel's row x

template <int kLanes>
struct IntVectorOf {
  typedef std::int32_t Type __attribute__((vector_size(4 * kLanes)));
};
template <int kLanes>
using IntVector = typename IntVectorOf<kLanes>::Type;

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

// Two bfloat16 in a word, the first column in the lower half.
struct BFloat16PairValues {
  explicit BFloat16PairValues(const BlockedWeight& w) : values(w.values) {}
  void Prefetch(Index k) const { __builtin_prefetch(static_cast<const char*>(values) + 4 * k); }

  const void* values;
};

// Four int8 in a word, the first column in the lowest byte.
struct Int8QuadValues {
  explicit Int8QuadValues(const BlockedWeight& w) : values(w.values) {}
  void Prefetch(Index k) const { __builtin_prefetch(static_cast<const char*>(values) + 4 * k); }

  const void* values;
};

template <int kLanes, typename Values>
struct SumOf {
  using Type = Vector<kLanes>;
};
template <int kLanes>
struct SumOf<kLanes, Int8QuadValues> {
  using Type = IntVector<kLanes>;
};

template <int kLanes, int kVectors, typename Values>
  requires requires { &Values::At; }
inline __attribute__((always_inline)) void Add(const Values& values, Index k, const char* x,
                                               Vector<kLanes> (&sums)[kVectors]) {
  const Vector<kLanes> value = Splat<kLanes>(values.At(k));
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) sums[v] += value * LoadAt<Vector<kLanes>>(x, v * kLanes, 4);
}

#ifdef __AVX512BF16__

template <int kLanes, int kVectors>
inline __attribute__((always_inline)) void Add(const BFloat16PairValues& values, Index k, const char* x,
                                               Vector<kLanes> (&sums)[kVectors]) {
  const IntVector<kLanes> pair = LoadAt<std::int32_t>(values.values, k, 4) - IntVector<kLanes>{};
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
    const auto of_x = LoadAt<IntVector<kLanes>>(x, v * kLanes, 4);
    if constexpr (kLanes == 16) {
      sums[v] = (Vector<16>)_mm512_dpbf16_ps((__m512)sums[v], (__m512bh)of_x, (__m512bh)pair);
    } else {
      sums[v] = (Vector<8>)_mm256_dpbf16_ps((__m256)sums[v], (__m256bh)of_x, (__m256bh)pair);
    }
  }
}

#else

template <int kLanes, int kVectors>
inline __attribute__((always_inline)) void Add(const BFloat16PairValues& values, Index k, const char* x,
                                               Vector<kLanes> (&sums)[kVectors]) {
  const auto pair = LoadAt<std::uint32_t>(values.values, k, 4);
  const Vector<kLanes> low = Splat<kLanes>(__builtin_bit_cast(float, pair << 16));
  const Vector<kLanes> high = Splat<kLanes>(__builtin_bit_cast(float, pair & 0xffff0000));
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
    const auto of_x = LoadAt<IntVector<kLanes>>(x, v * kLanes, 4);
    sums[v] += low * (Vector<kLanes>)(of_x << 16);
    sums[v] += high * (Vector<kLanes>)(of_x & static_cast<std::int32_t>(0xffff0000));
  }
}

#endif

#ifdef __AVX512VNNI__

constexpr std::int32_t kQuadOffset = kBlockedUnsignedOffset;

template <int kLanes, int kVectors>
inline __attribute__((always_inline)) void Add(const Int8QuadValues& values, Index k, const char* x,
                                               IntVector<kLanes> (&sums)[kVectors]) {
  const IntVector<kLanes> quad = LoadAt<std::int32_t>(values.values, k, 4) - IntVector<kLanes>{};
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
    const auto of_x = LoadAt<IntVector<kLanes>>(x, v * kLanes, 4);
    if constexpr (kLanes == 16) {
      sums[v] = (IntVector<16>)_mm512_dpbusd_epi32((__m512i)sums[v], (__m512i)of_x, (__m512i)quad);
    } else {
      sums[v] = (IntVector<8>)_mm256_dpbusd_epi32((__m256i)sums[v], (__m256i)of_x, (__m256i)quad);
    }
  }
}

#else

constexpr std::int32_t kQuadOffset = 0;

// |w| * (q with w's sign): two such products are at most 2 * 128 * 127 < 2^15, so that none saturates.
template <int kLanes, int kVectors>
inline __attribute__((always_inline)) void Add(const Int8QuadValues& values, Index k, const char* x,
                                               IntVector<kLanes> (&sums)[kVectors]) {
  const __m256i quad = _mm256_set1_epi32(LoadAt<std::int32_t>(values.values, k, 4));
  const __m256i magnitude = _mm256_abs_epi8(quad);
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
    __m256i halves[kLanes / 8];
#pragma GCC unroll 2
    for (int i = 0; i < kLanes / 8; ++i) {
      const auto of_x = LoadAt<__m256i>(x, v * kLanes + i * 8, 4);
      const __m256i products = _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(of_x, quad));
      halves[i] = _mm256_madd_epi16(products, _mm256_set1_epi16(1));
    }
    IntVector<kLanes> all;
    __builtin_memcpy(&all, halves, sizeof all);
    sums[v] += all;
  }
}

#endif

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

// Adds the non-zeros of kRows rows of a block, of about the same number, to the rows' sums. All rows advance
// together, because one row's additions wait for each other; a row's own order is that of its non-zeros, whatever its
// neighbours are. k is the first row's first non-zero; returns where the next row's begin, or -1 for a bad index.
template <int kLanes, int kWidth, int kRows, typename Values>
Index AddRows(const BlockedWeight& w, const Values& values, const Bound& bound, const char* panel,
              const std::int32_t* segments, Index k, float* sums) {
  constexpr int kVectors = kWidth / kLanes;
  // A core of 2023 fetches a cache line from its last level every 7 cycles at best, as long as it asks early enough.
  constexpr Index kAhead = 1024;  // non-zeros
  typename SumOf<kLanes, Values>::Type acc[kRows][kVectors];
  Index begin[kRows], end[kRows];
  float* row_sums[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    const auto segment = LoadAt<std::uint32_t>(segments, r, 4);
    begin[r] = k;
    end[r] = k += segment & 0xffff;
    row_sums[r] = sums + (segment >> 16) * kWidth;
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      __builtin_memcpy(&acc[r][v], row_sums[r] + v * kLanes, sizeof acc[r][v]);
    }
  }
  Index shortest = end[0] - begin[0];
#pragma GCC unroll 4
  for (int r = 1; r < kRows; ++r) shortest = end[r] - begin[r] < shortest ? end[r] - begin[r] : shortest;
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
      for (int r = 0; r < kRows; ++r) {
        const std::uint64_t column = columns[r] >> 16 * j & 0xffff;
        Add<kLanes>(values, begin[r] + i + j, panel + column * (4 * kWidth), acc[r]);
      }
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
    for (int r = 0; r < kRows; ++r) Add<kLanes>(values, begin[r] + i, panel + columns[r] * (4 * kWidth), acc[r]);
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    for (Index at = begin[r] + shortest; at < end[r]; ++at) {
      const std::uint64_t column = LoadAt<std::uint16_t>(w.indices, at, 2);
      if (Bound::Broken(bound.Excess(column) & 0xffff)) return -1;
      Add<kLanes>(values, at, panel + column * (4 * kWidth), acc[r]);
    }
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) Store(row_sums[r] + v * kLanes, acc[r][v]);
  }
  return k;
}

constexpr bool IsInteger(const Int8QuadValues*) { return true; }
constexpr bool IsInteger(const void*) { return false; }

// The sums of no value: the bias, or what takes the offset of the panel's bytes back.
template <int kWidth, typename Values>
void Start(const BlockedMatmulArgs& a, Index row_begin, Index rows) {
  for (Index r = 0; r < rows; ++r) {
    Float8 start;
    if constexpr (IsInteger(static_cast<Values*>(nullptr))) {
      start = (Float8)(-kQuadOffset * LoadAt<std::int32_t>(a.row_sums, row_begin + r, 4) - Int8{});
    } else {
      start = Splat<8>(a.bias == nullptr ? 0.0f : LoadAt<float>(a.bias, row_begin + r, 4));
    }
    for (Index n = 0; n < kWidth; n += 8) Store(a.sums + r * kWidth + n, start);
  }
}

// Integer sums become numbers.
template <int kWidth, typename Values>
void Finish(const BlockedMatmulArgs& a, Index row_begin, Index rows) {
  if constexpr (IsInteger(static_cast<Values*>(nullptr))) {
    for (Index r = 0; r < rows; ++r) {
      const Float8 scale = Splat<8>(LoadAt<float>(a.row_scales, row_begin + r, 4));
      const Float8 bias = Splat<8>(a.bias == nullptr ? 0.0f : LoadAt<float>(a.bias, row_begin + r, 4));
      for (Index n = 0; n < kWidth; n += 8) {
        const auto sums = __builtin_convertvector((Int8)Load<Float8>(a.sums + r * kWidth + n), Float8);
        const Float8 other = LoadAt<Float8>(a.sample_scales, n, 4);
        const Float8 smaller = scale < other ? scale : other, larger = scale < other ? other : scale;
        Store(a.sums + r * kWidth + n, sums * smaller * larger + bias);
      }
    }
  }
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
  Start<kWidth, Values>(a, row_begin, rows);
  for (Index j = 0; j < column_blocks; ++j) {
    const Index block = row_block * column_blocks + j, first = j * w.column_block;
    const Block b{LoadAt<std::int32_t>(w.block_offsets, block, 4), LoadAt<std::int32_t>(w.block_offsets, block + 1, 4),
                  w.segments + row_begin * column_blocks + j * rows, rows,
                  w.columns - first < w.column_block ? w.columns - first : w.column_block};
    if (const BlockedStatus status = Check(w, b); status != BlockedStatus::kOk) return status;
    const char* panel = static_cast<const char*>(a.panel) + first * (4 * kWidth);
    const Bound bound(b.columns);
    const Index next = j + 1 < column_blocks ? first + w.column_block : 0;
    const Index steps = b.end - b.begin < 16 * rows ? kBlockedRows * 64 : rows / kRows + 1;
    Ahead ahead{static_cast<const char*>(a.panel) + next * (4 * kWidth),
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
  Finish<kWidth, Values>(a, row_begin, rows);
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
    case BlockedValues::kBFloat16Pairs:
      return Multiply<kMaxLanes, kWidth, BFloat16PairValues>(a, row_block);
    case BlockedValues::kInt8Quads:
      return Multiply<kMaxLanes, kWidth, Int8QuadValues>(a, row_block);
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
