// The algorithm of every vector level, written once over pieces of kCodeLanes words. Everything here is local to the
// including file.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "kernels/codebook_matmul/codebook_matmul.h"
#include "kernels/common/code_vectors.h"
#include "kernels/common/vectors.h"

namespace tersetorch {
namespace {

constexpr int kPieces = 16 / kCodeLanes;

// Whether a mode takes the products of two bfloat16 at once.
#ifdef __AVX512BF16__
constexpr bool kLevelHasPairs = true;
#else
constexpr bool kLevelHasPairs = false;
#endif
constexpr bool HasPairs(CodebookMode mode) { return kLevelHasPairs && mode == CodebookMode::kBFloat16; }

// ---- samples

// kColumns columns of sample n, 0 past its `count` columns and past the last sample.
template <int kColumns>
void LoadColumns(const CodebookSamplesArgs& a, Index n, Index begin, Index count, float* x) {
  if (n >= a.samples) count = 0;
  Index c = 0;
  for (; c + 8 <= count; c += 8) Store(x + c, LoadFloats(a.x, a.stored_as, n * a.columns + begin + c));
  for (; c < kColumns; ++c) x[c] = c < count ? LoadFloat(a.x, a.stored_as, n * a.columns + begin + c) : 0.0f;
}

// The words [8 half, 8 half + 8) of vector v of a chunk, of one sample's columns; in int8 they are added to `sum`.
template <int kBits, CodebookMode kMode>
TERSETORCH_INLINE Bits8 WordsOf(const float* x, float inverse, int v, int half, Int8& sum) {
  constexpr int kBytes = 8 / kBits;
  if constexpr (HasPairs(kMode)) {
    const auto at = [&](int vector) {
      return __builtin_convertvector(ToBFloat16(Load<Float8>(x + 16 * vector + 8 * half)), Bits8);
    };
    return at(v) | at(v + 16 / kBits) << 16;
  } else if constexpr (kMode != CodebookMode::kInt8) {
    const Float8 words = Load<Float8>(x + 16 * v + 8 * half);
    return (Bits8)(kMode == CodebookMode::kBFloat16 ? FromBFloat16(ToBFloat16(words)) : words);
  }
  Bits8 words{};
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const Float8 scaled = Load<Float8>(x + 16 * (j * kBytes + v) + 8 * half) * Splat<8>(inverse);
    const Int8 q = inverse == 0 ? Int8{} : (Int8)_mm256_cvtps_epi32((__m256)scaled);  // 0 times infinity is NaN
    sum += q;
    words |= ((Bits8)q & 0xff) << 8 * j;
  }
  return words;
}

template <int kBits, CodebookMode kMode, bool kFew>
void PackChunks(const CodebookSamplesArgs& a, Index chunk_begin, Index chunk_end) {
  constexpr Index kColumns = 512 / kBits;
  constexpr int kVectors = HasPairs(kMode) ? 16 / kBits : CodebookVectors(kBits, kMode);
  constexpr int kPacked = kFew ? 1 : 8;  // samples whose words lie beside each other are transposed
  constexpr bool kInteger = kMode == CodebookMode::kInt8;
  const Index of_block = CodeChunks(a.column_block, kBits);
  Int8 sums[kFew ? kCodebookFewSamples : kCodebookMaxWidth] = {};
  for (Index i = chunk_begin; i < chunk_end; ++i) {
    const Index in_block = i % of_block * kColumns, begin = i / of_block * a.column_block + in_block;
    Index count = a.columns - begin < a.column_block - in_block ? a.columns - begin : a.column_block - in_block;
    count = count < kColumns ? count : kColumns;
    for (Index n = 0; n < a.width; n += kPacked) {
      alignas(64) float x[kPacked][kColumns];
      float inverses[kPacked] = {};
      for (int j = 0; j < kPacked; ++j) {
        LoadColumns<kColumns>(a, n + j, begin, count, x[j]);
        if (kInteger && n + j < a.samples) inverses[j] = LoadAt<float>(a.inverses, n + j, 4);
      }
      char* to = static_cast<char*>(a.panel) + i * kVectors * 64 * a.width;
      for (int v = 0; v < kVectors; ++v, to += 64 * a.width) {
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          if constexpr (kFew) {
            Store(to + n * 64 + 32 * half, WordsOf<kBits, kMode>(x[0], inverses[0], v, half, sums[n]));
          } else {
            Float8 words[8];
#pragma GCC unroll 8
            for (int j = 0; j < 8; ++j) {
              words[j] = (Float8)WordsOf<kBits, kMode>(x[j], inverses[j], v, half, sums[n + j]);
            }
            Transpose(words);
#pragma GCC unroll 8
            for (int l = 0; l < 8; ++l) Store(to + ((8 * half + l) * a.width + n) * 4, words[l]);
          }
        }
      }
    }
  }
  for (Index n = 0; kInteger && n < a.samples; ++n) {
    std::int32_t sum = 0;
    for (int l = 0; l < 8; ++l) sum += sums[n][l];
    __atomic_fetch_add(a.sums + n, sum, __ATOMIC_RELAXED);
  }
}

template <int kBits, CodebookMode kMode>
void PackForWidth(const CodebookSamplesArgs& a, Index chunk_begin, Index chunk_end) {
  if (a.width <= kCodebookFewSamples) return PackChunks<kBits, kMode, true>(a, chunk_begin, chunk_end);
  PackChunks<kBits, kMode, false>(a, chunk_begin, chunk_end);
}

template <int kBits>
void PackForMode(const CodebookSamplesArgs& a, Index chunk_begin, Index chunk_end) {
#ifndef __AVX512BF16__
  if (a.mode == CodebookMode::kExact) return PackForWidth<kBits, CodebookMode::kExact>(a, chunk_begin, chunk_end);
  if (a.mode == CodebookMode::kInt8) return PackForWidth<kBits, CodebookMode::kInt8>(a, chunk_begin, chunk_end);
#endif
  PackForWidth<kBits, CodebookMode::kBFloat16>(a, chunk_begin, chunk_end);
}

void PackSamples(const CodebookSamplesArgs& a, Index chunk_begin, Index chunk_end) noexcept {
  if (a.bits == 2) return PackForMode<2>(a, chunk_begin, chunk_end);
  if (a.bits == 4) return PackForMode<4>(a, chunk_begin, chunk_end);
  PackForMode<8>(a, chunk_begin, chunk_end);
}

// ---- tables

struct TableScale {
  float scale, inverse;
};

// As ScaleOf in kernels/panels.
TableScale ScaleOfTable(const float* table, Index entries) {
  std::uint32_t largest = 0;
  for (Index k = 0; k < entries; ++k) {
    const std::uint32_t bits = LoadAt<std::uint32_t>(table, k, 4) & 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
  if (largest >= 0x7f800000) return {__builtin_nanf(""), 0.0f};
  if (largest < (127u - 100u) << 23) return {0.0f, 0.0f};
  const float magnitude = __builtin_bit_cast(float, largest);
  return {magnitude / 127.0f, 127.0f / magnitude};
}

// The tables of a weight, of which the first is made once where it is the only one.
template <typename Codes, int kBits>
class Tables {
 public:
  using Table = typename Codes::Table;

  explicit Tables(const CodebookMatmulArgs& args)
      : a_(args), alone_(!args.weight.per_row && args.weight.column_block >= args.weight.columns), first_(Make(0)) {}

  TERSETORCH_INLINE Table At(Index row, Index block) const {
    return alone_ ? first_ : Make(a_.weight.per_row ? row : block);
  }
  // What a row's integer sums are multiplied by.
  float Scale(Index row) const {
    const CodebookWeight& w = a_.weight;
    return w.per_row ? ScaleOfTable(w.codebook + row * w.entries, w.entries).scale : a_.table_scale;
  }

 private:
  Table Make(Index table) const {
    const CodebookWeight& w = a_.weight;
    const float* values = w.codebook + table * w.entries;
    CodeEntries entries;
    entries.Fill<kBits>(values, w.entries, a_.mode == CodebookMode::kBFloat16);
    if constexpr (Codes::kInteger) {
      return Table(entries, w.per_row ? ScaleOfTable(values, w.entries).inverse : a_.table_inverse);
    } else {
      return Table(entries);
    }
  }

  const CodebookMatmulArgs& a_;
  bool alone_;
  Table first_;
};

// ---- what codes a call met

// The largest of 8-bit codes. Of shorter ones all bits together, no less than the largest and the same where the table
// has a power of two entries.
template <int kBits>
struct CodesMet {
  TERSETORCH_INLINE void Add(CodeWords words) {
#ifdef __AVX512F__
    if constexpr (kBits == 8) words = (CodeWords)_mm512_max_epu8((__m512i)met, (__m512i)words);
#else
    if constexpr (kBits == 8) words = (CodeWords)_mm256_max_epu8((__m256i)met, (__m256i)words);
#endif
    met = kBits == 8 ? words : met | words;
  }
  std::uint32_t Largest() const {
    std::uint8_t bytes[sizeof met];
    Store(bytes, met);
    return LargestCode<kBits>(bytes, sizeof met);
  }

  CodeWords met;
};

// ---- few samples: weights decoded in registers, used for all of them

// Rows whose sums are kept while the panel is walked through, in parts that the first cache level holds.
constexpr Index kFewRows = 16;

// One sample has two sums a row, since an addition waits for the one before.
template <int kSamples>
constexpr int kSplit = kSamples == 1 ? 2 : 1;

// Rows taken together: as many sums as registers leave room for.
template <typename Codes, int kSamples>
constexpr int kTogether =
    Codes::kRows * kSamples * kSplit<kSamples> > kCodeLanes ? kCodeLanes / (kSamples * kSplit<kSamples>) : Codes::kRows;

// Loads once what several instructions take: the compiler would rather give each a load of its own, which are more than
// two a cycle.
template <typename T>
TERSETORCH_INLINE T InRegister(T value) {
  __asm__("" : "+v"(value));
  return value;
}

// The vector `s` of a chunk's weights with 0 past its `count` columns, where the first entry would be and may be NaN.
template <typename Codes, int kBits>
TERSETORCH_INLINE typename Codes::Sum Existing(typename Codes::Sum weights, int s, int piece, Index count) {
  if constexpr (Codes::kInteger) return weights;
  const CodeInts column = CodeLane() + (16 * s + piece * kCodeLanes);
  CodeInts there = column < static_cast<std::int32_t>(count);
  if constexpr (Codes::kVectors * kBits == 16) {  // pairs
    const CodeInts upper = column < static_cast<std::int32_t>(count) - 16 * Codes::kVectors;
    there = (there & 0xffff) | upper << 16;
  }
  return (typename Codes::Sum)((CodeInts)weights & there);
}

// Whether words whose codes begin at a byte are loaded there, which spares a shift. The last of them end past the
// chunk. Not for 8 samples, beside whose products shifts are few, nor with few registers.
template <typename Codes, int kBits, int kSamples>
constexpr bool kLoadsAtBytes = !Codes::kInteger && Codes::kVectors * kBits == 32 && kSamples < 8 && kCodeLanes == 16 &&
                               sizeof(typename Codes::State) == sizeof(CodeWords);

// A chunk of kRows rows that is whole and followed by another, or of which `count` columns exist.
template <typename Codes, int kBits, int kRows, int kSamples, bool kWhole>
TERSETORCH_INLINE void AddChunk(const typename Codes::Table (&tables)[kRows], const std::uint8_t* codes, Index stride,
                                const char* panel, Index count,
                                typename Codes::Sum (&sums)[kRows][kSamples][kSplit<kSamples>], CodesMet<kBits>& met) {
#pragma GCC unroll 2
  for (int piece = 0; piece < kPieces; ++piece) {
    typename Codes::State states[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const auto words = InRegister(LoadAt<CodeWords>(codes + r * stride, piece * kCodeLanes, 4));
      met.Add(words);
      states[r] = Codes::Begin(tables[r], words);
    }
#pragma GCC unroll 16
    for (int s = 0; s < Codes::kVectors; ++s) {
      typename Codes::Sum weights[kRows];
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        if constexpr (kWhole && kLoadsAtBytes<Codes, kBits, kSamples>) {
          constexpr int kOfByte = 8 / kBits;
          const std::uint8_t* const at = codes + r * stride + s / kOfByte;
          if (s % kOfByte == 0 && s > 0) states[r] = InRegister(LoadAt<CodeWords>(at, piece * kCodeLanes, 4));
          weights[r] = Codes::At(tables[r], states[r], s % kOfByte);
        } else {
          weights[r] = Codes::At(tables[r], states[r], s);
        }
        if constexpr (!kWhole) weights[r] = Existing<Codes, kBits>(weights[r], s, piece, count);
      }
#pragma GCC unroll 8
      for (int n = 0; n < kSamples; ++n) {
        auto x = LoadAt<typename Codes::Sum>(panel, (s * kSamples + n) * 16 + piece * kCodeLanes, 4);
        if constexpr (kRows > 1) x = InRegister(x);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          auto& sum = sums[r][n][s % kSplit<kSamples>];
          sum = Codes::Mac(sum, weights[r], x);
        }
      }
    }
  }
}

// Adds `columns` columns of kRows rows to `sums`; `ahead` is where the codes begin that are wanted next.
template <typename Codes, int kBits, int kRows, int kSamples>
void AddColumns(const typename Codes::Table* tables, bool per_row, const std::uint8_t* codes, Index stride,
                const std::uint8_t* ahead, const char* panel, Index columns, typename Codes::Sum (*sums)[kSamples],
                CodesMet<kBits>& met) {
  constexpr Index kColumns = 512 / kBits, kPanelBytes = Codes::kVectors * kSamples * 64;
  typename Codes::Table of_rows[kRows];
  typename Codes::Sum acc[kRows][kSamples][kSplit<kSamples>];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    of_rows[r] = tables[per_row ? r : 0];
#pragma GCC unroll 8
    for (int n = 0; n < kSamples; ++n) {
      acc[r][n][0] = sums[r][n];
      if constexpr (kSamples == 1) acc[r][n][1] = typename Codes::Sum{};
    }
  }
  CodesMet<kBits> here = met;
  // Chunks until memory answers: few of 8 samples, of fewer ones so many that what comes next here must be asked for.
  constexpr Index kAhead = 16;
  Index before = kSamples <= 4 && columns > kAhead * kColumns ? columns / kColumns - kAhead : 0;
  const std::uint8_t* wanted = before > 0 ? codes + kAhead * kCodeChunkBytes : ahead;
  constexpr Index kFollowing = kLoadsAtBytes<Codes, kBits, kSamples> ? 1 : 0;
  for (; columns >= kColumns + kFollowing; columns -= kColumns) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) __builtin_prefetch(wanted + r * stride);
    wanted = --before == 0 ? ahead : wanted + kCodeChunkBytes;
    AddChunk<Codes, kBits, kRows, kSamples, true>(of_rows, codes, stride, panel, kColumns, acc, here);
    codes += kCodeChunkBytes;
    panel += kPanelBytes;
  }
  if (columns > 0) AddChunk<Codes, kBits, kRows, kSamples, false>(of_rows, codes, stride, panel, columns, acc, here);
  met = here;
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int n = 0; n < kSamples; ++n) {
      if constexpr (kSamples == 1) acc[r][n][0] += acc[r][n][1];
      sums[r][n] = acc[r][n][0];
    }
  }
}

// Lane l of the result is the sum of the lanes of m[l].
template <typename Sum>
Sum Totals(Sum (&m)[kCodeLanes]) {
#ifdef __AVX512F__
  const auto ps = [](Sum v) { return (__m512)v; };
  const auto pd = [](Sum v) { return (__m512d)v; };
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    m[i] = (Sum)_mm512_unpacklo_ps(ps(m[2 * i]), ps(m[2 * i + 1])) +
           (Sum)_mm512_unpackhi_ps(ps(m[2 * i]), ps(m[2 * i + 1]));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    m[i] = (Sum)_mm512_unpacklo_pd(pd(m[2 * i]), pd(m[2 * i + 1])) +
           (Sum)_mm512_unpackhi_pd(pd(m[2 * i]), pd(m[2 * i + 1]));
  }
#pragma GCC unroll 3
  for (int i = 0; i < 3; ++i) {  // the third pair are the first two results
    const Sum a = m[i == 2 ? 0 : 2 * i], b = m[i == 2 ? 1 : 2 * i + 1];
    m[i == 2 ? 0 : i] = (Sum)_mm512_shuffle_f32x4(ps(a), ps(b), 0x88) + (Sum)_mm512_shuffle_f32x4(ps(a), ps(b), 0xdd);
  }
  return m[0];
#else
  const auto ps = [](Sum v) { return (__m256)v; };
  const auto pd = [](Sum v) { return (__m256d)v; };
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    m[i] = (Sum)_mm256_unpacklo_ps(ps(m[2 * i]), ps(m[2 * i + 1])) +
           (Sum)_mm256_unpackhi_ps(ps(m[2 * i]), ps(m[2 * i + 1]));
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    m[i] = (Sum)_mm256_unpacklo_pd(pd(m[2 * i]), pd(m[2 * i + 1])) +
           (Sum)_mm256_unpackhi_pd(pd(m[2 * i]), pd(m[2 * i + 1]));
  }
  return (Sum)_mm256_permute2f128_ps(ps(m[0]), ps(m[1]), 0x20) + (Sum)_mm256_permute2f128_ps(ps(m[0]), ps(m[1]), 0x31);
#endif
}

// y of an integer sum: the scales in an order that does not depend on which is the table's.
template <typename Ints, typename Floats>
TERSETORCH_INLINE Floats Scaled(Ints sum, Ints sample_sum, Floats one, Floats other, Floats bias) {
  const Floats smaller = one < other ? one : other, larger = one < other ? other : one;
  return __builtin_convertvector(sum - kCodeByteOffset * sample_sum, Floats) * smaller * larger + bias;
}

template <typename Codes, int kBits, int kSamples>
void StoreFew(const CodebookMatmulArgs& a, const Tables<Codes, kBits>& tables,
              const typename Codes::Sum (*sums)[kSamples], Index row, Index rows) {
  alignas(64) float bias[kFewRows] = {}, scales[kFewRows] = {}, y[kFewRows];
  for (Index r = 0; r < rows; ++r) {
    if (a.bias != nullptr) bias[r] = LoadAt<float>(a.bias, row + r, 4);
    if constexpr (Codes::kInteger) scales[r] = tables.Scale(row + r);
  }
  for (Index n = 0; n < a.samples; ++n) {
    for (Index i = 0; i < kFewRows; i += kCodeLanes) {
      typename Codes::Sum m[kCodeLanes];
#pragma GCC unroll 16
      for (int l = 0; l < kCodeLanes; ++l) m[l] = sums[i + l][n];
      const auto total = Totals(m);
      CodeFloats value;
      if constexpr (Codes::kInteger) {
        const CodeInts sample_sum = LoadAt<std::int32_t>(a.sample_sums, n, 4) - CodeInts{};
        value = Scaled(total, sample_sum, Load<CodeFloats>(scales + i),
                       Splat<kCodeLanes>(LoadAt<float>(a.sample_scales, n, 4)), Load<CodeFloats>(bias + i));
      } else {
        value = total + Load<CodeFloats>(bias + i);
      }
      Store(y + i, a.relu ? (value < 0 ? CodeFloats{} : value) : value);  // keeps NaN
    }
    const Index to = CodebookPlace(a, n, row), step = a.places == nullptr ? 1 : a.place_step;
    Index r = 0;
    for (; step == 1 && r + 8 <= rows; r += 8) StoreFloats(a.y, a.y_stored_as, to + r, Load<Float8>(y + r));
    for (; r < rows; ++r) StoreFloat(a.y, a.y_stored_as, to + r * step, y[r]);
  }
}

template <typename Codes, int kBits, int kSamples>
void Few(const CodebookMatmulArgs& a, Index row_begin, Index row_end, Index row_bytes, CodesMet<kBits>& met) {
  constexpr int kRows = kTogether<Codes, kSamples>;
  constexpr Index kColumns = 512 / kBits, kPanelBytes = Codes::kVectors * kSamples * 64;
  constexpr Index kDepth = kPanelBytes > 24576 ? 1 : 24576 / kPanelBytes;
  const CodebookWeight& w = a.weight;
  const Tables<Codes, kBits> tables(a);
  for (Index row = row_begin; row < row_end; row += kFewRows) {
    const Index rows = row_end - row < kFewRows ? row_end - row : kFewRows;
    typename Codes::Table of_rows[kFewRows];
    for (Index r = 0; w.per_row && r < rows; ++r) of_rows[r] = tables.At(row + r, 0);
    typename Codes::Sum sums[kFewRows][kSamples] = {};
    const std::uint8_t* codes = w.codes + row * row_bytes;
    const std::uint8_t* const last = codes + row_bytes;
    const char* panel = static_cast<const char*>(a.panel);
    for (Index block = 0, first = 0; first < w.columns; ++block, first += w.column_block) {
      if (!w.per_row) of_rows[0] = tables.At(row, block);
      Index left = w.columns - first < w.column_block ? w.columns - first : w.column_block;
      while (left > 0) {
        const Index columns = left < kDepth * kColumns ? left : kDepth * kColumns;
        const Index chunks = (columns + kColumns - 1) / kColumns;
        const std::uint8_t* const next = codes + chunks * kCodeChunkBytes;
        // What is wanted after the last rows here: the first ones' next columns, or the rows after them.
        const std::uint8_t* const first_rows = next < last ? next : last + (kFewRows - 1) * row_bytes;
        const auto add = [&]<int kCount>(Index r) {
          const std::uint8_t* const here = codes + r * row_bytes;
          const std::uint8_t* const ahead = r + kCount < rows ? here + kCount * row_bytes : first_rows;
          AddColumns<Codes, kBits, kCount, kSamples>(of_rows + (w.per_row ? r : 0), w.per_row, here, row_bytes, ahead,
                                                     panel, columns, sums + r, met);
        };
        Index r = 0;
        for (; r + kRows <= rows; r += kRows) add.template operator()<kRows>(r);
        for (; r < rows; ++r) add.template operator()<1>(r);
        left -= columns;
        codes = next;
        panel += chunks * kPanelBytes;
      }
    }
    StoreFew<Codes, kBits, kSamples>(a, tables, sums, row, rows);
  }
}

// ---- many samples: tiles of decoded rows, whose words meet panels

// Word k of x is the panel's k-th row, or lies offsets[k] words from its begin. A call of its own: where it is part of
// another the compiler leaves sums in memory.
template <typename Codes, int kRows, int kVectors, int kWidth, bool kApart>
__attribute__((noinline)) void AddTile(const char* tile, Index tile_bytes, const char* panel, const Index* offsets,
                                       Index words, float* sums) {
  typename Codes::Sum acc[kRows][kVectors];
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) acc[r][v] = LoadAt<typename Codes::Sum>(sums, r * kWidth + v * kCodeLanes, 4);
  }
  for (Index k = 0; k < words; ++k) {
    typename Codes::Sum x[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      x[v] = LoadAt<typename Codes::Sum>(panel, (kApart ? offsets[k] : k * kWidth) + v * kCodeLanes, 4);
    }
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      const auto word = LoadAt<decltype(+typename Codes::Sum{}[0])>(tile + r * tile_bytes, k, 4);
      const typename Codes::Sum w = word - typename Codes::Sum{};
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[r][v] = Codes::Mac(acc[r][v], w, x[v]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) Store(sums + r * kWidth + v * kCodeLanes, acc[r][v]);
  }
}

template <typename Codes, int kBits>
TERSETORCH_INLINE void DecodeChunk(const typename Codes::Table& table, const std::uint8_t* codes, Index count, char* to,
                                   CodesMet<kBits>& met) {
#pragma GCC unroll 2
  for (int piece = 0; piece < kPieces; ++piece) {
    const auto words = LoadAt<CodeWords>(codes, piece * kCodeLanes, 4);
    met.Add(words);
    const auto state = Codes::Begin(table, words);
#pragma GCC unroll 16
    for (int s = 0; s < Codes::kVectors; ++s) {
      typename Codes::Sum weights = Codes::At(table, state, s);
      if (count < 512 / kBits) weights = Existing<Codes, kBits>(weights, s, piece, count);
      Store(to + s * 64 + piece * kCodeLanes * 4, weights);
    }
  }
}

template <int kWidth>
void Finish(const CodebookMatmulArgs& a, bool integer, Index row, float scale, float* sums) {
  const Float8 bias = Splat<8>(a.bias == nullptr ? 0.0f : LoadAt<float>(a.bias, row, 4));
  for (Index n = 0; n < kWidth; n += 8) {
    Float8 y = Load<Float8>(sums + n);
    if (integer) {
      y = Scaled((Int8)y, LoadAt<Int8>(a.sample_sums, n, 4), Splat<8>(scale), LoadAt<Float8>(a.sample_scales, n, 4),
                 bias);
    } else {
      y += bias;
    }
    Store(sums + n, a.relu ? (y < 0 ? Float8{} : y) : y);  // keeps NaN
  }
}

// Rows of sums [rows][width] to where the samples' places are, eight at once where they lie side by side.
inline void StoreAtPlaces(const CodebookMatmulArgs& a, const float* sums, Index width, Index row_begin, Index rows) {
  for (Index n = 0; n < a.samples; n += 8) {
    const Index count = a.samples - n < 8 ? a.samples - n : 8;
    bool whole = count == 8 && a.places[n] >= 0;
    for (Index i = 1; i < count; ++i) whole &= a.places[n + i] - a.places[n] == i;
    for (Index r = 0; r < rows; ++r) {
      const float* from = sums + r * width + n;
      if (whole) {
        StoreFloats(a.y, a.y_stored_as, CodebookPlace(a, n, row_begin + r), Load<Float8>(from));
        continue;
      }
      for (Index i = 0; i < count; ++i) {
        if (a.places[n + i] < 0) continue;
        StoreFloat(a.y, a.y_stored_as, CodebookPlace(a, n + i, row_begin + r), Load<float>(from + i));
      }
    }
  }
}

template <typename Codes, int kBits, int kWidth, bool kApart = false>
void Many(const CodebookMatmulArgs& a, Index row_begin, Index row_end, Index row_bytes, CodesMet<kBits>& met) {
  constexpr int kMost = kCodeLanes == 16 ? 4 : 2, kOfWidth = kWidth / kCodeLanes;
  constexpr int kVectors = kOfWidth < kMost ? kOfWidth : kMost;
  constexpr int kRows = kCodeLanes == 8 ? (Codes::kInteger ? 4 : 6) : kVectors == 4 ? 6 : kVectors == 3 ? 8 : 12;
  // Chunks whose part of the panel and whose decoded rows leave a quarter of the first cache level.
  constexpr Index kChunkWords = Codes::kVectors * 16, kColumns = 512 / kBits;
  constexpr Index kFitting = 36864 / ((kWidth + kRows) * kChunkWords * 4), kDepth = kFitting > 0 ? kFitting : 1;
  constexpr Index kTileBytes = kDepth * kChunkWords * 4;
  alignas(64) char tile[kRows * kTileBytes] = {};
  using Table = typename Codes::Table;
  static_assert(sizeof(Table) <= kCodebookTableBytes);
  const CodebookWeight& w = a.weight;
  const Tables<Codes, kBits> tables(a);
  const Index rows = row_end - row_begin;
  for (Index i = 0; i < (rows + kRows - 1) * kWidth; i += 8) Store(a.sums + i, Float8{});
  float* const of_rows = a.sums + kCodebookSumRows * kWidth;
  for (Index r = 0; w.per_row && r < rows; ++r) {
    Store(reinterpret_cast<char*>(of_rows) + r * sizeof(Table), tables.At(row_begin + r, 0));
  }
  Table table;
  const std::uint8_t* codes = w.codes + row_begin * row_bytes;
  const char* panel = static_cast<const char*>(a.panel);
  const Index* offsets = a.offsets;
  for (Index block = 0, first = 0; first < w.columns; ++block, first += w.column_block) {
    if (!w.per_row) table = tables.At(row_begin, block);
    Index left = w.columns - first < w.column_block ? w.columns - first : w.column_block;
    while (left > 0) {
      const Index columns = left < kDepth * kColumns ? left : kDepth * kColumns;
      const Index chunks = (columns + kColumns - 1) / kColumns;
      const Index of_last = columns - (chunks - 1) * kColumns;
      const Index words = (chunks - 1) * kChunkWords + (of_last < kChunkWords ? of_last : kChunkWords);
      for (Index i = 0; i < rows; i += kRows) {
        for (Index r = i; r < i + kRows && r < rows; ++r) {
          if (w.per_row) table = LoadAt<Table>(of_rows, r, sizeof(Table));
          const std::uint8_t* chunk = codes + r * row_bytes;
          char* to = tile + (r - i) * kTileBytes;
          for (Index c = 1; c < chunks; ++c, chunk += kCodeChunkBytes, to += kChunkWords * 4) {
            __builtin_prefetch(chunk + 2 * kRows * row_bytes);
            DecodeChunk<Codes, kBits>(table, chunk, kColumns, to, met);
          }
          __builtin_prefetch(chunk + 2 * kRows * row_bytes);
          DecodeChunk<Codes, kBits>(table, chunk, of_last, to, met);
        }
#pragma GCC unroll 1
        for (Index v = 0; v < kOfWidth; v += kVectors) {
          AddTile<Codes, kRows, kVectors, kWidth, kApart>(tile, kTileBytes, panel + v * kCodeLanes * 4, offsets, words,
                                                          a.sums + i * kWidth + v * kCodeLanes);
        }
      }
      left -= columns;
      codes += chunks * kCodeChunkBytes;
      if constexpr (kApart) {
        offsets += columns;
      } else {
        panel += chunks * kChunkWords * kWidth * 4;
      }
    }
  }
  for (Index r = 0; r < rows; ++r) {
    Finish<kWidth>(a, Codes::kInteger, row_begin + r, Codes::kInteger ? tables.Scale(row_begin + r) : 0.0f,
                   a.sums + r * kWidth);
  }
  if (a.places == nullptr) {
    StoreTransposed<kWidth>(a.sums, rows, a.samples, a.y, a.y_stored_as, w.rows, row_begin);
  } else {
    StoreAtPlaces(a, a.sums, kWidth, row_begin, rows);
  }
}

// ---- from the arguments to the templates

template <typename Codes, int kBits>
void ForWidth(const CodebookMatmulArgs& a, Index row_begin, Index row_end, Index row_bytes, CodesMet<kBits>& met) {
  switch (a.width) {
    case 1:
      return Few<Codes, kBits, 1>(a, row_begin, row_end, row_bytes, met);
    case 2:
      return Few<Codes, kBits, 2>(a, row_begin, row_end, row_bytes, met);
    case 4:
      return Few<Codes, kBits, 4>(a, row_begin, row_end, row_bytes, met);
    case 8:
      return Few<Codes, kBits, 8>(a, row_begin, row_end, row_bytes, met);
    case 16:
      return Many<Codes, kBits, 16>(a, row_begin, row_end, row_bytes, met);
    case 32:
      return Many<Codes, kBits, 32>(a, row_begin, row_end, row_bytes, met);
    case 48:
      return Many<Codes, kBits, 48>(a, row_begin, row_end, row_bytes, met);
    default:
      if constexpr (!Codes::kInteger) {
        if (a.offsets != nullptr) return Many<Codes, kBits, 64, true>(a, row_begin, row_end, row_bytes, met);
      }
      return Many<Codes, kBits, 64>(a, row_begin, row_end, row_bytes, met);
  }
}

template <int kBits>
void ForMode(const CodebookMatmulArgs& a, Index row_begin, Index row_end, Index row_bytes, CodesMet<kBits>& met) {
#ifdef __AVX512BF16__
  if constexpr (kBits == 8) {
    if (a.weight.entries > 64) return ForWidth<PlaneCodes<4, 2>, 8>(a, row_begin, row_end, row_bytes, met);
    if (a.weight.entries > 32) return ForWidth<PlaneCodes<1, 2>, 8>(a, row_begin, row_end, row_bytes, met);
  }
  ForWidth<PairCodes<kBits>, kBits>(a, row_begin, row_end, row_bytes, met);
#else
  const bool bytes = a.mode == CodebookMode::kInt8;
#ifdef __AVX512F__
  if constexpr (kBits == 8) {
    const Index entries = a.weight.entries;
    if (bytes && entries <= 64) return ForWidth<ByteCodes<8, 1>, 8>(a, row_begin, row_end, row_bytes, met);
    if (!bytes && entries <= 32) return ForWidth<FloatFewCodes, 8>(a, row_begin, row_end, row_bytes, met);
    if (!bytes && entries <= 64) return ForWidth<PlaneCodes<1>, 8>(a, row_begin, row_end, row_bytes, met);
  }
#endif
  if (bytes) return ForWidth<ByteCodes<kBits>, kBits>(a, row_begin, row_end, row_bytes, met);
  ForWidth<FloatCodes<kBits>, kBits>(a, row_begin, row_end, row_bytes, met);
#endif
}

// Where not every code of so many bits has an entry and the codes met do not say whether all fit, they are read again;
// a few rows at a time, while a cache still has them.
template <int kBits>
CodebookStatus Checked(const CodebookMatmulArgs& a, Index row_begin, Index row_end) {
  const CodebookWeight& w = a.weight;
  const Index row_bytes = CodeRowBytes(w.columns, w.column_block, kBits);
  const bool again = kBits < 8 && (w.entries & (w.entries - 1)) != 0;
  const Index step = again && a.width <= kCodebookFewSamples ? kFewRows : row_end - row_begin;
  for (Index begin = row_begin; begin < row_end; begin += step) {
    const Index end = begin + step < row_end ? begin + step : row_end;
    CodesMet<kBits> met{};
    ForMode<kBits>(a, begin, end, row_bytes, met);
    if (met.Largest() < w.entries) continue;
    if (!again || LargestCode<kBits>(w.codes + begin * row_bytes, (end - begin) * row_bytes) >= w.entries) {
      return CodebookStatus::kBadCode;
    }
  }
  return CodebookStatus::kOk;
}

CodebookStatus Matmul(const CodebookMatmulArgs& a, Index row_begin, Index row_end) noexcept {
  if (row_begin >= row_end) return CodebookStatus::kOk;
  switch (CodeBits(a.weight.entries)) {
    case 2:
      return Checked<2>(a, row_begin, row_end);
    case 4:
      return Checked<4>(a, row_begin, row_end);
    default:
      return Checked<8>(a, row_begin, row_end);
  }
}

}  // namespace
}  // namespace tersetorch
