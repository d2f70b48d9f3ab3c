#include <immintrin.h>

#include <cstdint>

#include "kernels/common/sign_counts.h"
#include "kernels/common/vectors.h"
#include "kernels/xnor_matmul/xnor_matmul.h"

namespace tersetorch {
namespace {

constexpr int kVectors = 8;   // of 4 rows
constexpr int kTogether = 2;  // vectors whose counts stay in registers
constexpr Index kPart = 62;   // words, whose pairs add at most 8 to a byte that surely holds 31 of them

__m256i Splat(const char* x, Index i) { return _mm256_set1_epi64x(LoadAt<std::int64_t>(x, i, 8)); }

// The bits of each byte.
__m256i CountBytes(__m256i bits) {
  const __m256i counts =
      _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4, 0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
  const __m256i nibbles = _mm256_set1_epi8(15);
  return _mm256_add_epi8(_mm256_shuffle_epi8(counts, _mm256_and_si256(bits, nibbles)),
                         _mm256_shuffle_epi8(counts, _mm256_and_si256(_mm256_srli_epi32(bits, 4), nibbles)));
}

__m256i SumBytes(__m256i bytes) { return _mm256_sad_epu8(bytes, _mm256_setzero_si256()); }

// Adds how many bits differ in at most kPart words, of a sample with kTogether vectors of rows, to int64
// [kTogether][4].
void Count(const char* weight, const char* x, Index words, __m256i (&counts)[kTogether]) {
  __m256i sums[kTogether] = {}, carries[kTogether] = {};
  Index i = 0;
  for (; i + 2 <= words; i += 2) {
    // The words after the part: between those of a row lie other rows', through which the hardware does not see.
    _mm_prefetch(weight + (i + kPart) * kVectors * 32, _MM_HINT_T0);
    _mm_prefetch(weight + (i + 1 + kPart) * kVectors * 32, _MM_HINT_T0);
#pragma GCC unroll 2
    for (int v = 0; v < kTogether; ++v) {
      const __m256i s = sums[v];
      const __m256i first = _mm256_xor_si256(LoadAt<__m256i>(weight, i * kVectors + v, 32), Splat(x, i));
      const __m256i second = _mm256_xor_si256(LoadAt<__m256i>(weight, (i + 1) * kVectors + v, 32), Splat(x, i + 1));
      const __m256i q = _mm256_xor_si256(s, first);
      const __m256i carry = _mm256_or_si256(_mm256_and_si256(s, first), _mm256_and_si256(q, second));
      carries[v] = _mm256_add_epi8(carries[v], CountBytes(carry));
      sums[v] = _mm256_xor_si256(q, second);
    }
  }
  for (int v = 0; v < kTogether; ++v) {
    __m256i bytes = CountBytes(sums[v]);
    if (i < words) {
      const auto last = LoadAt<__m256i>(weight, i * kVectors + v, 32);
      bytes = _mm256_add_epi8(bytes, CountBytes(_mm256_xor_si256(last, Splat(x, i))));
    }
    const __m256i twice = _mm256_slli_epi64(SumBytes(carries[v]), 1);
    counts[v] = _mm256_add_epi64(counts[v], _mm256_add_epi64(twice, SumBytes(bytes)));
  }
}

// The rows of a tile, vectors of 8, and what their dots become.
struct Rows {
  Rows(const XnorMatmulArgs& a, Index tile) : row(tile * kXnorRows) {
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    for (int v = 0; v < 4; ++v) {
      const Index left = a.rows - row - 8 * v;
      within[v] = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(left < 8 ? left : 8)), lanes);
      const auto numbers = [&](const void* array, float otherwise) {
        if (array == nullptr) return _mm256_set1_ps(otherwise);
        return _mm256_maskload_ps(reinterpret_cast<const float*>(static_cast<const char*>(array) + 4 * (row + 8 * v)),
                                  within[v]);
      };
      scale[v] = numbers(a.scale, 1);
      bias[v] = numbers(a.bias, 0);
      thresholds[v] = _mm256_castps_si256(numbers(a.thresholds, 0));
    }
  }
  Index row;
  __m256i within[4], thresholds[4];
  __m256 scale[4], bias[4];
};

// y of a tile's rows for sample n, of which as many bits differ.
void StoreTile(const XnorMatmulArgs& a, Index n, const Rows& rows, const __m256i (&counts)[4]) {
  const __m256i columns = _mm256_set1_epi32(static_cast<std::int32_t>(a.columns));
  std::uint32_t bits = 0;
  for (int v = 0; v < 4; ++v) {
    const __m256i dot = _mm256_sub_epi32(columns, _mm256_slli_epi32(counts[v], 1));
    const Index at = 4 * (n * a.rows + rows.row + 8 * v);
    if (a.dots != nullptr) {
      _mm256_maskstore_epi32(reinterpret_cast<int*>(reinterpret_cast<char*>(a.dots) + at), rows.within[v], dot);
    } else if (a.floats != nullptr) {
      const __m256 y = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), rows.scale[v], rows.bias[v]);
      _mm256_maskstore_ps(reinterpret_cast<float*>(reinterpret_cast<char*>(a.floats) + at), rows.within[v], y);
    } else {
      const __m256i ones = _mm256_and_si256(_mm256_cmpgt_epi32(rows.thresholds[v], dot), rows.within[v]);
      bits |= static_cast<std::uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(ones))) << 8 * v;
    }
  }
  if (a.bits != nullptr) Store(reinterpret_cast<char*>(a.bits) + (n * ((a.rows + 63) / 64) * 64 + rows.row) / 8, bits);
}

// A sample at a time, which needs no vectors of nibbles.
void MultiplyTile(const XnorMatmulArgs& a, const char* weight, Index tile, Index n) {
  __m256i parts[kVectors / kTogether][kTogether] = {}, counts[4];
  const char* x = reinterpret_cast<const char*>(a.x) + 8 * n * a.words;
  for (Index i = 0; i < a.words; i += kPart) {
    const Index words = a.words - i < kPart ? a.words - i : kPart;
    for (int v = 0; v < 4; ++v) Count(weight + (i * kVectors + v * kTogether) * 32, x + 8 * i, words, parts[v]);
  }
  const __m256i halves = _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6);
  for (int v = 0; v < 4; ++v) {
    const __m256i first = _mm256_permutevar8x32_epi32(parts[v][0], halves);
    counts[v] = _mm256_blend_epi32(first, _mm256_permutevar8x32_epi32(parts[v][1], halves), 0xf0);
  }
  StoreTile(a, n, Rows(a, tile), counts);
}

// Samples [n, n + samples), at most kCountSamples, with `tiles` tiles, at most kCountTiles.
void MultiplyTogether(const XnorMatmulArgs& a, Index tile, Index tiles, Index n, Index samples) {
  TileNibbles nibbles;
  PairCodes codes;
  PairCounts counts[kCountSamples / 2][kCountTiles];
  for (Index p = 0; p < (samples + 1) / 2; ++p) {
    for (PairCounts& of_tile : counts[p]) of_tile = {};
  }
  for (Index first = 0; first < a.words; first += kCountWords) {
    const Index words = a.words - first < kCountWords ? a.words - first : kCountWords;
    for (Index t = 0; t < tiles; ++t) {
      const char* weight = reinterpret_cast<const char*>(a.weight) + 8 * kXnorRows * ((tile + t) * a.words + first);
      for (Index i = 0; i < words; ++i) nibbles.Set<kVectors>(t, i, weight + 8 * kXnorRows * i);
      nibbles.End(t, words);
    }
    codes.End(words);
    for (Index m = 0; m < samples; m += 2) {
      const char* x = reinterpret_cast<const char*>(a.x) + 8 * ((n + m) * a.words + first);
      const Index other = m + 1 < samples ? 8 * a.words : 0;
      for (Index i = 0; i < words; ++i) codes.Set(i, x + 8 * i, x + 8 * i + other);
      AddDiffering(codes, nibbles, tiles, words, counts[m / 2]);
    }
  }
  for (Index t = 0; t < tiles; ++t) {
    const Rows rows(a, tile + t);
    for (Index m = 0; m < samples; ++m) {
      __m256i in_order[4];
      counts[m / 2][t].InOrder<kVectors>(m % 2, in_order);
      StoreTile(a, n + m, rows, in_order);
    }
  }
}

void Multiply(const XnorMatmulArgs& a, Index tile_begin, Index tile_end) noexcept {
  // The second half of the last word of bits, where no tile has it.
  const bool odd = a.bits != nullptr && tile_end == XnorTiles(a.rows) && tile_end % 2 == 1;
  const Index parts = a.words > kMostCountWords ? 0 : (a.samples + kCountSamples - 1) / kCountSamples;
  for (Index tile = tile_begin; a.samples > 1 && parts > 0 && tile < tile_end; tile += kCountTiles) {
    const Index tiles = tile_end - tile < kCountTiles ? tile_end - tile : kCountTiles;
    for (Index p = 0; p < parts; ++p) {
      const Index n = a.samples * p / parts;
      MultiplyTogether(a, tile, tiles, n, a.samples * (p + 1) / parts - n);
    }
  }
  for (Index tile = tile_begin; (a.samples == 1 || parts == 0) && tile < tile_end; ++tile) {
    const char* weight = reinterpret_cast<const char*>(a.weight) + 8 * tile * a.words * kXnorRows;
    for (Index n = 0; n < a.samples; ++n) MultiplyTile(a, weight, tile, n);
  }
  for (Index n = 0; odd && n < a.samples; ++n) {
    Store(reinterpret_cast<char*>(a.bits) + 8 * ((n + 1) * ((a.rows + 63) / 64)) - 4, std::uint32_t{0});
  }
}

}  // namespace

const XnorMatmulVariant kXnorMatmulAvx2 = &Multiply;

}  // namespace tersetorch
