#include "kernels/blocked_matmul/blocked_matmul.h"
#include "kernels/common/scalars.h"

namespace tersetorch {
namespace {

float Value(const BlockedWeight& w, std::int64_t k) {
  switch (w.stored_as) {
    case BlockedValues::kFloat32:
      return At<float>(w.values, k);
    case BlockedValues::kBFloat16:
      return FromBFloat16(At<std::uint16_t>(w.values, k));
    case BlockedValues::kCodes:
      break;
  }
  return At<float>(w.codebook, At<std::uint8_t>(w.values, k));
}

BlockedStatus Matmul(const BlockedMatmulArgs& a, std::int64_t row_block) noexcept {
  const BlockedWeight& w = a.weight;
  const std::int64_t column_blocks = (w.columns + w.column_block - 1) / w.column_block;
  const std::int64_t row_begin = row_block * kBlockedRows;
  const std::int64_t rows = w.rows - row_begin < kBlockedRows ? w.rows - row_begin : kBlockedRows;
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t n = 0; n < a.samples; ++n) {
      Put(a.sums, r * a.width + n, a.bias == nullptr ? 0.0f : At<float>(a.bias, row_begin + r));
    }
  }
  for (std::int64_t j = 0; j < column_blocks; ++j) {
    const std::int64_t first = j * w.column_block;
    const std::int64_t columns = w.columns - first < w.column_block ? w.columns - first : w.column_block;
    const std::int64_t block = row_block * column_blocks + j;
    std::int64_t k = At<std::int32_t>(w.block_offsets, block);
    const std::int64_t end = At<std::int32_t>(w.block_offsets, block + 1);
    if (k < 0 || end < k || end > w.nnz) return BlockedStatus::kBadOffsets;
    for (std::int64_t i = 0; i < rows; ++i) {
      const auto segment = At<std::uint32_t>(w.segments, row_begin * column_blocks + j * rows + i);
      const std::int64_t r = segment >> 16, count = segment & 0xffff;
      if (r >= rows || count > end - k) return BlockedStatus::kBadSegment;
      for (const std::int64_t stop = k + count; k < stop; ++k) {
        const std::int64_t c = At<std::uint16_t>(w.indices, k);
        if (c >= columns) return BlockedStatus::kBadIndex;
        if (w.stored_as == BlockedValues::kCodes && At<std::uint8_t>(w.values, k) >= w.entries) {
          return BlockedStatus::kBadCode;
        }
        for (std::int64_t n = 0; n < a.samples; ++n) {
          const float product = Value(w, k) * At<float>(a.panel, (first + c) * a.width + n);
          Put(a.sums, r * a.width + n, At<float>(a.sums, r * a.width + n) + product);
        }
      }
    }
    if (k != end) return BlockedStatus::kBadSegment;
  }
  for (std::int64_t n = 0; n < a.samples; ++n) {
    for (std::int64_t r = 0; r < rows; ++r) {
      const auto sum = At<float>(a.sums, r * a.width + n);
      Store(a.y, a.y_stored_as, n * w.rows + row_begin + r, a.relu && sum < 0 ? 0.0f : sum);
    }
  }
  return BlockedStatus::kOk;
}

}  // namespace

const BlockedMatmulFunction kBlockedScalar = Matmul;

}  // namespace tersetorch
