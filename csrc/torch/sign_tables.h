// How products of signs by tables are split over waves of samples and threads.
#pragma once

#include <bit>
#include <cstdint>

#include "kernels/xnor_matmul/xnor_matmul.h"
#include "torch/samples.h"

namespace tersetorch {

// The weight of a product of signs.
inline Tensor SignsOfRows(const char* op, Place place, const Tensor& packed, std::int64_t columns, std::int64_t rows) {
  CheckOn(place, op, packed, "weight");
  const std::int64_t words = Blocks(columns, 64), tiles = XnorTiles(rows);
  STD_TORCH_CHECK(packed.scalar_type() == ScalarType::Long && packed.dim() == 3 && packed.size(0) == tiles &&
                      packed.size(1) == words && packed.size(2) == kXnorRows,
                  op, ": weight must be int64 [", tiles, ", ", words, ", ", kXnorRows, "], got ",
                  torch::headeronly::toString(packed.scalar_type()), " of ", packed.dim(), "-D with ", packed.numel(),
                  " elements; pass what xnor_pack returns");
  return Usable(place, packed, 2);
}

// Sizes of such a product: `samples` of `words`, whose tables have so many bytes a word and sample, by tiles of rows;
// a task takes multiples of `together` tiles.
struct SignProduct {
  std::int64_t samples, words, tiles, table_bytes, together;
};

// Calls make(first, count, tables, word_begin, word_end) and then multiply(first, count, tables, tile_begin, tile_end)
// for waves of 8, 4, 2 or 1 samples; threads share a wave where there are few, else each takes waves of its own.
template <typename Make, typename Multiply>
void ForWaves(const SignProduct& p, const Make& make, const Multiply& multiply) {
  constexpr std::int64_t kWave = 8, kMany = 8 * kWave;
  const std::int64_t parts = Blocks(p.tiles, p.together), tile_work = 64 * p.words;  // vector operations a sample
  const auto run = [&](std::int64_t first, std::int64_t end, bool share) {
    Scratch tables(p.table_bytes * p.words * std::min(kWave, end - first));
    char* const data = tables.template Data<char>();
    while (first < end) {
      const auto left = static_cast<std::uint64_t>(std::min(kWave, end - first));
      const auto count = static_cast<std::int64_t>(std::bit_floor(left));
      if (share) {
        ParallelFor(p.words, GrainItems(256 * count),
                    [&](std::int64_t begin, std::int64_t stop) { make(first, count, data, begin, stop); });
        ParallelFor(parts, GrainItems(p.together * tile_work * count), [&](std::int64_t begin, std::int64_t stop) {
          multiply(first, count, data, begin * p.together, std::min(p.tiles, stop * p.together));
        });
      } else {
        make(first, count, data, 0, p.words);
        multiply(first, count, data, 0, p.tiles);
      }
      first += count;
    }
  };
  if (p.samples < kMany) return run(0, p.samples, true);
  const std::int64_t waves = Blocks(p.samples, kWave);
  ParallelFor(waves, GrainItems(kWave * p.tiles * tile_work), [&](std::int64_t begin, std::int64_t stop) {
    run(begin * kWave, std::min(p.samples, stop * kWave), false);
  });
}

}  // namespace tersetorch
