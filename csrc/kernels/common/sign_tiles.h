// How products of signs with numbers run over a weight that kernels/xnor_matmul laid out: for each four columns of a
// sample a table has the 16 sums that four signs can make of them, and a row of y adds up what its bits name. Written
// once for every level; everything here is local to the including file.
#pragma once

#include <cstdint>

#include "kernels/common/vectors.h"

namespace tersetorch {
namespace {

constexpr Index kTileRows = 32, kTileWordBytes = 8 * kTileRows, kWordTables = 16;
// What a part's tables and a group's sums may take of the first cache level.
constexpr Index kPartBytes = 24576, kGroupTiles = 16;

// Calls add.operator()<kTogether>(weight, step, words, tables, sums) for every part of the words: so many tiles, `step`
// bytes apart, from a word on; sums [kTogether][kSamples][32] of 4-byte Sum continue those of the words before. Then
// finish(tile, sums of its samples). A part has an even number of words, but for the last.
template <typename Sum, int kSamples, int kMostTogether, Index kTableBytes, typename Add, typename Finish>
void ForTiles(const void* weight, Index words, const void* tables, Index tile_begin, Index tile_end, const Add& add,
              const Finish& finish) {
  constexpr Index kWordBytes = kWordTables * kTableBytes * kSamples, kFitting = kPartBytes / kWordBytes / 2 * 2;
  constexpr Index kDepth = kFitting > 0 ? kFitting : 2;
  alignas(64) Sum sums[kGroupTiles][kSamples][kTileRows];
  const Index step = words * kTileWordBytes;
  for (Index first = tile_begin; first < tile_end; first += kGroupTiles) {
    const Index tiles = tile_end - first < kGroupTiles ? tile_end - first : kGroupTiles;
    for (Index t = 0; t < tiles; ++t) {
      for (auto& of_sample : sums[t]) {
        for (Sum& sum : of_sample) sum = 0;
      }
    }
    for (Index word = 0; word < words; word += kDepth) {
      const Index count = words - word < kDepth ? words - word : kDepth;
      const char* w = static_cast<const char*>(weight) + first * step + word * kTileWordBytes;
      const char* of_words = static_cast<const char*>(tables) + word * kWordBytes;
      Index t = 0;
      for (; t + kMostTogether <= tiles; t += kMostTogether) {
        add.template operator()<kMostTogether>(w + t * step, step, count, of_words, &sums[t][0][0]);
      }
      for (; t < tiles; ++t) add.template operator()<1>(w + t * step, step, count, of_words, &sums[t][0][0]);
    }
    for (Index t = 0; t < tiles; ++t) finish(first + t, sums[t]);
  }
}

}  // namespace
}  // namespace tersetorch
