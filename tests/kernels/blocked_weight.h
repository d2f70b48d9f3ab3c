// Random weights for the tests of blocked_matmul's kernels, on the CPU and on a CUDA device.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "kernels/arrays.h"
#include "kernels/blocked_matmul/blocked_matmul.h"

namespace tersetorch::test {

// Lays out rows whose columns are col_indices; returns where each non-zero comes from.
struct BlockedLayout {
  BlockedLayout(const std::vector<std::int32_t>& row_offsets, const std::vector<std::int32_t>& col_indices,
                Index columns, Index column_block)
      : segments((row_offsets.size() - 1) * ((columns + column_block - 1) / column_block), -1),
        indices(col_indices.size(), 0xffff),
        sources(col_indices.size(), -1) {
    const Index rows = static_cast<Index>(row_offsets.size()) - 1;
    const Index row_blocks = (rows + kBlockedRows - 1) / kBlockedRows;
    const Index column_blocks = (columns + column_block - 1) / column_block;
    block_offsets.assign(row_blocks * column_blocks + 1, static_cast<std::int32_t>(col_indices.size()));
    std::vector<std::int32_t> scratch((kBlockedRows + 1) * column_blocks + column_block + 1);
    for (Index block = row_blocks; block-- > 0;) {
      BlockedPack({row_offsets.data(), col_indices.data(), rows, columns, column_block, block_offsets.data(),
                   segments.data(), indices.data(), sources.data(), scratch.data()},
                  block);
    }
  }

  std::vector<std::int32_t> block_offsets, segments;
  std::vector<std::uint16_t> indices;
  std::vector<std::int32_t> sources;
};

// A random weight with rows of very different lengths, some empty and some full, in each way of storing its values.
struct RandomBlocked {
  RandomBlocked(Index rows, Index columns, Index column_block, double density, std::mt19937& rng)
      : rows(rows), columns(columns), column_block(column_block) {
    for (Index r = 0; r < rows; ++r) {
      std::bernoulli_distribution kept(r % 7 == 3 ? 0 : r % 11 == 5 ? 1 : density);
      for (Index c = 0; c < columns; ++c) {
        if (kept(rng)) col_indices.push_back(static_cast<std::int32_t>(c));
      }
      std::shuffle(col_indices.begin() + row_offsets.back(), col_indices.end(), rng);
      row_offsets.push_back(static_cast<std::int32_t>(col_indices.size()));
    }
    codebook = Random(7, rng);
    for (std::size_t k = 0; k < col_indices.size(); ++k) {
      csr_codes.push_back(static_cast<std::uint8_t>(rng() % codebook.size()));
      csr_values.push_back(codebook[csr_codes.back()]);
    }
    Pack();
  }

  Index RowBlocks() const { return (rows + kBlockedRows - 1) / kBlockedRows; }
  Index ColumnBlocks() const { return (columns + column_block - 1) / column_block; }

  void Pack() {
    const BlockedLayout layout(row_offsets, col_indices, columns, column_block);
    block_offsets = layout.block_offsets;
    segments = layout.segments;
    indices = layout.indices;
    for (const std::int32_t source : layout.sources) {
      codes.push_back(csr_codes[source]);
      values.push_back(csr_values[source]);
      halves.push_back(Truncated(csr_values[source]));
    }
  }

  Index rows, columns, column_block;
  std::vector<std::int32_t> row_offsets{0}, col_indices;
  std::vector<float> csr_values, codebook;
  std::vector<std::uint8_t> csr_codes;

  std::vector<std::int32_t> block_offsets, segments;
  std::vector<std::uint16_t> indices;
  std::vector<float> values;
  std::vector<std::uint16_t> halves;
  std::vector<std::uint8_t> codes;
};

// A weight whose values are words of T: those of consecutive columns, zeros among them.
template <typename T>
struct Words {
  static constexpr Index kGroup = 4 / sizeof(T);

  Words(Index rows, Index features, Index column_block, double density, std::mt19937& rng)
      : rows(rows), columns((features + kGroup - 1) / kGroup), column_block(column_block), dense(rows * features) {
    std::vector<std::int32_t> row_offsets{0}, col_indices;
    std::vector<std::array<T, kGroup>> in_rows;
    for (Index r = 0; r < rows; ++r) {
      std::bernoulli_distribution kept(r % 7 == 3 ? 0 : r % 11 == 5 ? 1 : density);
      for (Index c = 0; c < columns; ++c) {
        std::array<T, kGroup> word{};
        bool any = false;
        for (Index j = 0; j < kGroup && kGroup * c + j < features; ++j) {
          if (!kept(rng)) continue;
          any = true;
          if constexpr (sizeof(T) == 1) {
            word[j] = static_cast<T>(rng() % 16 == 0 ? -128 : static_cast<int>(rng() % 256) - 128);
            dense[r * features + kGroup * c + j] = word[j];
          } else {
            word[j] = Truncated(std::normal_distribution<float>()(rng));
            dense[r * features + kGroup * c + j] = Widened(word[j]);
          }
        }
        if (!any) continue;
        col_indices.push_back(static_cast<std::int32_t>(c));
        in_rows.push_back(word);
      }
      row_offsets.push_back(static_cast<std::int32_t>(col_indices.size()));
    }
    const BlockedLayout layout(row_offsets, col_indices, columns, column_block);
    for (const std::int32_t source : layout.sources) values.push_back(in_rows[source]);
    block_offsets = layout.block_offsets;
    segments = layout.segments;
    indices = layout.indices;
  }

  Index RowBlocks() const { return (rows + kBlockedRows - 1) / kBlockedRows; }

  Index rows, columns, column_block;
  std::vector<float> dense;  // [rows, features]
  std::vector<std::int32_t> block_offsets, segments;
  std::vector<std::uint16_t> indices;
  std::vector<std::array<T, kGroup>> values;
};

// Scales that are ordinary, and so large that a sum times one of them overflows.
inline std::vector<float> RowScales(Index rows, std::mt19937& rng) {
  std::vector<float> scales = Random(rows, rng);
  for (Index r = 2; r < rows; r += 5) scales[r] = std::fabs(scales[r]) * 1e35f;
  return scales;
}

// What quads give for an exact sum.
inline float Scaled(std::int32_t sum, float row_scale, float sample_scale, float bias) {
  const bool row_first = row_scale < sample_scale;
  const float scaled = static_cast<float>(sum) * (row_first ? row_scale : sample_scale);
  return std::fma(scaled, row_first ? sample_scale : row_scale, bias);
}

}  // namespace tersetorch::test
