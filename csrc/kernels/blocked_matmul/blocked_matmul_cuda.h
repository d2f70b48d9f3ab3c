// The product of blocked_matmul.h on a CUDA device. For pairs and quads the samples are rounded first, into words as a
// panel has them (kernels/panels, offset 0). Then they are packed in panels of 8.
//
// Layout: x and y row-major [samples, features]; every pointer is to the device's memory and aligned to its element,
//         values of pairs and quads to the word.
// Method: a thread takes a segment, and its row's sums of 8 samples into registers. The segments of a warp follow each
//         other in memory: half a warp after the other reads 16 neighbouring non-zeros of a row, decoded, into shared
//         memory, and then each lane walks its own row there.
// Cost:   bytes = nnz * (2 for the index + the value's) + 4 * rows * column blocks + x + y; operations = 2 * nnz *
//         samples. [4096, 4096] with 10 % float32 is 10.1 MB, 4.2 us at the H100's 2.41 TB/s. A lane's non-zeros stand
//         in other columns than its neighbours': a non-zero reads 32 bytes of a panel, a sector, for 8 samples, which
//         bounds them: 54 MB out of the caches for each 8 samples there, at the 5.2 TB/s of csr_matmul 10 us. Where
//         lanes read indices, values and samples by themselves they were 2 + 8 such sectors. Not measured.
// Safety: offsets, segments, indices and codes are compared with their bounds before they are used, and nothing outside
//         the arrays is touched. A kernel cannot return a status without making the caller wait, so damage becomes NaN
//         in y, in every sample: all rows of a row block where offsets do not rise, or segments name a row twice or
//         outside, or do not count the block's non-zeros; a row with an index or a code outside.
// Order:  every sum has one order of summation, that of the CPU; quads give the bits that they give there.
#pragma once

#include <cstdint>

#include "kernels/blocked_matmul/blocked_matmul.h"
#include "kernels/common/float_dtype.h"

namespace tersetorch {

struct BlockedMatmulCudaArgs {
  BlockedWeight weight;
  const void* x;  // [samples, columns]; for pairs and quads words
  FloatDtype stored_as;
  const float* bias;  // [rows] or null
  bool relu;
  void* y;  // [samples, rows], stored as stored_as says
  std::int64_t samples;
  const float* sample_scales = nullptr;  // [samples], for quads only
  const float* row_scales = nullptr;     // [rows], for quads only
  // [CeilDiv(samples, 8), columns, 8] of x's type, aligned to 16 bytes: scratch.
  void* panels = nullptr;
};

struct BlockedWordsCudaArgs {
  const void* x;  // [samples, features]
  FloatDtype stored_as;
  std::int64_t samples, features;
  std::uint32_t* words;  // [samples, features / 2 or 4, rounded up]
  float* sample_scales;  // [samples], for quads only
};

// Each enqueues on `stream`, a cudaStream_t, and returns the cudaError_t of that.
int BlockedMatmulCuda(const BlockedMatmulCudaArgs& args, void* stream) noexcept;
int BlockedPairsCuda(const BlockedWordsCudaArgs& args, void* stream) noexcept;
int BlockedQuadsCuda(const BlockedWordsCudaArgs& args, void* stream) noexcept;

}  // namespace tersetorch
