// Random signs as xnor_pack lays them out, for the tests of products with numbers.
#pragma once

#include <cstdint>
#include <random>
#include <vector>

#include "kernels/arrays.h"
#include "kernels/xnor_matmul/xnor_matmul.h"

namespace tersetorch::test {

// Bits past the columns are of no use, and random here.
struct Signs {
  Signs(Index rows, Index columns, std::mt19937& rng)
      : rows(rows), columns(columns), words((columns + 63) / 64), packed(XnorTiles(rows) * words * kXnorRows) {
    for (std::uint64_t& word : packed) word = std::uint64_t{rng()} << 32 | rng();
    for (Index i = 0; rows > 0 && i < words; ++i) packed[i * kXnorRows] = 0;  // row 0: all +1
  }
  int At(Index r, Index c) const {
    const std::uint64_t word = packed[(r / kXnorRows * words + c / 64) * kXnorRows + r % kXnorRows];
    return (word >> c % 64 & 1) != 0 ? -1 : 1;
  }

  Index rows, columns, words;
  std::vector<std::uint64_t> packed;
};

}  // namespace tersetorch::test
