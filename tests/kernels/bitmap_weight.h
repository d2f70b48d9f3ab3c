// Random weights for the tests of bitmap_matmul's kernels, on the CPU and on a CUDA device.
#pragma once

#include <cstdint>
#include <random>
#include <vector>

#include "kernels/arrays.h"
#include "kernels/bitmap_matmul/bitmap_matmul.h"

namespace tersetorch::test {

// A way of storing the values; `quantized` goes with 8-bit values.
struct BitmapWay {
  BitmapValues stored_as;
  Index entries;
  bool quantized;
};

inline constexpr BitmapWay kBitmapWays[] = {{BitmapValues::kFloat32, 0, false}, {BitmapValues::kBFloat16, 0, false},
                                            {BitmapValues::kCodes, 2, false},   {BitmapValues::kCodes, 16, false},
                                            {BitmapValues::kCodes, 31, false},  {BitmapValues::kCodes, 32, false},
                                            {BitmapValues::kCodes, 33, false},  {BitmapValues::kCodes, 256, false},
                                            {BitmapValues::kInt8, 0, false},    {BitmapValues::kInt8, 0, true}};

// A random weight with a dense row and rows that are empty, its values in each way of storing them.
struct RandomBitmap {
  RandomBitmap(Index rows, Index columns, double density, BitmapWay way, std::mt19937& rng)
      : way(way), rows(rows), columns(columns), bitmap(rows * BitmapWords(columns)) {
    std::bernoulli_distribution kept(density);
    codebook = Random(way.entries, rng);
    if (!codebook.empty()) codebook[0] = 0;
    scales = Random(rows, rng);
    for (Index r = 0; r < rows; ++r) {
      for (Index c = 0; c < columns; ++c) {
        if (r != 2 && (!kept(rng) || r % 7 == 3)) continue;
        bitmap[r * BitmapWords(columns) + c / 64] |= std::uint64_t{1} << c % 64;
        col_indices.push_back(static_cast<std::int32_t>(c));
        if (way.stored_as == BitmapValues::kCodes) {
          codes.push_back(static_cast<std::uint8_t>(1 + rng() % (way.entries - 1)));
          values.push_back(codebook[codes.back()]);
        } else if (way.stored_as == BitmapValues::kInt8) {
          codes.push_back(static_cast<std::uint8_t>(rng() % 255 - 127));
          values.push_back(static_cast<std::int8_t>(codes.back()));
        } else {
          values.push_back(Random(1, rng)[0]);
        }
        halves.push_back(Truncated(values.back()));
      }
      row_offsets.push_back(static_cast<std::int32_t>(col_indices.size()));
    }
  }

  float Scale(Index r) const { return way.stored_as == BitmapValues::kInt8 ? scales[r] : 1.0f; }

  BitmapWay way;
  Index rows, columns;
  std::vector<std::uint64_t> bitmap;
  std::vector<std::int32_t> row_offsets{0}, col_indices;
  std::vector<float> values, codebook, scales;
  std::vector<std::uint16_t> halves;
  std::vector<std::uint8_t> codes;
};

}  // namespace tersetorch::test
