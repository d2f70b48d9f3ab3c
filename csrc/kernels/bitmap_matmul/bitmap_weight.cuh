// The rows of a bitmap, as all of its CUDA kernels read them.
#pragma once

#include "kernels/bitmap_matmul/bitmap_matmul.h"
#include "kernels/common/cuda.cuh"

namespace tersetorch {
namespace {

constexpr int kWordBits = 64;

struct Row {
  std::int32_t begin, end;  // its values
  bool damaged;             // then it has none
};

__device__ inline Row RowAt(const BitmapWeight& w, std::int64_t r) {
  const std::int32_t begin = w.row_offsets[r], end = w.row_offsets[r + 1];
  if (begin < 0 || end < begin || end > w.nnz) return {0, 0, true};
  return {begin, end, false};
}

// Of the lanes up to this one, it included; all lanes call it.
__device__ inline int SumThroughLane(int count) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
#pragma unroll
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const int before = __shfl_up_sync(kWholeWarp, count, distance);
    if (lane >= distance) count += before;
  }
  return count;
}

}  // namespace
}  // namespace tersetorch
