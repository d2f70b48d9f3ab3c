// The products of product_matmul.h on a CUDA device, over samples as they lie.
//
// Layout: codes and codebooks as there; x and y row-major [samples, features]; every pointer is to the device's memory
//         and aligned to its element.
// Safety: every code is compared with the entries before it is used. A kernel cannot return a status without making the
//         caller wait, so a row with a code outside is NaN in every sample, in ProductDecodeCuda too.
// Order:  every sum has one order of summation; int8 products give the bits that they give on the CPU.
#pragma once

#include <cstdint>

#include "kernels/common/float_dtype.h"
#include "kernels/product_matmul/product_matmul.h"

namespace tersetorch {

struct ProductMatmulCudaArgs {
  ProductWeight weight;
  const void* x;  // [samples, columns]
  FloatDtype stored_as;
  float* tables;         // [samples, stages * segments, entries], scratch
  float *lows, *ranges;  // [samples, stages * segments], scratch of mode int8, else null
  ProductScale* scales;  // [samples], the same
  const float* bias;     // [rows] or null
  bool relu;
  void* y;  // [samples, rows], stored as x is
  std::int64_t samples;
};

// Each enqueues on `stream`, a cudaStream_t, and returns the cudaError_t of that. `dense` is [rows, columns].
int ProductMatmulCuda(const ProductMatmulCudaArgs& args, void* stream) noexcept;
int ProductDecodeCuda(const ProductDecodeArgs& args, void* stream) noexcept;

}  // namespace tersetorch
