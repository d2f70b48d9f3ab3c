#include <immintrin.h>

#include <cstdint>

#include "kernels/common/vectors.h"
#include "kernels/product_matmul/product_matmul.h"
#include "kernels/product_matmul/product_matmul_simd.h"

namespace tersetorch {
namespace {

// Two registers hold a table of 16 floats; a permutation looks at the low 3 bits of each row's word only, and bit 3
// chooses between the two.
void SumNarrowTile(const float* tables, const std::uint8_t* words, Index groups, float* sums) {
  for (int half = 0; half < 2; ++half) {
    __m256 sum[4] = {};
    for (Index g = 0; g < groups; ++g) {
      __m256i word[4];
      for (int v = 0; v < 4; ++v) word[v] = LoadAt<__m256i>(words, g * 8 + half * 4 + v, 32);
#pragma GCC unroll 8
      for (int j = 0; j < kProductGroup; ++j) {
        const float* table = tables + (g * kProductGroup + j) * kProductFew;
        const __m256 low = _mm256_loadu_ps(table), high = _mm256_loadu_ps(table + 8);
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) {
          const __m256 choice = _mm256_castsi256_ps(_mm256_slli_epi32(word[v], 28));
          sum[v] = _mm256_add_ps(sum[v], _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, word[v]),
                                                          _mm256_permutevar8x32_ps(high, word[v]), choice));
          word[v] = _mm256_srli_epi32(word[v], 4);
        }
      }
    }
    for (int v = 0; v < 4; ++v) _mm256_storeu_ps(sums + half * 32 + 8 * v, sum[v]);
  }
}

void AddWideTile(const float* tables, const std::uint8_t* codes, Index count, float* sums) {
  for (Index r = 0; r < kProductRows; r += 8) {
    float row_sums[8];
    for (int i = 0; i < 8; ++i) row_sums[i] = sums[r + i];
    for (Index t = 0; t < count; ++t) AddTable<1>(tables + t * kProductMany, codes + t * kProductRows + r, row_sums);
    for (int i = 0; i < 8; ++i) sums[r + i] = row_sums[i];
  }
}

// A lookup in 16 bytes takes the same table for every byte, and gives 0 where an index has its highest bit set: so one
// for each of the word's bytes.
void SumNarrowInt8Tile(const std::uint8_t* quantized, const std::uint8_t* words, Index groups, std::uint32_t* sums) {
  const __m256i nibbles = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1), bytes = _mm256_set1_epi8(1);
  __m256i others[4];
  for (int b = 0; b < 4; ++b) others[b] = _mm256_set1_epi32(static_cast<int>(0x80808080u & ~(0xffu << 8 * b)));
  __m256i sum[8] = {};
  for (Index g = 0; g < groups; ++g) {
    for (int odd = 0; odd < 2; ++odd) {
      __m256i tables[4];
      for (int b = 0; b < 4; ++b) {
        tables[b] = _mm256_broadcastsi128_si256(LoadAt<__m128i>(quantized, (g * 2 + odd) * 4 + b, 16));
      }
#pragma GCC unroll 8
      for (int v = 0; v < 8; ++v) {
        const __m256i word = LoadAt<__m256i>(words, g * 8 + v, 32);
        const __m256i index = _mm256_and_si256(odd != 0 ? _mm256_srli_epi32(word, 4) : word, nibbles);
        __m256i found = {};
        for (int b = 0; b < 4; ++b) {
          found = _mm256_or_si256(found, _mm256_shuffle_epi8(tables[b], _mm256_or_si256(index, others[b])));
        }
        sum[v] = _mm256_add_epi32(sum[v], _mm256_madd_epi16(_mm256_maddubs_epi16(found, bytes), ones));
      }
    }
  }
  for (int v = 0; v < 8; ++v) Store(sums + 8 * v, sum[v]);
}

void AddWideInt8Tile(const std::uint8_t* quantized, const std::uint8_t* codes, Index count, std::uint32_t* sums) {
  for (Index r = 0; r < kProductRows; r += 8) {
    std::uint32_t sum[8];
    for (int i = 0; i < 8; ++i) sum[i] = LoadAt<std::uint32_t>(sums, r + i, 4);
    for (Index t = 0; t < count; ++t) {
      const auto word = LoadAt<std::uint64_t>(codes, t * kProductRows + r, 1);
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) sum[i] += quantized[t * kProductMany + (word >> 8 * i & 255)];
    }
    for (int i = 0; i < 8; ++i) Store(sums + r + i, sum[i]);
  }
}

void QuantizeTables(const ProductQuantizeArgs& a, std::int64_t table_begin, std::int64_t table_end) noexcept {
  const ProductWeight& w = a.weight;
  const bool narrow = ProductIsNarrow(w);
  for (Index i = table_begin; i < table_end; ++i) {
    const float* table = a.tables + i * ProductTableEntries(w);
    const float low = LoadAt<float>(a.lows, i, 4);
    const Index j = i % kProductGroup;
    std::uint8_t* out =
        a.quantized + (narrow ? ((i / kProductGroup * 2 + j % 2) * 4 + j / 2) * kProductFew : i * kProductMany);
    const Index kept = a.scale.inverse == 0 ? 0 : w.entries, whole = kept / 8 * 8;
    for (Index k = 0; k < whole; k += 8) {
      const __m256i q = _mm256_cvtps_epi32((__m256)((Load<Float8>(table + k) - low) * a.scale.inverse));
      Store(out + k, __builtin_convertvector((Bits8)q, Bytes8));
    }
    for (Index k = whole; k < ProductTableEntries(w); ++k) {
      const float above = k < kept ? (table[k] - low) * a.scale.inverse : 0.0f;
      out[k] = static_cast<std::uint8_t>(_mm_cvt_ss2si(_mm_set_ss(above)));
    }
  }
}

}  // namespace

const ProductKernels kProductAvx2{MakeTables, Matmul, MeasureTables, QuantizeTables, MatmulInt8, CodesFit};

}  // namespace tersetorch
