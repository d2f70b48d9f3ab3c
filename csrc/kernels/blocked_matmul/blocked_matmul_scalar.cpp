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
    default:
      return At<float>(w.codebook, At<std::uint8_t>(w.values, k));
  }
}

// What value k adds to the sum of the sample whose number in the panel is i; sums of quads are integers modulo 2^32.
float Add(const BlockedWeight& w, std::int64_t k, const void* panel, std::int64_t i, float sum) {
  if (w.stored_as == BlockedValues::kBFloat16Pairs) {
    for (int j = 0; j < 2; ++j) {
      sum += FromBFloat16(At<std::uint16_t>(w.values, 2 * k + j)) * FromBFloat16(At<std::uint16_t>(panel, 2 * i + j));
    }
    return sum;
  }
  if (w.stored_as == BlockedValues::kInt8Quads) {
    auto integer = __builtin_bit_cast(std::uint32_t, sum);
    for (int j = 0; j < 4; ++j) {
      const int product = At<std::int8_t>(w.values, 4 * k + j) * At<std::int8_t>(panel, 4 * i + j);
      integer += static_cast<std::uint32_t>(product);
    }
    return __builtin_bit_cast(float, integer);
  }
  return sum + Value(w, k) * At<float>(panel, i);
}

BlockedStatus Matmul(const BlockedMatmulArgs& a, std::int64_t row_block) noexcept {
  const BlockedWeight& w = a.weight;
  const bool quads = w.stored_as == BlockedValues::kInt8Quads;
  const std::int64_t column_blocks = (w.columns + w.column_block - 1) / w.column_block;
  const std::int64_t row_begin = row_block * kBlockedRows;
  const std::int64_t rows = w.rows - row_begin < kBlockedRows ? w.rows - row_begin : kBlockedRows;
  const auto bias = [&](std::int64_t r) { return a.bias == nullptr ? 0.0f : At<float>(a.bias, row_begin + r); };
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t n = 0; n < a.samples; ++n) Put(a.sums, r * a.width + n, quads ? 0.0f : bias(r));
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
          const std::int64_t i = r * a.width + n;
          Put(a.sums, i, Add(w, k, a.panel, (first + c) * a.width + n, At<float>(a.sums, i)));
        }
      }
    }
    if (k != end) return BlockedStatus::kBadSegment;
  }
  for (std::int64_t n = 0; n < a.samples; ++n) {
    for (std::int64_t r = 0; r < rows; ++r) {
      auto sum = At<float>(a.sums, r * a.width + n);
      if (quads) {
        const auto integer = static_cast<float>(__builtin_bit_cast(std::int32_t, sum));
        const float of_row = At<float>(a.row_scales, row_begin + r), of_sample = At<float>(a.sample_scales, n);
        const bool row_first = of_row < of_sample;
        sum = __builtin_fmaf(integer * (row_first ? of_row : of_sample), row_first ? of_sample : of_row, bias(r));
      }
      Store(a.y, a.y_stored_as, n * w.rows + row_begin + r, a.relu && sum < 0 ? 0.0f : sum);
    }
  }
  return BlockedStatus::kOk;
}

}  // namespace

const BlockedMatmulFunction kBlockedScalar = Matmul;

}  // namespace tersetorch
