// The lookup of codebook_embedding.h for every vector level.
//
// Indices go in groups: blocks of columns outside, so that a block's table is made once for all of them, and while a
// group is decoded the codes of the next one, which lie anywhere, are on their way into the cache.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "kernels/codebook_embedding/codebook_embedding.h"
#include "kernels/common/code_vectors.h"
#include "kernels/common/vectors.h"

namespace tersetorch {
namespace {

constexpr Index kGroup = 16;
constexpr int kPieces = 16 / kCodeLanes;
typedef std::uint16_t CodeHalves __attribute__((vector_size(2 * kCodeLanes)));

// Weights as y has them, in columns [c, c + kCodeLanes). For halves entries come rounded: their low bits are 0, but in
// a NaN, whose upper half is one too.
template <bool kHalves>
TERSETORCH_INLINE void PutWeights(char* y, Index c, CodeFloats weights) {
  if constexpr (kHalves) {
    Store(y + 2 * c, __builtin_convertvector((CodeWords)weights >> 16, CodeHalves));
  } else {
    Store(y + 4 * c, weights);
  }
}

// Two vectors of them, in columns [c, c + 2 * kCodeLanes).
template <bool kHalves>
TERSETORCH_INLINE void PutPair(char* y, Index c, CodeFloats low, CodeFloats high) {
#ifdef __AVX512F__
  if constexpr (kHalves) {
    alignas(64) static constexpr std::uint16_t kUpper[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21,
                                                             23, 25, 27, 29, 31, 33, 35, 37, 39, 41, 43,
                                                             45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
    const __m512i halves = _mm512_permutex2var_epi16((__m512i)low, _mm512_load_si512(kUpper), (__m512i)high);
    return Store(y + 2 * c, halves);
  }
#endif
  PutWeights<kHalves>(y, c, low);
  PutWeights<kHalves>(y, c + kCodeLanes, high);
}

template <typename Codes, bool kHalves>
TERSETORCH_INLINE void DecodeChunk(const typename Codes::Table& table, const std::uint8_t* codes, char* y) {
  if constexpr (kPieces == 1) {
    const auto state = Codes::Begin(table, LoadAt<CodeWords>(codes, 0, 4));
#pragma GCC unroll 8
    for (int s = 0; s < Codes::kVectors; s += 2) {
      PutPair<kHalves>(y, 16 * s, Codes::At(table, state, s), Codes::At(table, state, s + 1));
    }
  } else {
    const auto low = Codes::Begin(table, LoadAt<CodeWords>(codes, 0, 4));
    const auto high = Codes::Begin(table, LoadAt<CodeWords>(codes, kCodeLanes, 4));
#pragma GCC unroll 16
    for (int s = 0; s < Codes::kVectors; ++s) {
      PutPair<kHalves>(y, 16 * s, Codes::At(table, low, s), Codes::At(table, high, s));
    }
  }
}

// The first `count` columns of a chunk.
template <typename Codes, bool kHalves>
void DecodePart(const typename Codes::Table& table, const std::uint8_t* codes, Index count, char* y) {
  constexpr Index kBytes = kHalves ? 2 : 4;
  for (int piece = 0; piece < kPieces; ++piece) {
    const auto state = Codes::Begin(table, LoadAt<CodeWords>(codes, piece * kCodeLanes, 4));
    for (int s = 0; s < Codes::kVectors; ++s) {
      const Index c = 16 * s + piece * kCodeLanes;
      if (c >= count) break;
      const CodeFloats weights = Codes::At(table, state, s);
      if (c + kCodeLanes <= count) {
        PutWeights<kHalves>(y, c, weights);
      } else {
        char last[64];
        PutWeights<kHalves>(last, 0, weights);
        for (Index k = 0; k < (count - c) * kBytes; k += kBytes) __builtin_memcpy(y + c * kBytes + k, last + k, kBytes);
      }
    }
  }
}

// Up to kGroup rows that exist, into consecutive rows of y.
template <typename Codes, int kBits, bool kHalves>
class Rows {
  using Table = typename Codes::Table;
  static constexpr Index kColumns = 512 / kBits, kBytes = kHalves ? 2 : 4;

 public:
  explicit Rows(const CodebookWeight& w)
      : w_(w),
        row_bytes_(CodeRowBytes(w.columns, w.column_block, kBits)),
        alone_(!w.per_row && w.column_block >= w.columns) {
    if (alone_ && w.columns > 0) Make(0);
  }

  void Decode(const Index (&rows)[kGroup], Index count, const Index (&next)[kGroup], Index next_count, char* y) {
    const std::uint8_t* codes = w_.codes;
    for (Index block = 0, first = 0; first < w_.columns; ++block, first += w_.column_block) {
      const Index columns = w_.columns - first < w_.column_block ? w_.columns - first : w_.column_block;
      if (!alone_ && !w_.per_row) Make(block);
      for (Index i = 0; i < count; ++i) {
        if (block == 0 && i < next_count) {
          for (Index b = 0; b < row_bytes_; b += 64) __builtin_prefetch(w_.codes + next[i] * row_bytes_ + b);
        }
        if (w_.per_row) Make(rows[i]);
        Block(codes + rows[i] * row_bytes_, columns, y + (i * w_.columns + first) * kBytes);
      }
      codes += CodeChunks(columns, kBits) * kCodeChunkBytes;
    }
  }

 private:
  void Make(Index table) {
    CodeEntries entries;
    entries.Fill<kBits>(w_.codebook + table * w_.entries, w_.entries, kHalves);
    table_ = Table(entries);
  }

  void Block(const std::uint8_t* codes, Index columns, char* y) const {
    const Table table = table_;
    for (; columns >= kColumns; columns -= kColumns, codes += kCodeChunkBytes, y += kColumns * kBytes) {
      DecodeChunk<Codes, kHalves>(table, codes, y);
    }
    if (columns > 0) DecodePart<Codes, kHalves>(table, codes, columns, y);
  }

  const CodebookWeight& w_;
  Index row_bytes_;
  bool alone_;
  Table table_{};
};

// The rows of indices [begin, end), at most kGroup of them; fewer where one does not exist.
inline Index RowsOf(const CodebookEmbeddingArgs& a, Index begin, Index end, Index (&rows)[kGroup]) {
  Index count = 0;
  for (Index i = begin; i < end && count < kGroup; ++i, ++count) {
    rows[count] = a.indices.At(i);
    if (rows[count] < 0 || rows[count] >= a.weight.rows) break;
  }
  return count;
}

template <typename Codes, int kBits, bool kHalves>
CodebookEmbeddingStatus ForRows(const CodebookEmbeddingArgs& a, Index begin, Index end) {
  const CodebookWeight& w = a.weight;
  const Index row_bytes = CodeRowBytes(w.columns, w.column_block, kBits);
  const bool in_doubt = w.entries < Index{1} << kBits;
  Index groups[2][kGroup];
  Index count = RowsOf(a, begin, end, groups[0]);
  // Without rows there may be no table either.
  if (count == 0) return begin < end ? CodebookEmbeddingStatus::kBadIndex : CodebookEmbeddingStatus::kOk;
  Rows<Codes, kBits, kHalves> decoded(w);
  for (int now = 0; begin < end; now = 1 - now) {
    if (count < kGroup && count < end - begin) return CodebookEmbeddingStatus::kBadIndex;
    const Index next = RowsOf(a, begin + count, end, groups[1 - now]);
    for (Index i = 0; in_doubt && i < count; ++i) {
      const std::uint8_t* codes = w.codes + groups[now][i] * row_bytes;
      if (LargestCode<kBits>(codes, row_bytes) >= w.entries) return CodebookEmbeddingStatus::kBadCode;
    }
    char* y = static_cast<char*>(a.y) + begin * w.columns * (kHalves ? 2 : 4);
    decoded.Decode(groups[now], count, groups[1 - now], next, y);
    begin += count;
    count = next;
  }
  return CodebookEmbeddingStatus::kOk;
}

template <typename Codes, int kBits>
CodebookEmbeddingStatus ForDtype(const CodebookEmbeddingArgs& a, Index begin, Index end) {
  return a.y_stored_as == FloatDtype::kFloat32 ? ForRows<Codes, kBits, false>(a, begin, end)
                                               : ForRows<Codes, kBits, true>(a, begin, end);
}

CodebookEmbeddingStatus Lookup(const CodebookEmbeddingArgs& a, Index begin, Index end) noexcept {
  switch (CodeBits(a.weight.entries)) {
    case 2:
      return ForDtype<FloatCodes<2>, 2>(a, begin, end);
    case 4:
      return ForDtype<FloatCodes<4>, 4>(a, begin, end);
    default:
#ifdef __AVX512F__
      if (a.weight.entries <= 32) return ForDtype<FloatFewCodes, 8>(a, begin, end);
      if (a.weight.entries <= 64) return ForDtype<PlaneCodes<1>, 8>(a, begin, end);
      return ForDtype<PlaneCodes<4>, 8>(a, begin, end);
#else
      return ForDtype<FloatCodes<8>, 8>(a, begin, end);
#endif
  }
}

}  // namespace
}  // namespace tersetorch
