// The product of codebook_matmul.h on a CUDA device, over samples as they lie: no panels, and any number of them.
//
// Layout: x and y row-major [samples, features]; every pointer is to the device's memory and aligned to its element.
//         For int8 x and the codebook come rounded, as BlockedQuadsCuda does it: rows of x_stride bytes, and tables
//         table_stride bytes apart.
// Safety: a code is compared with the entries before it is used. A kernel cannot return a status without making the
//         caller wait, so the row of a code outside its table is NaN: in y, in every sample, and in the dense weight.
// Order:  every sum has one order of summation; int8 gives the bits that it gives on the CPU.
#pragma once

#include <cstdint>

#include "kernels/codebook_matmul/codebook_matmul.h"

namespace tersetorch {

struct CodebookMatmulCudaArgs {
  CodebookWeight weight;
  CodebookMode mode;
  const void* x;  // [samples, columns], as stored_as says; [samples, x_stride] int8 for int8
  FloatDtype stored_as;
  const float* bias;  // [rows] or null
  bool relu;
  void* y;  // [samples, rows], stored as stored_as says
  std::int64_t samples;
  // For int8 only.
  const std::int8_t* tables = nullptr;
  std::int64_t x_stride = 0, table_stride = 0;
  const float* sample_scales = nullptr;  // [samples]
  const float* table_scales = nullptr;   // [rows] with per_row, else [1]
};

// As CodebookDecode: dense [rows, columns].
struct CodebookDecodeCudaArgs {
  CodebookWeight weight;
  float* dense;
};

// As CodebookReduce; table t and entry k are added up by one warp.
struct CodebookReduceCudaArgs {
  CodebookWeight weight;  // its codebook is not read
  const float* grad;      // [rows, columns]
  float* sums;            // [tables, entries]
  std::int64_t tables;
};

// Each enqueues on `stream`, a cudaStream_t, and returns the cudaError_t of that.
int CodebookMatmulCuda(const CodebookMatmulCudaArgs& args, void* stream) noexcept;
int CodebookDecodeCuda(const CodebookDecodeCudaArgs& args, void* stream) noexcept;
int CodebookReduceCuda(const CodebookReduceCudaArgs& args, void* stream) noexcept;

}  // namespace tersetorch
