#include "kernels/blocked_matmul/blocked_matmul.h"

#include "kernels/common/cpu_isa.h"

namespace tersetorch {
namespace {

BlockedMatmulFunction Active() {
  switch (ProcessCpuIsa().active) {
    case CpuIsa::kAvx512Bf16:
      // On Intel too, where the instruction has half the rate of float32's: without it a pair is taken apart for each
      // multiply-add, and takes 1.2 (64 samples) to 1.8 times (8) as long.
      return kBlockedAvx512Bf16;
    case CpuIsa::kAvx512:
      return kBlockedAvx512;
    case CpuIsa::kAvx2:
      return kBlockedAvx2;
    case CpuIsa::kScalar:
      break;
  }
  return kBlockedScalar;
}

}  // namespace

std::int32_t BlockedQuadOffset() noexcept {
  return ProcessCpuIsa().active >= CpuIsa::kAvx512 ? kBlockedUnsignedOffset : 0;
}

BlockedStatus BlockedMatmul(const BlockedMatmulArgs& args, std::int64_t row_block) noexcept {
  return Active()(args, row_block);
}

void BlockedPack(const BlockedPackArgs& a, std::int64_t row_block) noexcept {
  const std::int64_t column_blocks = (a.columns + a.column_block - 1) / a.column_block;
  const std::int64_t row_begin = row_block * kBlockedRows;
  const std::int64_t rows = a.rows - row_begin < kBlockedRows ? a.rows - row_begin : kBlockedRows;
  const std::int32_t* offsets = a.row_offsets + row_begin;

  // counts[j][r]: non-zeros of row r in column block j; later, where the next of them goes.
  std::int32_t* counts = a.scratch;
  for (std::int64_t i = 0; i < rows * column_blocks; ++i) counts[i] = 0;
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int32_t k = offsets[r]; k < offsets[r + 1]; ++k) ++counts[a.col_indices[k] / a.column_block * rows + r];
  }

  std::int32_t* starts = counts + rows * column_blocks;  // of the rows with so many non-zeros, the most first
  std::int32_t next = offsets[0];
  for (std::int64_t j = 0; j < column_blocks; ++j) {
    std::int32_t* of_row = counts + j * rows;
    std::int32_t* segments = a.segments + row_begin * column_blocks + j * rows;
    a.block_offsets[row_block * column_blocks + j] = next;
    for (std::int64_t c = 0; c <= a.column_block; ++c) starts[c] = 0;
    for (std::int64_t r = 0; r < rows; ++r) ++starts[of_row[r]];
    std::int32_t before = 0;
    for (std::int64_t c = a.column_block; c >= 0; --c) {
      const std::int32_t here = starts[c];
      starts[c] = before;
      before += here;
    }
    for (std::int64_t r = 0; r < rows; ++r)
      segments[starts[of_row[r]]++] = static_cast<std::int32_t>(r << 16) | of_row[r];
    for (std::int64_t i = 0; i < rows; ++i) {
      of_row[segments[i] >> 16] = next;
      next += segments[i] & 0xffff;
    }
  }

  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int32_t k = offsets[r]; k < offsets[r + 1]; ++k) {
      const std::int64_t j = a.col_indices[k] / a.column_block;
      const std::int32_t to = counts[j * rows + r]++;
      a.indices[to] = static_cast<std::uint16_t>(a.col_indices[k] - j * a.column_block);
      a.sources[to] = k;
    }
  }
}

}  // namespace tersetorch
