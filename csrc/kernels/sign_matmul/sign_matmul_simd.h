// What the vector levels share: reading x, and what becomes of a dot. Local to the including file.
#pragma once

#include <cstdint>

#include "kernels/common/sign_tiles.h"
#include "kernels/sign_matmul/sign_matmul.h"

namespace tersetorch {
namespace {

// Calls make(numbers, table) for each four columns of words [word_begin, word_end), 0 past the last.
template <Index kTableBytes, typename Make>
void ForFours(const SignTablesArgs& a, Index word_begin, Index word_end, const Make& make) {
  for (Index i = word_begin; i < word_end; ++i) {
    const Index first = i * 64, count = a.columns - first < 64 ? a.columns - first : 64;
    for (Index n = 0; n < a.samples; ++n) {
      alignas(64) float numbers[64] = {};
      Index c = 0;
      for (; c + 8 <= count; c += 8) Store(numbers + c, LoadFloats(a.x, a.stored_as, n * a.columns + first + c));
      for (; c < count; ++c) numbers[c] = LoadFloat(a.x, a.stored_as, n * a.columns + first + c);
      char* table = reinterpret_cast<char*>(a.tables) + (i * a.samples + n) * kWordTables * kTableBytes;
      for (Index g = 0; g < kWordTables; ++g, table += kTableBytes) make(numbers + 4 * g, table);
    }
  }
}

// y of a tile's rows, of which the sums are dots.
template <int kSamples>
void FinishTile(const SignMatmulArgs& a, Index tile, const float (&dots)[kSamples][kTileRows]) {
  const Index row = tile * kTileRows, rows = a.rows - row < kTileRows ? a.rows - row : kTileRows;
  float scale[kTileRows] = {}, bias[kTileRows] = {};
  for (Index r = 0; r < rows; ++r) {
    scale[r] = a.scale == nullptr ? 1.0f : LoadAt<float>(a.scale, row + r, 4);
    bias[r] = a.bias == nullptr ? 0.0f : LoadAt<float>(a.bias, row + r, 4);
  }
  for (Index n = 0; n < a.samples; ++n) {
    Index r = 0;
    for (; r < rows; r += 8) {
      Float8 y = (Float8)_mm256_fmadd_ps((__m256)Load<Float8>(dots[n] + r), (__m256)Load<Float8>(scale + r),
                                         (__m256)Load<Float8>(bias + r));
      if (a.relu) y = y < 0 ? Float8{} : y;  // keeps NaN
      const Index at = n * a.rows + row + r;
      if (r + 8 <= rows) {
        StoreFloats(a.y, a.y_stored_as, at, y);
      } else {
        for (Index i = 0; r + i < rows; ++i) StoreFloat(a.y, a.y_stored_as, at + i, y[i]);
      }
    }
  }
}

}  // namespace
}  // namespace tersetorch
