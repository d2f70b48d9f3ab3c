// The product of blocked_matmul.h on a CUDA device, over samples as they lie: no panels. Values are float32, bfloat16
// or codes, not pairs or quads.
//
// Layout: x and y row-major [samples, features]; every pointer is to the device's memory and aligned to its element.
// Safety: offsets, segments, indices and codes are compared with their bounds before they are used, and nothing outside
//         the arrays is touched. A kernel cannot return a status without making the caller wait, so damage becomes NaN
//         in y, in every sample: all rows of a row block where offsets do not rise, or segments name a row twice or
//         outside, or do not count the block's non-zeros; a row with an index or a code outside.
// Order:  every sum has one order of summation, that of the CPU.
#pragma once

#include <cstdint>

#include "kernels/blocked_matmul/blocked_matmul.h"
#include "kernels/common/float_dtype.h"

namespace tersetorch {

struct BlockedMatmulCudaArgs {
  BlockedWeight weight;
  const void* x;  // [samples, columns]
  FloatDtype stored_as;
  const float* bias;  // [rows] or null
  bool relu;
  void* y;  // [samples, rows], stored as x is
  std::int64_t samples;
};

// Enqueues on `stream`, a cudaStream_t, and returns the cudaError_t of that.
int BlockedMatmulCuda(const BlockedMatmulCudaArgs& args, void* stream) noexcept;

}  // namespace tersetorch
