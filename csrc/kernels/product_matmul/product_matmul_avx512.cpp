#include <immintrin.h>

#include <cstdint>

#include "kernels/common/vectors.h"
#include "kernels/product_matmul/product_matmul.h"
#include "kernels/product_matmul/product_matmul_simd.h"

namespace tersetorch {
namespace {

// A register holds a table of 16 floats, and a permutation looks at the low 4 bits of each row's word only.
void SumNarrowTile(const float* tables, const std::uint8_t* words, Index groups, float* sums) {
  __m512 sum[4] = {};
  for (Index g = 0; g < groups; ++g) {
    __m512i word[4];
    for (int v = 0; v < 4; ++v) word[v] = _mm512_loadu_si512(words + (g * 4 + v) * 64);
#pragma GCC unroll 8
    for (int j = 0; j < kProductGroup; ++j) {
      const __m512 table = _mm512_loadu_ps(tables + (g * kProductGroup + j) * kProductFew);
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        sum[v] = _mm512_add_ps(sum[v], _mm512_permutexvar_ps(word[v], table));
        word[v] = _mm512_srli_epi32(word[v], 4);
      }
    }
  }
  for (int v = 0; v < 4; ++v) _mm512_storeu_ps(sums + 16 * v, sum[v]);
}

// Gathers: 16 loads without the instructions around each.
void AddWideTile(const float* tables, const std::uint8_t* codes, Index count, float* sums) {
  __m512 sum[4];
  for (int v = 0; v < 4; ++v) sum[v] = _mm512_loadu_ps(sums + 16 * v);
  for (Index t = 0; t < count; ++t) {
    const float* table = tables + t * kProductMany;
    for (int v = 0; v < 4; ++v) {
      const __m512i code = _mm512_cvtepu8_epi32(LoadAt<__m128i>(codes, t * 4 + v, 16));
      sum[v] = _mm512_add_ps(sum[v], _mm512_i32gather_ps(code, table, 4));
    }
  }
  for (int v = 0; v < 4; ++v) _mm512_storeu_ps(sums + 16 * v, sum[v]);
}

// A register holds 4 tables of 16 bytes, and one permutation looks up 4 tables for each of 16 rows.
void SumNarrowInt8Tile(const std::uint8_t* quantized, const std::uint8_t* words, Index groups, std::uint32_t* sums) {
  const __m512i nibbles = _mm512_set1_epi8(15), places = _mm512_set1_epi32(0x30201000), ones = _mm512_set1_epi8(1);
  __m512i sum[4] = {};
  for (Index g = 0; g < groups; ++g) {
    const __m512i even = _mm512_loadu_si512(quantized + g * 128), odd = _mm512_loadu_si512(quantized + g * 128 + 64);
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const __m512i word = _mm512_loadu_si512(words + (g * 4 + v) * 64);
      const __m512i low = _mm512_ternarylogic_epi32(word, nibbles, places, 0xea);  // word & nibbles | places
      const __m512i high = _mm512_ternarylogic_epi32(_mm512_srli_epi32(word, 4), nibbles, places, 0xea);
      sum[v] = _mm512_dpbusd_epi32(sum[v], _mm512_permutexvar_epi8(low, even), ones);
      sum[v] = _mm512_dpbusd_epi32(sum[v], _mm512_permutexvar_epi8(high, odd), ones);
    }
  }
  for (int v = 0; v < 4; ++v) _mm512_storeu_si512(sums + 16 * v, sum[v]);
}

// Four registers hold a table of 256 bytes. Sums in 16 bits, of even rows and of odd ones, hold 256 tables.
void AddWideInt8Tile(const std::uint8_t* quantized, const std::uint8_t* codes, Index count, std::uint32_t* sums) {
  __m512i both = {}, odd = {};
  for (Index t = 0; t < count; ++t) {
    const std::uint8_t* table = quantized + t * kProductMany;
    const __m512i code = _mm512_loadu_si512(codes + t * kProductRows);
    const __m512i low = _mm512_permutex2var_epi8(_mm512_loadu_si512(table), code, _mm512_loadu_si512(table + 64));
    const __m512i high =
        _mm512_permutex2var_epi8(_mm512_loadu_si512(table + 128), code, _mm512_loadu_si512(table + 192));
    const __m512i found = _mm512_mask_blend_epi8(_mm512_movepi8_mask(code), low, high);
    both = _mm512_add_epi16(both, found);  // of the odd rows too, 256 times
    odd = _mm512_add_epi16(odd, _mm512_srli_epi16(found, 8));
  }
  const __m512i even = _mm512_sub_epi16(both, _mm512_slli_epi16(odd, 8));
  std::uint16_t rows[2][32];
  Store(rows[0], _mm512_unpacklo_epi16(even, odd));  // rows 0 to 7 of each 16
  Store(rows[1], _mm512_unpackhi_epi16(even, odd));  // rows 8 to 15
  for (int i = 0; i < 8; ++i) {
    const __m256i part = _mm256_cvtepu16_epi32(LoadAt<__m128i>(rows[i % 2], i / 2, 16));
    Store(sums + 8 * i, _mm256_add_epi32(part, LoadAt<__m256i>(sums, i, 32)));
  }
}

void QuantizeTables(const ProductQuantizeArgs& a, std::int64_t table_begin, std::int64_t table_end) noexcept {
  const ProductWeight& w = a.weight;
  const bool narrow = ProductIsNarrow(w);
  const __m512 inverse = _mm512_set1_ps(a.scale.inverse);
  for (Index i = table_begin; i < table_end; ++i) {
    const float* table = a.tables + i * ProductTableEntries(w);
    const __m512 low = _mm512_set1_ps(LoadAt<float>(a.lows, i, 4));
    const Index j = i % kProductGroup;
    std::uint8_t* out =
        a.quantized + (narrow ? ((i / kProductGroup * 2 + j % 2) * 4 + j / 2) * kProductFew : i * kProductMany);
    for (Index k = 0; k < ProductTableEntries(w); k += 16) {
      const Index left = w.entries - k;
      const __mmask16 kept = a.scale.inverse == 0 || left <= 0 ? 0 : left >= 16 ? 0xffff : (1 << left) - 1;
      const __m512 above = _mm512_sub_ps(_mm512_maskz_loadu_ps(kept, table + k), low);
      const __m512i q = _mm512_maskz_cvtps_epi32(kept, _mm512_mul_ps(above, inverse));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + k), _mm512_cvtepi32_epi8(q));
    }
  }
}

}  // namespace

const ProductKernels kProductAvx512{MakeTables, Matmul, MeasureTables, QuantizeTables, MatmulInt8, CodesFit};

}  // namespace tersetorch
