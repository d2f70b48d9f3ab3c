// How the CUDA kernels read a weight in compressed sparse rows, whose offsets, columns and codes may be damaged.
#pragma once

#include "kernels/common/cuda.cuh"
#include "kernels/csr_matmul/csr_matmul.h"

namespace tersetorch {
namespace {

struct Row {
  std::int32_t begin, end;  // its non-zeros
  bool damaged;             // then it has none
};

__device__ inline Row RowAt(const CsrWeight& w, std::int64_t r) {
  const std::int32_t begin = w.row_offsets[r], end = w.row_offsets[r + 1];
  const bool outer = (r == 0 && begin != 0) || (r == w.rows - 1 && end != w.nnz);
  if (outer || begin < 0 || end < begin || end > w.nnz) return {0, 0, true};
  return {begin, end, false};
}

// The branch is the same for all threads; a type for it would double the number of kernels.
__device__ inline std::int32_t ColumnAt(const CsrWeight& w, std::int64_t k) {
  return w.indexed_by == CsrIndices::kInt32 ? static_cast<const std::int32_t*>(w.col_indices)[k]
                                            : static_cast<const std::uint16_t*>(w.col_indices)[k];
}

__device__ inline bool Outside(const CsrWeight& w, std::int32_t column) { return column < 0 || column >= w.columns; }

// Calls run with the type that reads the values.
template <typename Run>
int WithValues(CsrValues stored_as, const Run& run) {
  switch (stored_as) {
    case CsrValues::kFloat32:
      return run(Float32Values{});
    case CsrValues::kBFloat16:
      return run(BFloat16Values{});
    case CsrValues::kCodes:
      break;
  }
  return run(CodeValues{});
}

}  // namespace
}  // namespace tersetorch
