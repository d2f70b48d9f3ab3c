// What every op of this room needs: shapes, memory and tasks.
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

// The product of the leading dimensions; unlike numel() / size(-1) it is right for an empty last dimension too.
inline std::int64_t LeadingSize(const torch::stable::Tensor& t) {
  std::int64_t size = 1;
  for (std::int64_t d = 0; d + 1 < t.dim(); ++d) size *= t.size(d);
  return size;
}

// Asking is cheaper than dispatching aten::contiguous, which nearly always has nothing to do.
inline torch::stable::Tensor Contiguous(const torch::stable::Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

// Items of one thread's task: fewer than about 32 Ki vector operations cost less than waking a thread.
inline std::int64_t GrainItems(std::int64_t vector_operations_per_item) {
  constexpr std::int64_t kVectorOperationsPerTask = 32 * 1024;
  return std::max<std::int64_t>(1, kVectorOperationsPerTask / std::max<std::int64_t>(1, vector_operations_per_item));
}

}  // namespace tersetorch
