// SignMatmul on a CUDA device.
//
// Limits: a warp looks up the sums of 32 rows, a lane each, in tables that its block makes in shared memory: 16 floats
//         lie in 16 banks, so no lane waits for another. A load and an addition are 4 products, as many as the
//         multiply-adds that a load from shared memory lasts for elsewhere, without decoding the signs. The order of
//         the sums is that of the CPU's, and so are the bits.
// Cost:   bytes = rows * columns / 8 + x + y; look-ups = rows * columns / 4 * samples, of which a multiprocessor has 32
//         a clock. On an H100 [4096, 4096] took 11.7 us for one sample, 8 % of what 2.1 MB would allow: its 32 blocks
//         leave 100 multiprocessors idle. For 1,024 samples 4.3e9 look-ups, 579 us of shared memory, took 687 us (84
//         %).
#pragma once

#include <cstdint>

#include "kernels/sign_matmul/sign_matmul.h"

namespace tersetorch {

struct SignMatmulCudaArgs {
  const void* x;  // [samples, columns]
  FloatDtype stored_as;
  const std::uint64_t* weight;  // [tiles][words][32]
  std::int64_t samples, columns, rows;
  const float* scale;  // [rows] or null for 1
  const float* bias;   // [rows] or null for 0
  bool relu;
  void* y;  // [samples, rows], stored as x
};

// Enqueues on `stream`, a cudaStream_t, and returns the cudaError_t of that. Pointers are aligned to their element.
int SignMatmulCuda(const SignMatmulCudaArgs& args, void* stream) noexcept;

}  // namespace tersetorch
