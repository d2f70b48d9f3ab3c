// What the vector levels share: the panels, the rows and what stands between the stored values and a level's expansion.
// A level brings its kernels, each of which multiplies runs of words; everything here is local to the including file.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "kernels/bitmap_matmul/bitmap_matmul.h"
#include "kernels/common/vectors.h"

namespace tersetorch {
namespace {

// ---- panels

// Where the expansion of a word leaves its 64 columns, as four vectors of 16. kBytes: vector p holds columns
// p, p + 4, p + 8, ... ; kHalves: vectors 2 h and 2 h + 1 hold the even and odd columns of half h.
enum class Order { kNatural, kBytes, kHalves };

int ColumnOf(Order order, int i) {
  if (order == Order::kBytes) return i % 16 * 4 + i / 16;
  if (order == Order::kHalves) return i / 32 * 32 + i % 16 * 2 + i / 16 % 2;
  return i;
}

// Samples for which kernels exist: a group of three runs as four.
Index PanelSamples(Index samples) { return samples == 3 ? 4 : samples; }

// Up to 64 floats from element `begin` on, then zeros.
void LoadWord(const void* x, FloatDtype stored_as, Index begin, Index count, float* to) {
  Index i = 0;
  for (; i + 8 <= count; i += 8) Store(to + i, LoadFloats(x, stored_as, begin + i));
  for (; i < count; ++i) to[i] = LoadFloat(x, stored_as, begin + i);
  for (; i < 64; ++i) to[i] = 0.0f;
}

constexpr std::int32_t kInfinity = 0x7f800000;

// The magnitudes' bits where they are above `largest`.
Int8 Larger(Int8 largest, Float8 x) {
  const Int8 bits = (Int8)x & 0x7fffffff;
  return bits > largest ? bits : largest;
}

std::int32_t Largest(Int8 v) {
  std::int32_t largest = 0;
  for (int i = 0; i < 8; ++i) largest = v[i] > largest ? v[i] : largest;
  return largest;
}

Index ColumnsInWord(Index columns, Index word) { return columns - word * 64 < 64 ? columns - word * 64 : 64; }

// Float32 [words][4 vectors][samples][16]; or x as the scalar level packs it, and true, where x is not all finite: an
// absent weight is no zero that would turn an infinity into NaN.
bool PackFloats(const BitmapSamplesArgs& a, Order order) {
  const Index samples = PanelSamples(a.samples);
  int column_of[64];
  for (int i = 0; i < 64; ++i) column_of[i] = ColumnOf(order, i);
  float* panel = static_cast<float*>(a.panel);
  alignas(64) float from[64];
  Int8 largest{};  // magnitude, compared as integers: infinities are above all numbers, and NaN above them
  for (Index word = 0; word < BitmapWords(a.columns); ++word) {
    for (Index n = 0; n < samples; ++n) {
      const Index count = n < a.samples ? ColumnsInWord(a.columns, word) : 0;
      LoadWord(a.x, a.x_stored_as, n * a.columns + word * 64, count, from);
      for (int p = 0; p < 4; ++p) {
        float* to = panel + ((word * 4 + p) * samples + n) * 16;
        if (order == Order::kNatural) {
          __builtin_memcpy(to, from + p * 16, 64);
        } else {
#pragma GCC unroll 16
          for (int i = 0; i < 16; ++i) to[i] = from[column_of[p * 16 + i]];
        }
      }
      for (int i = 0; i < 64; i += 8) largest = Larger(largest, Load<Float8>(from + i));
    }
  }
  if (Largest(largest) < kInfinity) return false;
  return kBitmapScalar.pack_samples(a);
}

// q + offset as bytes [words][samples][64], and the scales.
bool PackQuantized(const BitmapSamplesArgs& a, std::uint8_t offset) {
  const Index samples = PanelSamples(a.samples);
  auto* panel = static_cast<std::uint8_t*>(a.panel);
  alignas(64) float from[64];
  for (Index n = 0; n < samples; ++n) {
    float inverse = 0.0f;
    if (n < a.samples) {
      Int8 largest{};
      for (Index c = 0; c < a.columns; c += 64) {
        LoadWord(a.x, a.x_stored_as, n * a.columns + c, ColumnsInWord(a.columns, c / 64), from);
        for (int i = 0; i < 64; i += 8) largest = Larger(largest, Load<Float8>(from + i));
      }
      const BitmapScale scale = BitmapScaleOf(__builtin_bit_cast(float, Largest(largest)));
      a.x_scales[n] = scale.scale;
      inverse = scale.inverse;
    }
    for (Index word = 0; word < BitmapWords(a.columns); ++word) {
      const Index count = inverse == 0 ? 0 : ColumnsInWord(a.columns, word);
      LoadWord(a.x, a.x_stored_as, n * a.columns + word * 64, count, from);
      std::uint8_t* to = panel + (word * samples + n) * 64;
      for (int i = 0; i < 64; i += 8) {
        const Float8 scaled = Load<Float8>(from + i) * inverse;
        const Int8 q = (Int8)_mm256_cvtps_epi32((__m256)scaled) + static_cast<std::int32_t>(offset);
        Store(to + i, __builtin_convertvector((Bits8)q, Bytes8));
      }
    }
  }
  return false;
}

// ---- rows

// Whether codes lie below entries.
bool CodesInside(const std::uint8_t* codes, Index count, Index entries) {
  if (entries == kBitmapMaxEntries || count == 0) return true;
#ifdef __AVX512F__
  __m512i largest = _mm512_setzero_si512();
  Index k = 0;
  for (; k + 64 <= count; k += 64) largest = _mm512_max_epu8(largest, _mm512_loadu_si512(codes + k));
  const __mmask64 rest = (std::uint64_t{1} << (count - k)) - 1;
  largest = _mm512_max_epu8(largest, _mm512_maskz_loadu_epi8(rest, codes + k));
  return _mm512_cmpge_epu8_mask(largest, _mm512_set1_epi8(static_cast<char>(entries))) == 0;
#else
  __m256i largest = _mm256_setzero_si256();
  Index k = 0;
  for (; k + 32 <= count; k += 32) largest = _mm256_max_epu8(largest, LoadAt<__m256i>(codes, k, 1));
  const __m256i above = _mm256_max_epu8(largest, _mm256_set1_epi8(static_cast<char>(entries)));
  bool inside = k == 0 || _mm256_movemask_epi8(_mm256_cmpeq_epi8(above, largest)) == 0;
  for (; k < count; ++k) inside &= codes[k] < entries;
  return inside;
#endif
}

// Values as a kernel expands them.
template <typename Value>
BitmapStatus Decode(const BitmapWeight& w, Index k, Index count, Value* to) {
  __builtin_memcpy(to, static_cast<const Value*>(w.values) + k, count * sizeof(Value));
  return BitmapStatus::kOk;
}

template <>
BitmapStatus Decode(const BitmapWeight& w, Index k, Index count, float* to) {
  switch (w.stored_as) {
    case BitmapValues::kFloat32:
      __builtin_memcpy(to, static_cast<const float*>(w.values) + k, count * sizeof(float));
      break;
    case BitmapValues::kBFloat16:
      for (Index i = 0; i < count; ++i) to[i] = LoadFloat(w.values, FloatDtype::kBFloat16, k + i);
      break;
    case BitmapValues::kCodes: {
      const auto* codes = static_cast<const std::uint8_t*>(w.values) + k;
      if (!CodesInside(codes, count, w.entries)) return BitmapStatus::kBadCode;
      Index i = 0;
#ifdef __AVX512F__
      for (; i + 16 <= count; i += 16) {
        const __m512i indices = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i)));
        _mm512_storeu_ps(to + i, _mm512_i32gather_ps(indices, w.codebook, 4));
      }
#endif
      for (; i < count; ++i) to[i] = LoadAt<float>(w.codebook, codes[i], 4);
      break;
    }
    case BitmapValues::kInt8:
      for (Index i = 0; i < count; ++i) to[i] = static_cast<const std::int8_t*>(w.values)[k + i];
      break;
  }
  return BitmapStatus::kOk;
}

// A row whose offsets are sound.
struct Row {
  const void* bits;
  Index begin, end;  // its values
};

BitmapStatus FindRow(const BitmapWeight& w, Index r, Row& row) {
  const Index words = BitmapWords(w.columns);
  row = {w.bitmap + r * words, LoadAt<std::int32_t>(w.row_offsets, r, 4),
         LoadAt<std::int32_t>(w.row_offsets, r + 1, 4)};
  if (row.begin < 0 || row.end < row.begin || row.end > w.nnz) return BitmapStatus::kBadRowOffsets;
  if (w.columns % 64 != 0 && LoadAt<std::uint64_t>(row.bits, words - 1, 8) >> w.columns % 64 != 0) {
    return BitmapStatus::kBadBitmap;
  }
  return BitmapStatus::kOk;
}

// A kernel believes the bits, and reads up to 64 values past those it uses: whether no bits could lead it out of the
// stored values in this row.
bool IsFarFromEnd(const BitmapWeight& w, const Row& row) {
  return row.begin + (BitmapWords(w.columns) + 1) * 64 <= w.nnz;
}

// The sums of such rows.
template <int kRows, typename Kernel>
__attribute__((always_inline)) inline BitmapStatus SumRows(const Kernel& kernel, const BitmapWeight& w,
                                                           const Row (&rows)[kRows], const void* panel,
                                                           typename Kernel::Sum (*sums)[kBitmapMaxSamples]) {
  using Value = typename Kernel::Value;
  const void* bits[kRows];
  const Value* values[kRows];
  for (int i = 0; i < kRows; ++i) {
    bits[i] = rows[i].bits;
    values[i] = static_cast<const Value*>(w.values) + rows[i].begin;
  }
  typename Kernel::Accumulators accumulators[kRows] = {};
  kernel.template Run<kRows>(bits, BitmapWords(w.columns), values, panel, accumulators);
  for (int i = 0; i < kRows; ++i) {
    if (values[i] != static_cast<const Value*>(w.values) + rows[i].end) return BitmapStatus::kBadBitmap;
    const Index count = rows[i].end - rows[i].begin;
    if (!kernel.Revisit(values[i] - count, count, accumulators[i])) return BitmapStatus::kBadCode;
    Kernel::Finish(accumulators[i], sums[i]);
  }
  return BitmapStatus::kOk;
}

// The sums of a row near the end, or whose values have to be decoded first: through a stage on the stack, some words at
// a time.
template <typename Kernel>
BitmapStatus SumRowFromStage(const Kernel& kernel, const BitmapWeight& w, const Row& row, const void* panel,
                             typename Kernel::Sum* sums) {
  using Value = typename Kernel::Value;
  constexpr Index kStageWords = 16;
  alignas(64) Value stage[(kStageWords + 1) * 64];
  typename Kernel::Accumulators accumulators[1] = {};
  const Index words = BitmapWords(w.columns);
  Index k = row.begin;
  for (Index word = 0; word < words; word += kStageWords) {
    const Index some = words - word < kStageWords ? words - word : kStageWords;
    const void* bits[1] = {static_cast<const char*>(row.bits) + word * 8};
    Index count = 0;
    for (Index i = 0; i < some; ++i) count += __builtin_popcountll(LoadAt<std::uint64_t>(bits[0], i, 8));
    if (count > row.end - k) return BitmapStatus::kBadBitmap;
    if (const BitmapStatus status = Decode(w, k, count, stage); status != BitmapStatus::kOk) return status;
    const Value* values[1] = {stage};
    kernel.template Run<1>(bits, some, values, static_cast<const char*>(panel) + word * Kernel::kPanelWordBytes,
                           accumulators);
    if (!kernel.Revisit(stage, count, accumulators[0])) return BitmapStatus::kBadCode;
    k += count;
  }
  if (k != row.end) return BitmapStatus::kBadBitmap;
  Kernel::Finish(accumulators[0], sums);
  return BitmapStatus::kOk;
}

template <typename Sum>
void StoreRow(const BitmapMatmulArgs& a, Index r, const Sum* sums) {
  const BitmapWeight& w = a.weight;
  const float scale = w.stored_as == BitmapValues::kInt8 ? LoadAt<float>(w.scales, r, 4) : 1.0f;
  const float bias = a.bias == nullptr ? 0.0f : LoadAt<float>(a.bias, r, 4);
  for (Index n = 0; n < a.samples; ++n) {
    const float factor = a.quantized ? scale * a.x_scales[n] : scale;
    const float y = __builtin_fmaf(static_cast<float>(sums[n]), factor, bias);
    StoreFloat(a.y, a.y_stored_as, n * w.rows + r, a.relu && y < 0 ? 0.0f : y);
  }
}

// `decoded`: the kernel multiplies float32, and the values are stored in another way.
template <typename Kernel>
BitmapStatus MultiplyRows(const BitmapMatmulArgs& a, bool decoded, Index row_begin, Index row_end) {
  const BitmapWeight& w = a.weight;
  const Kernel kernel(w);
  typename Kernel::Sum sums[Kernel::kRows][kBitmapMaxSamples] = {};
  for (Index r = row_begin; r < row_end;) {
    Row rows[Kernel::kRows];
    if (const BitmapStatus status = FindRow(w, r, rows[0]); status != BitmapStatus::kOk) return status;
    if (decoded || !IsFarFromEnd(w, rows[0])) {
      if (const BitmapStatus status = SumRowFromStage(kernel, w, rows[0], a.panel, sums[0]);
          status != BitmapStatus::kOk) {
        return status;
      }
      StoreRow(a, r++, sums[0]);
      continue;
    }
    if constexpr (Kernel::kRows == 2) {
      if (r + 1 < row_end && FindRow(w, r + 1, rows[1]) == BitmapStatus::kOk && IsFarFromEnd(w, rows[1])) {
        if (const BitmapStatus status = SumRows<2>(kernel, w, rows, a.panel, sums); status != BitmapStatus::kOk) {
          return status;
        }
        StoreRow(a, r++, sums[0]);
        StoreRow(a, r++, sums[1]);
        continue;
      }
    }
    const Row alone[1] = {rows[0]};
    if (const BitmapStatus status = SumRows<1>(kernel, w, alone, a.panel, sums); status != BitmapStatus::kOk) {
      return status;
    }
    StoreRow(a, r++, sums[0]);
  }
  return BitmapStatus::kOk;
}

// MultiplyRows<Kernel<samples>> for the panel's samples.
template <template <int> typename Kernel>
BitmapStatus ForSamples(const BitmapMatmulArgs& a, bool decoded, Index row_begin, Index row_end) {
  if (a.samples == 1) return MultiplyRows<Kernel<1>>(a, decoded, row_begin, row_end);
  if (a.samples == 2) return MultiplyRows<Kernel<2>>(a, decoded, row_begin, row_end);
  return MultiplyRows<Kernel<4>>(a, decoded, row_begin, row_end);
}

// ---- columns

// What will be read next. The columns between are skipped, which the hardware prefetcher does not foresee.
struct Ahead {
  std::uintptr_t bits, values, value_bytes;  // addresses, and bytes of values in a word on average
};

Ahead AheadOf(const BitmapColumnsArgs& a, Index t, Index value_bytes) {
  const Index words = BitmapWords(a.weight.columns), column = a.active[t < a.count ? t : a.count - 1];
  const Index begin = LoadAt<std::int32_t>(a.weight.row_offsets, column, 4);
  const Index end = LoadAt<std::int32_t>(a.weight.row_offsets, column + 1, 4);
  return {reinterpret_cast<std::uintptr_t>(a.weight.bitmap + column * words),
          reinterpret_cast<std::uintptr_t>(a.weight.values) + static_cast<std::uintptr_t>(begin * value_bytes),
          static_cast<std::uintptr_t>((end - begin) * value_bytes / words)};
}

// Always inline: the compiler takes a function of hints alone for one without effect, and leaves its calls out. A
// column alone comes from a stage, which costs more than the memory does.
template <int kCount>
inline __attribute__((always_inline)) void PrefetchWord(const Ahead (&ahead)[kCount], Index word) {
  if (kCount == 1) return;
  const auto i = static_cast<std::uintptr_t>(word);
#pragma GCC unroll 2
  for (int r = 0; r < kCount; ++r) {
    if (i % 8 == 0) _mm_prefetch(reinterpret_cast<const char*>(ahead[r].bits + i * 8), _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(ahead[r].values + i * ahead[r].value_bytes), _MM_HINT_T0);
    if (ahead[r].value_bytes > 64) {
      _mm_prefetch(reinterpret_cast<const char*>(ahead[r].values + i * ahead[r].value_bytes + 64), _MM_HINT_T0);
    }
  }
}

// Adds words [word_begin, word_end) of the active columns to their sums, which lie in the kernel's order. A kernel's
// Add takes words of kCount columns as Run does, the first of them into `sums`, and the largest code it met.
template <typename Kernel>
BitmapStatus AddColumns(const BitmapColumnsArgs& a, bool decoded, Index word_begin, Index word_end) {
  using Value = typename Kernel::Value;
  constexpr Index kStageWords = 16;
  const BitmapWeight& w = a.weight;
  const Index words = BitmapWords(w.columns);
  const Kernel kernel(w);
  for (Index i = word_begin * 64; i < word_end * 64; ++i) a.sums[i] = 0.0f;
  Row rows[2];
  Index starts[2];
  // Where the values of a column's words from word_begin on start.
  const auto find = [&](Index t, int i) {
    if (const BitmapStatus status = FindRow(w, a.active[t], rows[i]); status != BitmapStatus::kOk) return status;
    starts[i] = rows[i].begin;
    for (Index word = 0; word < word_begin; ++word) {
      starts[i] += __builtin_popcountll(LoadAt<std::uint64_t>(rows[i].bits, word, 8));
    }
    return starts[i] <= rows[i].end ? BitmapStatus::kOk : BitmapStatus::kBadBitmap;
  };
  const auto sound = [&](int i, Index k) { return word_end == words ? k == rows[i].end : k <= rows[i].end; };
  for (Index t = 0; t < a.count;) {
    if (const BitmapStatus status = find(t, 0); status != BitmapStatus::kOk) return status;
    const bool pair = !decoded && t + 1 < a.count && IsFarFromEnd(w, rows[0]);
    if (pair) {
      if (const BitmapStatus status = find(t + 1, 1); status != BitmapStatus::kOk) return status;
    }
    if (pair && IsFarFromEnd(w, rows[1])) {
      const auto* all = static_cast<const Value*>(w.values);
      const Value* values[2] = {all + starts[0], all + starts[1]};
      const void* bits[2] = {static_cast<const char*>(rows[0].bits) + word_begin * 8,
                             static_cast<const char*>(rows[1].bits) + word_begin * 8};
      const float x[2] = {a.x[t], a.x[t + 1]};
      const Ahead ahead[2] = {AheadOf(a, t + 2, sizeof(Value)), AheadOf(a, t + 3, sizeof(Value))};
      kernel.template Add<2>(bits, word_end - word_begin, values, x, ahead, a.sums + word_begin * 64);
      for (int i = 0; i < 2; ++i) {
        if (!sound(i, values[i] - all)) return BitmapStatus::kBadBitmap;
        if (!kernel.AreInside(all + starts[i], values[i] - all - starts[i])) return BitmapStatus::kBadCode;
      }
      t += 2;
      continue;
    }
    alignas(64) Value stage[(kStageWords + 1) * 64];
    Index k = starts[0];
    for (Index word = word_begin; word < word_end; word += kStageWords) {
      const Index some = word_end - word < kStageWords ? word_end - word : kStageWords;
      const void* bits[1] = {static_cast<const char*>(rows[0].bits) + word * 8};
      Index count = 0;
      for (Index i = 0; i < some; ++i) count += __builtin_popcountll(LoadAt<std::uint64_t>(bits[0], i, 8));
      if (count > rows[0].end - k) return BitmapStatus::kBadBitmap;
      if (const BitmapStatus status = Decode(w, k, count, stage); status != BitmapStatus::kOk) return status;
      const Value* values[1] = {stage};
      const float x[1] = {a.x[t]};
      const Ahead ahead[1] = {};
      kernel.template Add<1>(bits, some, values, x, ahead, a.sums + word * 64);
      if (!kernel.AreInside(stage, count)) return BitmapStatus::kBadCode;
      k += count;
    }
    if (!sound(0, k)) return BitmapStatus::kBadBitmap;
    ++t;
  }
  for (Index i = word_begin * 64; i < word_end * 64; ++i) {
    const Index c = i / 64 * 64 + ColumnOf(Kernel::kOrder, static_cast<int>(i % 64));
    if (c >= w.columns) continue;
    const float y = a.sums[i] + (a.bias == nullptr ? 0.0f : LoadAt<float>(a.bias, c, 4));
    StoreFloat(a.y, a.y_stored_as, c, a.relu && y < 0 ? 0.0f : y);
  }
  return BitmapStatus::kOk;
}

}  // namespace
}  // namespace tersetorch
