#include <immintrin.h>

#include <cstdint>

#include "kernels/common/sign_tiles.h"
#include "kernels/common/vectors.h"
#include "kernels/sign_matmul/sign_matmul.h"
#include "kernels/sign_matmul/sign_matmul_simd.h"

namespace tersetorch {
namespace {

constexpr Index kTableBytes = 32;
constexpr int kVectors = 2;  // of 8 rows, whose sums stay in registers

// The sums in which the fourth number is added.
void Tables(const SignTablesArgs& a, Index word_begin, Index word_end) noexcept {
  const __m256i entry = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  __m256 minus[3];
  const __m256 sign = _mm256_set1_ps(-0.0f);
  for (int j = 0; j < 3; ++j) minus[j] = _mm256_and_ps((__m256)_mm256_slli_epi32(entry, 31 - j), sign);
  ForFours<kTableBytes>(a, word_begin, word_end, [&](const float* x, char* table) {
    const auto number = [&](int j) { return _mm256_xor_ps(_mm256_set1_ps(x[j]), minus[j]); };
    const __m256 sum =
        _mm256_add_ps(_mm256_add_ps(number(0), number(1)), _mm256_add_ps(number(2), _mm256_set1_ps(x[3])));
    _mm256_storeu_ps(reinterpret_cast<float*>(table), sum);
  });
}

// Rows as the low and the high halves of their words come out of 256 bits: 0, 1, 4, 5, 2, 3, 6, 7; and back.
__m256 InOrder(__m256 rows) { return (__m256)_mm256_permute4x64_pd((__m256d)rows, 0xd8); }

// kPart of kSamples samples, from the tables and sums of the first of them on.
template <int kSamples, int kPart>
void AddRows(const char* weight, Index words, const char* tables, float* to) {
  const __m256i fourths = _mm256_set1_epi32(static_cast<int>(0x88888888));
  const __m256 sign = _mm256_set1_ps(-0.0f);
  __m256 sums[kPart][kVectors];
#pragma GCC unroll 4
  for (int m = 0; m < kPart; ++m) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) sums[m][v] = InOrder(_mm256_loadu_ps(to + m * kTileRows + v * 8));
  }
  for (Index i = 0; i < words; ++i) {
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      // Where the fourth sign is -1, the other way around: the place of the opposite signs, what is found there
      // negated.
      __m256i places[kVectors], minus[kVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        const auto first = LoadAt<__m256>(weight, 2 * v, 32), second = LoadAt<__m256>(weight, 2 * v + 1, 32);
        const auto bits =
            (__m256i)(h == 0 ? _mm256_shuffle_ps(first, second, 0x88) : _mm256_shuffle_ps(first, second, 0xdd));
        minus[v] = _mm256_and_si256(bits, fourths);
        places[v] = _mm256_xor_si256(bits, _mm256_sub_epi32(minus[v], _mm256_srli_epi32(minus[v], 3)));
      }
      // Unrolled, the compiler would look everything up before it adds, and keep it in memory.
#pragma GCC unroll 1
      for (int g = 0; g < 8; ++g) {
        __m256 flip[kVectors];
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) flip[v] = _mm256_and_ps((__m256)_mm256_slli_epi32(minus[v], 28), sign);
#pragma GCC unroll 4
        for (int m = 0; m < kPart; ++m) {
          const auto table = LoadAt<__m256>(tables, m * kWordTables + 8 * h + g, kTableBytes);
#pragma GCC unroll 2
          for (int v = 0; v < kVectors; ++v) {
            const __m256 found = _mm256_permutevar8x32_ps(table, places[v]);
            sums[m][v] = _mm256_add_ps(sums[m][v], _mm256_xor_ps(found, flip[v]));
          }
        }
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) {
          places[v] = _mm256_srli_epi32(places[v], 4);
          minus[v] = _mm256_srli_epi32(minus[v], 4);
        }
      }
    }
    weight += kTileWordBytes;
    tables += kSamples * kWordTables * kTableBytes;
  }
#pragma GCC unroll 4
  for (int m = 0; m < kPart; ++m) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) _mm256_storeu_ps(to + m * kTileRows + v * 8, InOrder(sums[m][v]));
  }
}

template <int kSamples>
struct AddWords {
  template <int kTiles>
  void operator()(const char* weight, Index, Index words, const char* tables, float* to) const {
    static_assert(kTiles == 1);
    constexpr int kPart = kSamples < 4 ? kSamples : 4;
    for (int m = 0; m < kSamples; m += kPart) {
      for (int v = 0; v < 4; v += kVectors) {
        AddRows<kSamples, kPart>(weight + v * 64, words, tables + m * kWordTables * kTableBytes,
                                 to + m * kTileRows + v * 8);
      }
    }
  }
};

template <int kSamples>
void MultiplySamples(const SignMatmulArgs& a, Index tile_begin, Index tile_end) {
  ForTiles<float, kSamples, 1, kTableBytes>(
      a.weight, a.words, a.tables, tile_begin, tile_end, AddWords<kSamples>{},
      [&](Index tile, const float (&dots)[kSamples][kTileRows]) { FinishTile<kSamples>(a, tile, dots); });
}

void Multiply(const SignMatmulArgs& a, Index tile_begin, Index tile_end) noexcept {
  switch (a.samples) {
    case 1:
      return MultiplySamples<1>(a, tile_begin, tile_end);
    case 2:
      return MultiplySamples<2>(a, tile_begin, tile_end);
    case 4:
      return MultiplySamples<4>(a, tile_begin, tile_end);
    default:
      return MultiplySamples<8>(a, tile_begin, tile_end);
  }
}

}  // namespace

const SignMatmulKernels kSignMatmulAvx2 = {&Tables, &Multiply};

}  // namespace tersetorch
