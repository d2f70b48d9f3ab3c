#include <immintrin.h>

#include <cstdint>

#include "kernels/common/sign_tiles.h"
#include "kernels/common/vectors.h"
#include "kernels/sign_matmul/sign_matmul.h"
#include "kernels/sign_matmul/sign_matmul_simd.h"

namespace tersetorch {
namespace {

constexpr Index kTableBytes = 64;

void Tables(const SignTablesArgs& a, Index word_begin, Index word_end) noexcept {
  __m512 minus[4];  // the sign bit where number j of a table's entry is subtracted
  const __m512i entry = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int j = 0; j < 4; ++j) {
    const __mmask16 subtracted = _mm512_test_epi32_mask(entry, _mm512_set1_epi32(1 << j));
    minus[j] = (__m512)_mm512_maskz_set1_epi32(subtracted, 1 << 31);
  }
  ForFours<kTableBytes>(a, word_begin, word_end, [&](const float* x, char* table) {
    const auto number = [&](int j) { return _mm512_xor_ps(_mm512_set1_ps(x[j]), minus[j]); };
    _mm512_storeu_ps(table, _mm512_add_ps(_mm512_add_ps(number(0), number(1)), _mm512_add_ps(number(2), number(3))));
  });
}

template <int kSamples>
struct AddWords {
  template <int kTiles>
  void operator()(const char* weight, Index step, Index words, const char* tables, float* to) const {
    constexpr int kVectors = 2 * kTiles;  // of 16 rows
    const __m512i low = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(1));
    __m512 sums[kSamples][kVectors];
#pragma GCC unroll 8
    for (int m = 0; m < kSamples; ++m) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        sums[m][v] = _mm512_loadu_ps(to + ((v / 2 * kSamples + m) * 2 + v % 2) * 16);
      }
    }
    for (Index i = 0; i < words; ++i) {
      __m512i halves[2][kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const char* w = weight + v / 2 * step + i * kTileWordBytes + v % 2 * 128;
        // A single sample waits for memory; the hardware's own prefetching ends at every page.
        if (kSamples == 1) {
          _mm_prefetch(w + 2048, _MM_HINT_T0);
          _mm_prefetch(w + 2048 + 64, _MM_HINT_T0);
        }
        const __m512i first = _mm512_loadu_si512(w), second = _mm512_loadu_si512(w + 64);
        halves[0][v] = _mm512_permutex2var_epi32(first, low, second);
        halves[1][v] = _mm512_permutex2var_epi32(first, high, second);
      }
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        // Unrolled, the compiler would look everything up before it adds, and keep it in memory.
#pragma GCC unroll 1
        for (int g = 0; g < 8; ++g) {
#pragma GCC unroll 8
          for (int m = 0; m < kSamples; ++m) {
            const __m512 table = _mm512_loadu_ps(tables + (m * kWordTables + 8 * h + g) * kTableBytes);
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) {
              sums[m][v] = _mm512_add_ps(sums[m][v], _mm512_permutexvar_ps(halves[h][v], table));
            }
          }
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) halves[h][v] = _mm512_srli_epi32(halves[h][v], 4);
        }
      }
      tables += kSamples * kWordTables * kTableBytes;
    }
#pragma GCC unroll 8
    for (int m = 0; m < kSamples; ++m) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        _mm512_storeu_ps(to + ((v / 2 * kSamples + m) * 2 + v % 2) * 16, sums[m][v]);
      }
    }
  }
};

template <int kSamples, int kTogether>
void MultiplySamples(const SignMatmulArgs& a, Index tile_begin, Index tile_end) {
  ForTiles<float, kSamples, kTogether, kTableBytes>(
      a.weight, a.words, a.tables, tile_begin, tile_end, AddWords<kSamples>{},
      [&](Index tile, const float (&dots)[kSamples][kTileRows]) { FinishTile<kSamples>(a, tile, dots); });
}

void Multiply(const SignMatmulArgs& a, Index tile_begin, Index tile_end) noexcept {
  switch (a.samples) {
    case 1:
      return MultiplySamples<1, 2>(a, tile_begin, tile_end);
    case 2:
      return MultiplySamples<2, 2>(a, tile_begin, tile_end);
    case 4:
      return MultiplySamples<4, 2>(a, tile_begin, tile_end);
    default:
      return MultiplySamples<8, 1>(a, tile_begin, tile_end);
  }
}

}  // namespace

const SignMatmulKernels kSignMatmulAvx512 = {&Tables, &Multiply};

}  // namespace tersetorch
