#include <immintrin.h>

#include <cstdint>

#include "kernels/bitplane_matmul/bitplane_matmul.h"
#include "kernels/bitplane_matmul/bitplane_matmul_simd.h"
#include "kernels/common/sign_tiles.h"
#include "kernels/common/vectors.h"

namespace tersetorch {
namespace {

// Fours of columns g and g + 4 of half a word share a register: one is in the low, the other in the high 16 bits of
// the rows' numbers.
void Tables(const BitplaneTablesArgs& a, Index word_begin, Index word_end) noexcept {
  ForFours(a, word_begin, word_end, [](char* tables, Index g, __m256i sums) {
    Store(tables + (g / 8 * 8 + g % 4 * 2 + g / 4 % 2) * kTableBytes, LowBytesThenHigh(sums));
  });
}

template <int kSamples>
struct AddWords {
  TablesEnd end;
  template <int kTiles>
  void operator()(const char* weight, Index step, Index words, const char* tables, std::int32_t* to) const {
    constexpr int kVectors = 2 * kTiles;  // of 16 rows
    const __m512i low = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(1));
    // A byte of each 16 bits, twice; beside its nibbles, which of the register's four times 16 bytes is looked at.
    const __m512i first = _mm512_set1_epi64(0x3030202010100000), second = _mm512_set1_epi64(0x3838282818180808);
    const __m512i aside = _mm512_set1_epi8(0x30), where = _mm512_set1_epi32(0x30201000);
    constexpr int kAsideIsWhere = 0xba;  // (bits & ~aside) | where
    const __m512i ones = _mm512_set1_epi16(1);
    for (Index i = 0; i < words; i += kExactWords) {
      __m512i sums[kSamples][kVectors];
#pragma GCC unroll 8
      for (int m = 0; m < kSamples; ++m) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sums[m][v] = _mm512_setzero_si512();
      }
      for (Index k = i; k < i + kExactWords && k < words; ++k) {
        __m512i bytes[4][kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          const char* w = weight + v / 2 * step + k * kTileWordBytes + v % 2 * 128;
          // A single sample waits for memory; the hardware's own prefetching ends at every page.
          if (kSamples == 1) {
            _mm_prefetch(w + 2048, _MM_HINT_T0);
            _mm_prefetch(w + 2048 + 64, _MM_HINT_T0);
          }
          const __m512i rows = _mm512_loadu_si512(w), later_rows = _mm512_loadu_si512(w + 64);
          const __m512i low_half = _mm512_permutex2var_epi32(rows, low, later_rows);
          const __m512i high_half = _mm512_permutex2var_epi32(rows, high, later_rows);
          bytes[0][v] = _mm512_multishift_epi64_epi8(first, low_half);
          bytes[1][v] = _mm512_multishift_epi64_epi8(second, low_half);
          bytes[2][v] = _mm512_multishift_epi64_epi8(first, high_half);
          bytes[3][v] = _mm512_multishift_epi64_epi8(second, high_half);
        }
        const Index used = (end.Fours(tables) + 7) / 8 * 2;  // by halves of a word
        // Unrolled, the compiler would look everything up before it adds, and keep it in memory.
#pragma GCC unroll 1
        for (Index byte = 0; byte < used; ++byte) {
          auto& nibbles = bytes[byte];
#pragma GCC unroll 1
          for (int nibble = 0; nibble < 2; ++nibble) {
            __m512i places[kVectors];
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) {
              places[v] = _mm512_ternarylogic_epi32(nibbles[v], aside, where, kAsideIsWhere);
              nibbles[v] = _mm512_srli_epi16(nibbles[v], 4);
            }
#pragma GCC unroll 8
            for (int m = 0; m < kSamples; ++m) {
              const auto table = LoadAt<__m512i>(tables, m * kWordTables, kTableBytes);
#pragma GCC unroll 4
              for (int v = 0; v < kVectors; ++v) {
                sums[m][v] = _mm512_add_epi16(sums[m][v], _mm512_permutexvar_epi8(places[v], table));
              }
            }
            tables += 2 * kTableBytes;
          }
        }
        tables += (kSamples - 1) * kWordTables * kTableBytes;
      }
#pragma GCC unroll 8
      for (int m = 0; m < kSamples; ++m) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          std::int32_t* sum = to + ((v / 2 * kSamples + m) * 2 + v % 2) * 16;
          const __m512i both = _mm512_madd_epi16(sums[m][v], ones);
          _mm512_storeu_si512(sum, _mm512_add_epi32(_mm512_loadu_si512(sum), both));
        }
      }
    }
  }
};

template <int kSamples, int kTogether>
void MultiplySamples(const BitplaneMatmulArgs& a, Index tile_begin, Index tile_end) {
  ForTiles<std::int32_t, kSamples, kTogether, kTableBytes>(
      a.weight, a.words, a.tables, tile_begin, tile_end, AddWords<kSamples>{EndOf(a)},
      [&](Index tile, const std::int32_t (&dots)[kSamples][kTileRows]) { FinishTile<kSamples>(a, tile, dots); });
}

void Multiply(const BitplaneMatmulArgs& a, Index tile_begin, Index tile_end) noexcept {
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

const BitplaneMatmulKernels kBitplaneMatmulAvx512 = {&Tables, &Multiply};

}  // namespace tersetorch
