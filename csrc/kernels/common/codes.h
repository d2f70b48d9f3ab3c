// How a dense weight's codes into tables lie in memory.
//
// Layout: a code takes 2 bits where a table has at most 4 entries, 4 bits to 16 and 8 bits to 256. A chunk of 64 bytes
//         holds 512 / bits columns as 16 little-endian words: field s of word l, its bits [bits * s, bits * (s + 1)),
//         is the code of column 16 s + l. So vectors of words, shifted, are the indices of 16 consecutive columns.
//         Each block of columns begins a chunk; a row is its blocks one after the other, and what is left over of a
//         block's last chunk is 0. Without blocks a row is one. The same for every level.
#pragma once

#include <cstdint>

#include "kernels/common/everywhere.h"

namespace tersetorch {

inline constexpr std::int64_t kCodesMaxEntries = 256;
inline constexpr std::int64_t kCodeChunkBytes = 64;

// A weight [rows, columns] of codes. Its codebook has one table; or with per_row one for each row; or, where
// column_block < columns, one for each block of columns.
struct CodebookWeight {
  const std::uint8_t* codes;  // [rows, CodeRowBytes]
  const float* codebook;      // [tables, entries]
  std::int64_t entries;       // 1 to kCodesMaxEntries
  bool per_row;
  std::int64_t rows, columns;
  std::int64_t column_block;  // at least 1
};

namespace {

TERSETORCH_EVERYWHERE constexpr int CodeBits(std::int64_t entries) { return entries <= 4 ? 2 : entries <= 16 ? 4 : 8; }

TERSETORCH_EVERYWHERE constexpr std::int64_t CodeChunks(std::int64_t columns, int bits) {
  return (columns * bits + 511) / 512;
}

TERSETORCH_EVERYWHERE constexpr std::int64_t CodeRowBytes(std::int64_t columns, std::int64_t column_block, int bits) {
  const std::int64_t whole = columns / column_block;
  return (whole * CodeChunks(column_block, bits) + CodeChunks(columns % column_block, bits)) * kCodeChunkBytes;
}

// The code of a weight; its row of codes is aligned to a word.
[[maybe_unused]] TERSETORCH_EVERYWHERE inline std::uint32_t CodeAt(const CodebookWeight& w, std::int64_t row,
                                                                   std::int64_t column) {
  const int bits = CodeBits(w.entries);
  const std::int64_t of_chunk = 512 / bits, in_block = column % w.column_block;
  const std::int64_t chunk = column / w.column_block * CodeChunks(w.column_block, bits) + in_block / of_chunk;
  const int in_chunk = static_cast<int>(in_block % of_chunk);
  const std::uint8_t* codes = w.codes + row * CodeRowBytes(w.columns, w.column_block, bits) + chunk * kCodeChunkBytes;
  const std::uint32_t word = reinterpret_cast<const std::uint32_t*>(codes)[in_chunk % 16];
  return word >> bits * (in_chunk / 16) & ((1u << bits) - 1);
}

}  // namespace
}  // namespace tersetorch
