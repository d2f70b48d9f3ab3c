// The products of csr_matmul.h on a CUDA device, over samples as they lie: no panels.
//
// Layout: x, y and their gradients row-major [samples, features]; every pointer is to the device's memory, and aligned
//         to its element.
// Cost:   bytes = nnz * (4 for the column, 2 where it has 16 bits, + the value's) + 4 * rows + x + y; operations = 2 *
//         nnz * samples. [4096, 4096] with 10 % float32 is 13.5 MB, 5.6 us at the H100's 2.41 TB/s: one sample took
//         9.4 us (60 %), in bfloat16 8.5 of 4.2 us (49 %). For 8, 64 and 256 samples 20.0, 81.9 and 305 us, of 5.7,
//         6.5 and 16.7: a non-zero gathers 32 bytes of a panel for each 8 samples, 430 MB out of the caches for 64,
//         which come at 5.2 TB/s. grad_x costs nnz * samples atomic additions of 4 bytes, grad_values two gathered
//         numbers for each; neither was measured.
// Safety: offsets, columns and codes are compared with their bounds before they are used, and nothing outside the
//         arrays is touched. A kernel cannot return a status without making the caller wait, so damage becomes NaN:
//         a row of y, in every sample, whose offsets, columns or codes are damaged; all of grad_x if any row is
//         damaged; the grad_values of non-zeros in no row or with a column outside. Offsets must run from 0 to nnz.
// Order:  y and grad_values have one order of summation. grad_x is summed by atomic additions: its last bits may differ
//         from run to run.
#pragma once

#include <cstdint>

#include "kernels/common/float_dtype.h"
#include "kernels/csr_matmul/csr_matmul.h"

namespace tersetorch {

struct CsrMatmulCudaArgs {
  CsrWeight weight;
  const void* x;  // [samples, columns]
  FloatDtype stored_as;
  const float* bias;  // [rows] or null
  bool relu;
  void* y;  // [samples, rows], stored as x is
  std::int64_t samples;
  // [CeilDiv(samples, 8), columns, 8] of x's type, aligned to 16 bytes: scratch; not used for one sample.
  void* panels;
};

struct CsrGradXCudaArgs {
  CsrWeight weight;
  const void* grad_y;  // [samples, rows]
  FloatDtype stored_as;
  float* sums;   // [samples, columns], scratch; grad_x itself where that is float32
  void* grad_x;  // [samples, columns], stored as grad_y is
  std::int64_t samples;
};

struct CsrGradValuesCudaArgs {
  CsrWeight weight;    // its values are not read
  const void* grad_y;  // [samples, rows]
  FloatDtype grad_y_stored_as;
  const void* x;  // [samples, columns]
  FloatDtype x_stored_as;
  float* grad_values;  // [nnz]
  std::int64_t samples;
};

// Each enqueues on `stream`, a cudaStream_t, and returns the cudaError_t of that.
int CsrMatmulCuda(const CsrMatmulCudaArgs& args, void* stream) noexcept;
int CsrMatmulGradXCuda(const CsrGradXCudaArgs& args, void* stream) noexcept;
int CsrMatmulGradValuesCuda(const CsrGradValuesCudaArgs& args, void* stream) noexcept;

}  // namespace tersetorch
