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

// ---- samples

// 16 words of sample n, the first of them at `words`, into a panel's vector.
struct PanelVector {
  void Put(Index n, Index width, int half, Bits8 words) const {
    if (width <= kCodebookFewSamples) return Store(vector + n * 64 + 32 * half, words);
    for (int l = 0; l < 8; ++l) Store(vector + ((8 * half + l) * width + n) * 4, words[l]);
  }

  char* vector;
};

template <int kBits>
void PackChunk(const CodebookSamplesArgs& a, Index chunk, Index begin, Index count) {
  constexpr int kColumns = 512 / kBits, kBytes = 8 / kBits;
  const int vectors = CodebookVectors(kBits, a.mode);
  const Index vector_bytes = 64 * a.width;
  char* to = static_cast<char*>(a.panel) + chunk * vectors * vector_bytes;
  for (Index rest = a.samples; rest < a.width; ++rest) {
    for (int v = 0; v < vectors; ++v) {
      for (int half = 0; half < 2; ++half) PanelVector{to + v * vector_bytes}.Put(rest, a.width, half, Bits8{});
    }
  }
  Index n = 0;
  if (a.width > kCodebookFewSamples && a.mode != CodebookMode::kInt8 && count == kColumns) {
    for (; n + 8 <= a.samples; n += 8) {
      for (Index c = 0; c < kColumns; c += 8) {
        Float8 block[8];
        for (Index i = 0; i < 8; ++i) {
          block[i] = LoadFloats(a.x, a.stored_as, (n + i) * a.columns + begin + c);
          if (a.mode == CodebookMode::kBFloat16) block[i] = FromBFloat16(ToBFloat16(block[i]));
        }
        Transpose(block);
        for (Index i = 0; i < 8; ++i) Store(to + ((c + i) * a.width + n) * 4, block[i]);
      }
    }
  }
  for (; n < a.samples; ++n) {
    alignas(64) float x[kColumns];
    Index c = 0;
    for (; c + 8 <= count; c += 8) Store(x + c, LoadFloats(a.x, a.stored_as, n * a.columns + begin + c));
    for (; c < kColumns; ++c) x[c] = c < count ? LoadFloat(a.x, a.stored_as, n * a.columns + begin + c) : 0.0f;
    if (a.mode != CodebookMode::kInt8) {
      for (int v = 0; v < kColumns / 16; ++v) {
        for (int half = 0; half < 2; ++half) {
          Float8 words = Load<Float8>(x + 16 * v + 8 * half);
          if (a.mode == CodebookMode::kBFloat16) words = FromBFloat16(ToBFloat16(words));
          PanelVector{to + v * vector_bytes}.Put(n, a.width, half, (Bits8)words);
        }
      }
      continue;
    }
    const float inverse = LoadAt<float>(a.inverses, n, 4);
    Int8 sums{};
    for (int f = 0; f < kBytes; ++f) {
      for (int half = 0; half < 2; ++half) {
        Bits8 words{};
        for (int j = 0; j < 4; ++j) {
          const Float8 scaled = Load<Float8>(x + 16 * (j * kBytes + f) + 8 * half) * Splat<8>(inverse);
          const Int8 q = inverse == 0 ? Int8{} : (Int8)_mm256_cvtps_epi32((__m256)scaled);
          sums += q;
          words |= ((Bits8)q & 0xff) << 8 * j;
        }
        PanelVector{to + f * vector_bytes}.Put(n, a.width, half, words);
      }
    }
    std::int32_t sum = 0;
    for (int l = 0; l < 8; ++l) sum += sums[l];
    __atomic_fetch_add(a.sums + n, sum, __ATOMIC_RELAXED);
  }
}

template <int kBits>
void PackChunks(const CodebookSamplesArgs& a, Index chunk_begin, Index chunk_end) {
  constexpr Index kColumns = 512 / kBits;
  const Index of_block = CodeChunks(a.column_block, kBits);
  for (Index i = chunk_begin; i < chunk_end; ++i) {
    const Index in_block = i % of_block * kColumns, begin = i / of_block * a.column_block + in_block;
    Index count = a.columns - begin < a.column_block - in_block ? a.columns - begin : a.column_block - in_block;
    count = count < kColumns ? count : kColumns;
    PackChunk<kBits>(a, i, begin, count);
  }
}

void PackSamples(const CodebookSamplesArgs& a, Index chunk_begin, Index chunk_end) noexcept {
  if (a.bits == 2) return PackChunks<2>(a, chunk_begin, chunk_end);
  if (a.bits == 4) return PackChunks<4>(a, chunk_begin, chunk_end);
  PackChunks<8>(a, chunk_begin, chunk_end);
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

// ---- results

inline float Number(const CodebookMatmulArgs& a, std::int32_t sum, Index n, float scale, float bias) {
  const float other = LoadAt<float>(a.sample_scales, n, 4);
  const float smaller = scale < other ? scale : other, larger = scale < other ? other : scale;
  const auto whole = static_cast<float>(sum - kCodeByteOffset * LoadAt<std::int32_t>(a.sample_sums, n, 4));
  return __builtin_fmaf(whole * smaller, larger, bias);
}

inline float Total(CodeFloats sums) {
#ifdef __AVX512F__
  return _mm512_reduce_add_ps((__m512)sums);
#else
  const __m128 quads = _mm_add_ps(_mm256_castps256_ps128((__m256)sums), _mm256_extractf128_ps((__m256)sums, 1));
  const __m128 pairs = _mm_add_ps(quads, _mm_movehl_ps(quads, quads));
  return _mm_cvtss_f32(_mm_add_ss(pairs, _mm_movehdup_ps(pairs)));
#endif
}

inline std::int32_t Total(CodeInts sums) {
#ifdef __AVX512F__
  return _mm512_reduce_add_epi32((__m512i)sums);
#else
  std::int32_t total = 0;
  for (int l = 0; l < 8; ++l) total += sums[l];
  return total;
#endif
}

// ---- few samples: weights decoded in registers, used for all of them

// One sample has two sums a row, since an addition waits for the one before.
template <int kSamples>
constexpr int kSplit = kSamples == 1 ? 2 : 1;

// A chunk of kRows rows. Past its `count` columns, unless it is whole, a weight counts as 0: the first entry may be
// NaN.
template <typename Codes, int kRows, int kSamples, bool kWhole>
TERSETORCH_INLINE void AddChunk(const typename Codes::Table (&tables)[kRows], const std::uint8_t* codes, Index stride,
                                const char* panel, Index count,
                                typename Codes::Sum (&sums)[kRows][kSamples][kSplit<kSamples>]) {
#pragma GCC unroll 2
  for (int piece = 0; piece < kPieces; ++piece) {
    typename Codes::State states[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      states[r] = Codes::Begin(tables[r], LoadAt<CodeWords>(codes + r * stride, piece * kCodeLanes, 4));
    }
#pragma GCC unroll 16
    for (int s = 0; s < Codes::kVectors; ++s) {
      typename Codes::Sum weights[kRows];
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        weights[r] = Codes::At(tables[r], states[r], s);
        if constexpr (!kWhole && !Codes::kInteger) {
          const auto lane = CodeInts{0,
                                     1,
                                     2,
                                     3,
                                     4,
                                     5,
                                     6,
                                     7
#ifdef __AVX512F__
                                     ,
                                     8,
                                     9,
                                     10,
                                     11,
                                     12,
                                     13,
                                     14,
                                     15
#endif
          };
          const CodeInts there = lane + (16 * s + piece * kCodeLanes) < static_cast<std::int32_t>(count);
          weights[r] = (typename Codes::Sum)((CodeInts)weights[r] & there);
        }
      }
#pragma GCC unroll 8
      for (int n = 0; n < kSamples; ++n) {
        const auto x = LoadAt<typename Codes::Sum>(panel, (s * kSamples + n) * 16 + piece * kCodeLanes, 4);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          auto& sum = sums[r][n][s % kSplit<kSamples>];
          sum = Codes::Mac(sum, weights[r], x);
        }
      }
    }
  }
}

template <typename Codes, int kBits, int kRows, int kSamples>
void FewRows(const CodebookMatmulArgs& a, const Tables<Codes, kBits>& tables, Index row, Index row_bytes) {
  constexpr Index kColumns = 512 / kBits, kAhead = 1024;
  constexpr Index kPanelBytes = Codes::kVectors * kSamples * 64;
  const CodebookWeight& w = a.weight;
  typename Codes::Sum sums[kRows][kSamples][kSplit<kSamples>] = {};
  const std::uint8_t* codes = w.codes + row * row_bytes;
  const char* panel = static_cast<const char*>(a.panel);
  for (Index block = 0, first = 0; first < w.columns; ++block, first += w.column_block) {
    typename Codes::Table of_rows[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) of_rows[r] = r == 0 || w.per_row ? tables.At(row + r, block) : of_rows[0];
    Index left = w.columns - first < w.column_block ? w.columns - first : w.column_block;
    for (; left >= kColumns; left -= kColumns, codes += kCodeChunkBytes, panel += kPanelBytes) {
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) __builtin_prefetch(codes + r * row_bytes + kAhead);
      AddChunk<Codes, kRows, kSamples, true>(of_rows, codes, row_bytes, panel, kColumns, sums);
    }
    if (left > 0) {
      AddChunk<Codes, kRows, kSamples, false>(of_rows, codes, row_bytes, panel, left, sums);
      codes += kCodeChunkBytes;
      panel += kPanelBytes;
    }
  }
  for (int r = 0; r < kRows; ++r) {
    const float bias = a.bias == nullptr ? 0.0f : LoadAt<float>(a.bias, row + r, 4);
    const float scale = Codes::kInteger ? tables.Scale(row + r) : 0.0f;
    for (Index n = 0; n < a.samples; ++n) {
      auto sum = sums[r][n][0];
      if constexpr (kSamples == 1) sum += sums[r][n][1];
      float y;
      if constexpr (Codes::kInteger) {
        y = Number(a, Total(sum), n, scale, bias);
      } else {
        y = Total(sum) + bias;
      }
      StoreFloat(a.y, a.y_stored_as, CodebookPlace(a, n, row + r), a.relu && y < 0 ? 0.0f : y);
    }
  }
}

template <typename Codes, int kBits, int kSamples>
void Few(const CodebookMatmulArgs& a, Index row_begin, Index row_end, Index row_bytes) {
  constexpr int kRows = kSamples == 8 && Codes::kRows > 2 ? 2 : Codes::kRows;
  const Tables<Codes, kBits> tables(a);
  Index row = row_begin;
  for (; row + kRows <= row_end; row += kRows) FewRows<Codes, kBits, kRows, kSamples>(a, tables, row, row_bytes);
  if constexpr (kRows > 1) {
    for (; row < row_end; ++row) FewRows<Codes, kBits, 1, kSamples>(a, tables, row, row_bytes);
  }
}

// ---- many samples: tiles of decoded rows, whose words meet panels

// Word k of x is the panel's k-th row, or lies offsets[k] words from its begin.
template <typename Codes, int kRows, int kVectors, int kWidth, bool kApart = false>
void AddTile(const char* tile, Index tile_bytes, const char* panel, Index words, float* sums,
             const Index* offsets = nullptr) {
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

template <typename Codes>
TERSETORCH_INLINE void DecodeChunk(const typename Codes::Table& table, const std::uint8_t* codes, char* to) {
#pragma GCC unroll 2
  for (int piece = 0; piece < kPieces; ++piece) {
    const auto state = Codes::Begin(table, LoadAt<CodeWords>(codes, piece * kCodeLanes, 4));
#pragma GCC unroll 16
    for (int s = 0; s < Codes::kVectors; ++s) Store(to + s * 64 + piece * kCodeLanes * 4, Codes::At(table, state, s));
  }
}

template <int kWidth>
void Finish(const CodebookMatmulArgs& a, bool integer, Index row, float scale, float* sums) {
  const Float8 bias = Splat<8>(a.bias == nullptr ? 0.0f : LoadAt<float>(a.bias, row, 4));
  for (Index n = 0; n < kWidth; n += 8) {
    Float8 y = Load<Float8>(sums + n);
    if (integer) {
      const Int8 whole = (Int8)y - kCodeByteOffset * LoadAt<Int8>(a.sample_sums, n, 4);
      const Float8 one = Splat<8>(scale), other = LoadAt<Float8>(a.sample_scales, n, 4);
      const Float8 smaller = one < other ? one : other, larger = one < other ? other : one;
      y = __builtin_convertvector(whole, Float8) * smaller * larger + bias;
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
        StoreFloat(a.y, a.y_stored_as, CodebookPlace(a, n + i, row_begin + r), from[i]);
      }
    }
  }
}

template <typename Codes, int kBits, int kWidth, bool kApart = false>
void Many(const CodebookMatmulArgs& a, Index row_begin, Index row_end, Index row_bytes) {
  constexpr int kMost = kCodeLanes == 16 ? 4 : 2, kOfWidth = kWidth / kCodeLanes;
  constexpr int kVectors = kOfWidth < kMost ? kOfWidth : kMost;
  constexpr int kRows = kCodeLanes == 8 ? (Codes::kInteger ? 4 : 6) : kVectors == 4 ? 6 : kVectors == 3 ? 8 : 12;
  // Chunks whose part of the panel takes about half of the first cache level.
  constexpr Index kChunkWords = Codes::kVectors * 16, kColumns = 512 / kBits;
  constexpr Index kDepth = kChunkWords * kWidth * 4 > 16384 ? 1 : 32768 / (kChunkWords * kWidth * 4);
  constexpr Index kTileBytes = kDepth * kChunkWords * 4;
  alignas(64) char tile[kRows * kTileBytes] = {};
  const CodebookWeight& w = a.weight;
  const Tables<Codes, kBits> tables(a);
  const Index rows = row_end - row_begin;
  for (Index i = 0; i < (rows + kRows - 1) * kWidth; i += 8) Store(a.sums + i, Float8{});
  const std::uint8_t* codes = w.codes + row_begin * row_bytes;
  const char* panel = static_cast<const char*>(a.panel);
  const Index* offsets = a.offsets;
  for (Index block = 0, first = 0; first < w.columns; ++block, first += w.column_block) {
    Index left = w.columns - first < w.column_block ? w.columns - first : w.column_block;
    while (left > 0) {
      const Index columns = left < kDepth * kColumns ? left : kDepth * kColumns;
      const Index chunks = (columns + kColumns - 1) / kColumns;
      // Past the last column x is 0 and a decoded weight may be NaN; bytes are never.
      const Index words = Codes::kInteger ? chunks * kChunkWords : columns;
      for (Index i = 0; i < rows; i += kRows) {
        for (Index r = i; r < i + kRows && r < rows; ++r) {
          const typename Codes::Table table = tables.At(row_begin + r, block);
          for (Index c = 0; c < chunks; ++c) {
            const std::uint8_t* chunk = codes + r * row_bytes + c * kCodeChunkBytes;
            __builtin_prefetch(chunk + 2 * kRows * row_bytes);
            DecodeChunk<Codes>(table, chunk, tile + (r - i) * kTileBytes + c * kChunkWords * 4);
          }
        }
#pragma GCC unroll 1
        for (Index v = 0; v < kOfWidth; v += kVectors) {
          AddTile<Codes, kRows, kVectors, kWidth, kApart>(tile, kTileBytes, panel + v * kCodeLanes * 4, words,
                                                          a.sums + i * kWidth + v * kCodeLanes, offsets);
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
void ForWidth(const CodebookMatmulArgs& a, Index row_begin, Index row_end, Index row_bytes) {
  switch (a.width) {
    case 1:
      return Few<Codes, kBits, 1>(a, row_begin, row_end, row_bytes);
    case 2:
      return Few<Codes, kBits, 2>(a, row_begin, row_end, row_bytes);
    case 4:
      return Few<Codes, kBits, 4>(a, row_begin, row_end, row_bytes);
    case 8:
      return Few<Codes, kBits, 8>(a, row_begin, row_end, row_bytes);
    case 16:
      return Many<Codes, kBits, 16>(a, row_begin, row_end, row_bytes);
    case 32:
      return Many<Codes, kBits, 32>(a, row_begin, row_end, row_bytes);
    case 48:
      return Many<Codes, kBits, 48>(a, row_begin, row_end, row_bytes);
    default:
      if constexpr (!Codes::kInteger) {
        if (a.offsets != nullptr) return Many<Codes, kBits, 64, true>(a, row_begin, row_end, row_bytes);
      }
      return Many<Codes, kBits, 64>(a, row_begin, row_end, row_bytes);
  }
}

template <int kBits>
void ForMode(const CodebookMatmulArgs& a, Index row_begin, Index row_end, Index row_bytes) {
  if (a.mode == CodebookMode::kInt8) return ForWidth<ByteCodes<kBits>, kBits>(a, row_begin, row_end, row_bytes);
#ifdef __AVX512F__
  if constexpr (kBits == 8) {
    if (a.weight.entries <= 32) return ForWidth<FloatFewCodes, 8>(a, row_begin, row_end, row_bytes);
  }
#endif
  ForWidth<FloatCodes<kBits>, kBits>(a, row_begin, row_end, row_bytes);
}

// Where not every code of so many bits has an entry, codes are checked before they are used; a few rows at a time, so
// that memory is read once.
template <int kBits>
CodebookStatus Checked(const CodebookMatmulArgs& a, Index row_begin, Index row_end) {
  const CodebookWeight& w = a.weight;
  const Index row_bytes = CodeRowBytes(w.columns, w.column_block, kBits);
  const bool in_doubt = w.entries < Index{1} << kBits;
  const Index step = in_doubt && a.width <= kCodebookFewSamples ? 16 : row_end - row_begin;
  for (Index begin = row_begin; begin < row_end; begin += step) {
    const Index end = begin + step < row_end ? begin + step : row_end;
    const std::uint8_t* codes = w.codes + begin * row_bytes;
    if (in_doubt && LargestCode<kBits>(codes, (end - begin) * row_bytes) >= w.entries) return CodebookStatus::kBadCode;
    ForMode<kBits>(a, begin, end, row_bytes);
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
