// A random product-quantised weight, its packed codes and its dense form.
#pragma once

#include <random>
#include <vector>

#include "kernels/arrays.h"
#include "kernels/product_matmul/product_matmul.h"

namespace tersetorch::test {

struct ProductShape {
  Index rows, columns, width, entries, stages;
  bool shared;
};

struct RandomProduct {
  RandomProduct(const ProductShape& s, std::mt19937& rng) : shape(s) {
    args.stages = s.stages;
    args.segments = (s.columns + s.width - 1) / s.width;
    args.books = s.shared ? 1 : args.segments;
    args.width = s.width;
    args.entries = s.entries;
    args.rows = s.rows;
    args.columns = s.columns;
    tables = args.stages * args.segments;
    codebooks = Random(args.stages * args.books * s.width * s.entries, rng);
    for (Index i = 0; i < s.rows * tables; ++i) codes.push_back(rng() % s.entries);
    packed.assign(ProductTiles(args) * ProductTileBytes(args), 0);
    for (Index r = 0; r < s.rows; ++r) {
      for (Index i = 0; i < tables; ++i) SetCode(r, i, codes[r * tables + i]);
    }
  }

  void SetCode(Index r, Index i, std::uint8_t code) {
    std::uint8_t* tile = packed.data() + r / kProductRows * ProductTileBytes(args);
    const Index in_tile = r % kProductRows;
    if (!ProductIsNarrow(args)) {
      tile[i * kProductRows + in_tile] = code;
      return;
    }
    std::uint8_t& pair = tile[(i / 8 * kProductRows + in_tile) * 4 + i % 8 / 2];
    pair = static_cast<std::uint8_t>(i % 2 == 0 ? (pair & 0xf0) | code : (pair & 0x0f) | code << 4);
  }

  float Entry(Index r, Index i, Index j) const {
    const Index segment = i % args.segments, book = shape.shared ? 0 : segment;
    const Index at = ((i / args.segments * args.books + book) * shape.width + j) * shape.entries;
    return codebooks[at + codes[r * tables + i]];
  }

  ProductShape shape;
  ProductWeight args{};
  Index tables;
  std::vector<float> codebooks;
  std::vector<std::uint8_t> codes;  // [rows, tables]
  std::vector<std::uint8_t> packed;
};

// Around every tile, group, block and lane width.
inline constexpr ProductShape kProductShapes[] = {
    {0, 5, 2, 3, 1, false},    {1, 1, 1, 1, 1, false},      {1, 2, 2, 16, 1, false},     {63, 7, 1, 16, 1, false},
    {64, 16, 2, 16, 1, false}, {65, 18, 2, 15, 1, false},   {131, 67, 4, 2, 1, false},   {10, 41, 3, 17, 1, false},
    {64, 9, 1, 256, 1, false}, {129, 70, 1, 255, 1, true},  {61, 150, 2, 256, 1, false}, {67, 300, 1, 16, 1, true},
    {37, 33, 33, 16, 9, true}, {130, 31, 31, 100, 3, true}, {7, 13, 5, 65, 2, false},    {200, 66, 3, 9, 2, true},
};

}  // namespace tersetorch::test
