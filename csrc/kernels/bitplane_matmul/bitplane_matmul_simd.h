// What the vector levels share: reading x, and what becomes of a dot. Local to the including file.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "kernels/bitplane_matmul/bitplane_matmul.h"
#include "kernels/common/sign_tiles.h"
#include "kernels/common/vectors.h"

namespace tersetorch {
namespace {

constexpr Index kTableBytes = 32;
constexpr Index kExactWords = 2;  // whose sums fit 16 bits

// The 16 sums of four numbers that signs can make: entry e subtracts number j where its bit j is set.
inline __m256i SignedSums(const std::int16_t* v) {
  const __m256i entry = _mm256_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  __m256i sum = _mm256_setzero_si256();
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    // -1 where the bit is set, else 1.
    const __m256i bit = _mm256_and_si256(_mm256_srli_epi16(entry, j), _mm256_set1_epi16(1));
    const __m256i sign = _mm256_sub_epi16(_mm256_set1_epi16(1), _mm256_add_epi16(bit, bit));
    sum = _mm256_add_epi16(sum, _mm256_sign_epi16(_mm256_set1_epi16(v[j]), sign));
  }
  return sum;
}

inline __m256i LowBytesThenHigh(__m256i numbers) {
  const __m256i low = _mm256_and_si256(numbers, _mm256_set1_epi16(255)), high = _mm256_srli_epi16(numbers, 8);
  return _mm256_permute4x64_epi64(_mm256_packus_epi16(low, high), 0xd8);
}

// Calls store(tables of a word and sample, g, sums) for each four columns of words [word_begin, word_end), 0 past the
// last.
template <typename StoreTable>
void ForFours(const BitplaneTablesArgs& a, Index word_begin, Index word_end, const StoreTable& store) {
  for (Index i = word_begin; i < word_end; ++i) {
    const Index left = a.columns - i * 64;
    for (Index n = 0; n < a.samples; ++n) {
      alignas(64) std::int16_t v[64] = {};
      BitplaneNumbers(a, n, i * 64, left < 64 ? left : 64, v);
      char* tables = reinterpret_cast<char*>(a.tables) + (i * a.samples + n) * kWordTables * kTableBytes;
      for (Index g = 0; g < kWordTables; ++g) store(tables, g, SignedSums(v + 4 * g));
    }
  }
}

// y of a tile's rows for a sample.
void FinishSample(const BitplaneMatmulArgs& a, Index tile, Index n, const std::int32_t (&dots)[kTileRows],
                  const float (&scale)[kTileRows], const float (&bias)[kTileRows],
                  const std::int32_t (&thresholds)[kTileRows]) {
  const Index row = tile * kTileRows, rows = a.rows - row < kTileRows ? a.rows - row : kTileRows;
  std::uint32_t bits = 0;
  for (Index r = 0; r < rows; r += 8) {
    const auto dot = LoadAt<__m256i>(dots, r, 4);
    const Index at = 4 * (n * a.rows + row + r);
    if (a.bits != nullptr) {
      const __m256i below = _mm256_cmpgt_epi32(LoadAt<__m256i>(thresholds, r, 4), dot);
      bits |= static_cast<std::uint32_t>(_mm256_movemask_ps((__m256)below)) << r;
      continue;
    }
    const __m256 scaled =
        _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), LoadAt<__m256>(scale, r, 4), LoadAt<__m256>(bias, r, 4));
    const __m256i y = a.dots != nullptr ? dot : (__m256i)scaled;
    char* to = a.dots != nullptr ? reinterpret_cast<char*>(a.dots) : reinterpret_cast<char*>(a.floats);
    if (r + 8 <= rows) {
      Store(to + at, y);
    } else {
      for (Index i = 0; r + i < rows; ++i) Store(to + at + 4 * i, ((Int8)y)[i]);
    }
  }
  if (a.bits == nullptr) return;
  if (rows < kTileRows) bits &= (std::uint32_t{1} << rows) - 1;
  char* word = reinterpret_cast<char*>(a.bits) + 8 * (n * ((a.rows + 63) / 64) + tile / 2);
  Store(word + tile % 2 * 4, bits);
  // The second half of the last word, where no tile has it.
  if (tile % 2 == 0 && row + kTileRows >= a.rows) Store(word + 4, std::uint32_t{0});
}

template <int kSamples>
void FinishTile(const BitplaneMatmulArgs& a, Index tile, const std::int32_t (&dots)[kSamples][kTileRows]) {
  float scale[kTileRows] = {}, bias[kTileRows] = {};
  std::int32_t thresholds[kTileRows] = {};
  for (Index r = 0; r < kTileRows && tile * kTileRows + r < a.rows; ++r) {
    const Index row = tile * kTileRows + r;
    scale[r] = a.scale == nullptr ? 1.0f : LoadAt<float>(a.scale, row, 4);
    bias[r] = a.bias == nullptr ? 0.0f : LoadAt<float>(a.bias, row, 4);
    thresholds[r] = a.thresholds == nullptr ? 0 : LoadAt<std::int32_t>(a.thresholds, row, 4);
  }
  for (Index n = 0; n < a.samples; ++n) FinishSample(a, tile, n, dots[n], scale, bias, thresholds);
}

}  // namespace
}  // namespace tersetorch
