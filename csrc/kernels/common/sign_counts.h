// How many bits of signs differ, in lookups of 256 bits: for levels without a population count of vectors.
//
// Method: a byte of a vector is a row, and names four of its signs. For the same four of two samples a table has, at
//         each of the 16 numbers that they can be, how many differ: 4 bits for either sample, so that a shuffle and an
//         addition count 256 products. Three such sums fit 4 bits; then they go to bytes, 21 at a time, and those to
//         16 bits.
// Limits: 3 shuffles, 2 additions and 4 operations that part the samples, for 768 products: 3 cycles of three ports,
//         256 products a cycle, where full adders and a count of nibbles take 14 operations for 512, 110 a cycle. 4
//         tiles together take 4.5 loads for 9 operations; a large layer reaches two thirds of the limit. A weight
//         becomes vectors of nibbles at 56 operations for a word of 32 rows, worth those of two samples.
//
// Written once for the kernels that have such a level; everything here is local to the including file.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "kernels/common/vectors.h"

namespace tersetorch {
namespace {

constexpr Index kCountRows = 32;                   // of a vector
constexpr Index kCountVector = 32;                 // its bytes
constexpr Index kCountWords = 12;                  // counted together: their nibbles of 4 tiles stay in the cache
constexpr Index kCountNibbles = 16 * kCountWords;  // fours of columns
constexpr int kCountTiles = 4;                     // of 32 rows
constexpr Index kMostCountWords = 1023;            // whose counts surely fit 16 bits
constexpr Index kCountSamples = 64;                // counted together
constexpr Index kTriples = 21;                     // of fours, whose counts surely fit a byte

// [a | b << 4][i]: how many bits of i and a differ, and 16 times those of i and b.
struct DifferingOfPairs {
  constexpr DifferingOfPairs() : of{} {
    for (int pair = 0; pair < 256; ++pair) {
      for (int i = 0; i < 16; ++i) {
        of[pair][i] =
            static_cast<std::uint8_t>(__builtin_popcount((pair & 15) ^ i) + 16 * __builtin_popcount((pair >> 4) ^ i));
      }
    }
  }
  alignas(64) std::uint8_t of[256][16];
};
constexpr DifferingOfPairs kDifferingOfPairs;

// Eighths of the places in kDifferingOfPairs, of some words of two samples: the low nibbles of a word's bytes, then the
// high ones.
struct PairCodes {
  void Set(Index word, const char* a, const char* b) {
    const __m128i nibbles = _mm_set1_epi8(15), places = _mm_set1_epi16(2 | 32 << 8);
    const __m128i both = _mm_unpacklo_epi8(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(a)),
                                           _mm_loadl_epi64(reinterpret_cast<const __m128i*>(b)));
    const __m128i high = _mm_and_si128(_mm_srli_epi16(both, 4), nibbles);
    Store(of + 16 * word, _mm_maddubs_epi16(_mm_and_si128(both, nibbles), places));
    Store(of + 16 * word + 8, _mm_maddubs_epi16(high, places));
  }
  void End(Index words) { of[16 * words] = of[16 * words + 1] = 0; }
  alignas(16) std::uint16_t of[kCountNibbles + 2];
};

// The nibbles of some words of up to kCountTiles tiles, a vector for each, in the order of PairCodes.
struct TileNibbles {
  // Of 32 rows, so many side by side in a vector: kVectors are 8 of whole words, or twice 4 of half words.
  template <int kVectors>
  void Set(Index tile, Index word, const char* weight) {
    for (int part = 0; part < 8; part += kVectors) {
      __m256i from[kVectors], to[kVectors];
      for (int i = 0; i < kVectors; ++i) from[i] = LoadAt<__m256i>(weight, part + i, kCountVector);
      const auto interleave = [](const __m256i(&in)[kVectors], __m256i(&out)[kVectors]) {
#pragma GCC unroll 4
        for (int i = 0; i < kVectors / 2; ++i) {
          out[2 * i] = _mm256_unpacklo_epi8(in[i], in[i + kVectors / 2]);
          out[2 * i + 1] = _mm256_unpackhi_epi8(in[i], in[i + kVectors / 2]);
        }
      };
      // The bits of a byte's place turn by one each time: vector, row of a vector's half, byte of the row.
      interleave(from, to);
      interleave(to, from);
      interleave(from, to);
      interleave(to, from);
      const __m256i nibbles = _mm256_set1_epi8(15);
      for (int i = 0; i < kVectors; ++i) {
        Store(At(tile, 16 * word + part + i), _mm256_and_si256(from[i], nibbles));
        Store(At(tile, 16 * word + 8 + part + i), _mm256_and_si256(_mm256_srli_epi16(from[i], 4), nibbles));
      }
    }
  }
  void End(Index tile, Index words) {
    for (Index i = 16 * words; i < 16 * words + 2; ++i) Store(At(tile, i), _mm256_setzero_si256());
  }
  char* At(Index tile, Index nibble) { return of[nibble][tile]; }
  alignas(64) char of[kCountNibbles + 2][kCountTiles][kCountVector];
};

// Of two samples and 32 rows: those of even and of odd bytes, of the first and of the second sample.
struct PairCounts {
  // Of a sample, for rows in their order; kVectors as in TileNibbles.
  template <int kVectors>
  void InOrder(int sample, __m256i (&rows)[4]) const {
    const auto even = LoadAt<__m256i>(of, 2 * sample, kCountVector),
               odd = LoadAt<__m256i>(of, 2 * sample + 1, kCountVector);
    const __m256i order =
        kVectors == 8 ? _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7) : _mm256_setr_epi32(0, 1, 4, 5, 2, 3, 6, 7);
    const __m256i halves[2] = {_mm256_unpacklo_epi16(even, odd), _mm256_unpackhi_epi16(even, odd)};
    for (int h = 0; h < 2; ++h) {
      const __m256i half = _mm256_permutevar8x32_epi32(halves[h], order);
      rows[2 * h] = _mm256_cvtepu16_epi32(_mm256_castsi256_si128(half));
      rows[2 * h + 1] = _mm256_cvtepu16_epi32(_mm256_extracti128_si256(half, 1));
    }
  }
  alignas(32) std::uint16_t of[4][16];
};

// Adds up three fours of a tile: those of the first sample in bytes, and those of the second, with 16 times the odd
// bytes of the first in between, in 16 bits. By hand, because GCC 12 keeps some of the sums of four tiles in memory.
inline void AddTriple(const char* rows, const __m256i (&tables)[3], __m256i low, __m256i& first, __m256i& both) {
  constexpr Index kNext = kCountTiles * kCountVector;
  __m256i sum, second, third;
  asm("vpshufb %[r0], %[t0], %[sum]\n\t"
      "vpshufb %[r1], %[t1], %[second]\n\t"
      "vpshufb %[r2], %[t2], %[third]\n\t"
      "vpaddb %[second], %[sum], %[sum]\n\t"
      "vpaddb %[third], %[sum], %[sum]\n\t"
      "vpand %[low], %[sum], %[second]\n\t"
      "vpsrlw $4, %[sum], %[sum]\n\t"
      "vpaddb %[second], %[first], %[first]\n\t"
      "vpaddw %[sum], %[both], %[both]"
      : [sum] "=&x"(sum), [second] "=&x"(second), [third] "=&x"(third), [first] "+x"(first), [both] "+x"(both)
      : [t0] "x"(tables[0]), [t1] "x"(tables[1]), [t2] "x"(tables[2]), [low] "x"(low),
        [r0] "m"(*reinterpret_cast<const __m256i*>(rows)), [r1] "m"(*reinterpret_cast<const __m256i*>(rows + kNext)),
        [r2] "m"(*reinterpret_cast<const __m256i*>(rows + 2 * kNext)));
}

// Adds up some words of kTogether tiles from an even one on. A function of its own, whose loop has the registers.
template <int kTogether>
__attribute__((noinline)) void AddTiles(const PairCodes& codes, TileNibbles& nibbles, Index tile, Index words,
                                        PairCounts* counts) {
  const __m256i low = _mm256_set1_epi8(15), even = _mm256_set1_epi16(255);
  const char* rows = nibbles.At(tile, 0);
  const Index triples = (16 * words + 2) / 3, parts = (triples + kTriples - 1) / kTriples;
  Index t = 0;
  for (Index part = 1; part <= parts; ++part) {
    __m256i first[kTogether], both[kTogether];
    for (int r = 0; r < kTogether; ++r) first[r] = both[r] = _mm256_setzero_si256();
    for (const Index end = triples * part / parts; t < end; ++t) {
      __m256i tables[3];
#pragma GCC unroll 3
      for (int i = 0; i < 3; ++i) {
        const Index code = codes.of[3 * t + i];
        tables[i] = _mm256_broadcastsi128_si256(LoadAt<__m128i>(kDifferingOfPairs.of, code, 8));
      }
#pragma GCC unroll 4
      for (int r = 0; r < kTogether; ++r) {
        AddTriple(rows + (kCountTiles * 3 * t + r) * kCountVector, tables, low, first[r], both[r]);
      }
    }
    for (int r = 0; r < kTogether; ++r) {
      const __m256i odd = _mm256_srli_epi16(first[r], 8);
      const __m256i second = _mm256_sub_epi16(both[r], _mm256_slli_epi16(odd, 4));
      const __m256i parts[4] = {_mm256_and_si256(first[r], even), odd, _mm256_and_si256(second, even),
                                _mm256_srli_epi16(second, 8)};
      for (int i = 0; i < 4; ++i) {
        std::uint16_t* count = counts[tile + r].of[i];
        Store(count, _mm256_add_epi16(LoadAt<__m256i>(count, 0, kCountVector), parts[i]));
      }
    }
  }
}

// Adds up some words of two samples with some tiles.
inline void AddDiffering(const PairCodes& codes, TileNibbles& nibbles, Index tiles, Index words,
                         PairCounts (&counts)[kCountTiles]) {
  if (tiles == kCountTiles) return AddTiles<kCountTiles>(codes, nibbles, 0, words, counts);
  if (tiles > 1) AddTiles<2>(codes, nibbles, 0, words, counts);
  if (tiles % 2 == 1) AddTiles<1>(codes, nibbles, tiles - 1, words, counts);
}

}  // namespace
}  // namespace tersetorch
