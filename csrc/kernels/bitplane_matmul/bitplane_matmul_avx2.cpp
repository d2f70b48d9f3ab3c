#include <immintrin.h>

#include <cstdint>

#include "kernels/bitplane_matmul/bitplane_matmul.h"
#include "kernels/bitplane_matmul/bitplane_matmul_simd.h"
#include "kernels/common/sign_tiles.h"
#include "kernels/common/vectors.h"

namespace tersetorch {
namespace {

void Tables(const BitplaneTablesArgs& a, Index word_begin, Index word_end) noexcept {
  ForFours(a, word_begin, word_end,
           [](char* tables, Index g, __m256i sums) { Store(tables + g * kTableBytes, LowBytesThenHigh(sums)); });
}

// Byte k of a word of 32 rows: in half h of 128 bits, at p, that of row 4 (p / 2) + 2 h + p % 2.
void Bytes(const char* weight, __m256i (&of)[8]) {
  __m256i w[8], pairs[8], quads[8];
  for (int i = 0; i < 8; ++i) w[i] = LoadAt<__m256i>(weight, i, 32);
  const auto interleave = [](const __m256i(&from)[8], int distance, __m256i(&to)[8]) {
    for (int i = 0, o = 0; i < 8; ++i) {
      if ((i & distance) != 0) continue;
      to[o++] = _mm256_unpacklo_epi8(from[i], from[i + distance]);
      to[o++] = _mm256_unpackhi_epi8(from[i], from[i + distance]);
    }
  };
  interleave(w, 4, pairs);      // vector: words of w modulo 4, row of a pair
  interleave(pairs, 4, quads);  // words modulo 2, row, upper half of the bytes
  interleave(quads, 4, w);      // row, upper half, upper quarter
  interleave(w, 4, of);         // the bytes in their order
}

// Two lookups in registers whose bytes make numbers of 16 bits.
template <int kSamples, int kPart>
void AddRows(const TablesEnd& end, const char* weight, Index words, const char* tables, std::int32_t* to) {
  const __m256i nibbles = _mm256_set1_epi8(15);
  for (Index i = 0; i < words; i += kExactWords) {
    __m256i sums[kPart][2];
#pragma GCC unroll 4
    for (int m = 0; m < kPart; ++m) sums[m][0] = sums[m][1] = _mm256_setzero_si256();
    for (Index k = i; k < i + kExactWords && k < words; ++k) {
      __m256i bytes[8];
      Bytes(weight + k * kTileWordBytes, bytes);
      const Index fours = end.Fours(tables);
#pragma GCC unroll 1
      for (Index g = 0; g < fours; ++g) {
        const __m256i both = bytes[g / 2];
        const __m256i place = _mm256_and_si256(g % 2 == 0 ? both : _mm256_srli_epi16(both, 4), nibbles);
#pragma GCC unroll 4
        for (int m = 0; m < kPart; ++m) {
          const char* table = tables + (m * kWordTables + g) * kTableBytes;
          const __m256i low = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(LoadAt<__m128i>(table, 0, 16)), place);
          const __m256i high = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(LoadAt<__m128i>(table, 1, 16)), place);
          sums[m][0] = _mm256_add_epi16(sums[m][0], _mm256_unpacklo_epi8(low, high));
          sums[m][1] = _mm256_add_epi16(sums[m][1], _mm256_unpackhi_epi8(low, high));
        }
      }
      tables += kSamples * kWordTables * kTableBytes;
    }
    for (int m = 0; m < kPart; ++m) {
      for (int part = 0; part < 4; ++part) {
        const __m256i of_half = sums[m][part / 2];
        const __m128i half = part % 2 == 0 ? _mm256_castsi256_si128(of_half) : _mm256_extracti128_si256(of_half, 1);
        char* sum = reinterpret_cast<char*>(to + m * kTileRows + part * 8);
        Store(sum, _mm256_add_epi32(LoadAt<__m256i>(sum, 0, 32), _mm256_cvtepi16_epi32(half)));
      }
    }
  }
}

// From rows 0, 1, 4, 5, 8, 9, 12, 13 and 2, 3, 6, 7, 10, 11, 14, 15, and the same of those after them.
void InOrder(std::int32_t (&sums)[kTileRows]) {
  for (int half = 0; half < kTileRows; half += 16) {
    const auto a = LoadAt<__m256i>(sums, half, 4), b = LoadAt<__m256i>(sums, half + 8, 4);
    const __m256i low = _mm256_unpacklo_epi64(a, b), high = _mm256_unpackhi_epi64(a, b);
    Store(sums + half, _mm256_permute2x128_si256(low, high, 0x20));
    Store(sums + half + 8, _mm256_permute2x128_si256(low, high, 0x31));
  }
}

template <int kSamples>
struct AddWords {
  TablesEnd end;
  template <int kTiles>
  void operator()(const char* weight, Index, Index words, const char* tables, std::int32_t* to) const {
    static_assert(kTiles == 1);
    constexpr int kPart = kSamples < 4 ? kSamples : 4;
    for (int m = 0; m < kSamples; m += kPart) {
      const Index from = m * kWordTables * kTableBytes;
      AddRows<kSamples, kPart>({end.fours, end.last + from}, weight, words, tables + from, to + m * kTileRows);
    }
  }
};

template <int kSamples>
void MultiplySamples(const BitplaneMatmulArgs& a, Index tile_begin, Index tile_end) {
  ForTiles<std::int32_t, kSamples, 1, kTableBytes>(a.weight, a.words, a.tables, tile_begin, tile_end,
                                                   AddWords<kSamples>{EndOf(a)},
                                                   [&](Index tile, std::int32_t (&sums)[kSamples][kTileRows]) {
                                                     for (auto& of_sample : sums) InOrder(of_sample);
                                                     FinishTile<kSamples>(a, tile, sums);
                                                   });
}

void Multiply(const BitplaneMatmulArgs& a, Index tile_begin, Index tile_end) noexcept {
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

const BitplaneMatmulKernels kBitplaneMatmulAvx2 = {&Tables, &Multiply};

}  // namespace tersetorch
