// What every op of this room needs: shapes and tasks.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace tersetorch {

// The shape of t with its last dimension replaced.
inline std::vector<std::int64_t> WithLastDim(const torch::stable::Tensor& t, std::int64_t last) {
  std::vector<std::int64_t> shape(t.sizes().begin(), t.sizes().end());
  shape.back() = last;
  return shape;
}

// Rows of one thread's task: fewer than about 32 Ki word operations cost less than waking a thread.
inline std::int64_t GrainRows(std::int64_t word_operations_per_row) {
  constexpr std::int64_t kWordOperationsPerTask = 32 * 1024;
  return std::max<std::int64_t>(1, kWordOperationsPerTask / std::max<std::int64_t>(1, word_operations_per_row));
}

}  // namespace tersetorch
