// The products of bitmap_matmul.h on a CUDA device, over samples as they lie: no panels, and any number of them.
//
// Layout: x and y row-major [samples, features]; every pointer is to the device's memory and aligned to its element.
// Safety: offsets, bits and codes are compared with their bounds before they are used, and nothing outside the arrays
//         is touched. A kernel cannot return a status without making the caller wait, so damage becomes NaN: in
//         BitmapMatmulCuda a row of y, in every sample, whose offsets do not rise, whose bits do not count its values
//         or name no column, or whose codes are outside; in BitmapColumnsCuda all of y of a sample with a non-zero that
//         meets a column with such offsets or bits, and the outputs where it meets a code outside. A codebook may begin
//         with any number.
// Method: up to 8 samples, and floats that tensor cores would round, go by lists of columns; others by tiles
//         (bitmap_tiles_cuda.h).
// Cost:   bytes = rows * columns / 8 + values' bytes + 8 * rows, and x and y; operations = 2 * nnz * samples.
//         AlexNet's fc7 [4096, 4096], 35 % in bfloat16, one sample on an H100: 13.8 MB, 5.7 us at 2.41 TB/s; took
//         18.7 us, 30 %: listing a word's columns bounds it. Tiles: see their header.
// Order:  every sum has one order of summation; quantized products give the bits that they give on the CPU.
#pragma once

#include <cstdint>

#include "kernels/bitmap_matmul/bitmap_matmul.h"
#include "kernels/common/float_dtype.h"

namespace tersetorch {

struct BitmapMatmulCudaArgs {
  BitmapWeight weight;
  const void* x;  // [samples, columns]; int8 where quantized
  FloatDtype stored_as;
  const float* x_scales;  // [samples] where quantized, which int8 values alone are, else null
  const float* bias;      // [rows] or null
  bool relu;
  void* y;  // [samples, rows], stored as stored_as says
  std::int64_t samples;
  void* scratch;  // uninitialised, of BitmapScratchBytes, aligned to 16 bytes
};

struct BitmapQuantizeCudaArgs {
  const void* x;  // [samples, columns]
  FloatDtype stored_as;
  std::int64_t samples, columns;
  std::int8_t* quantized;  // [samples, columns]
  float* x_scales;         // [samples]
};

// As BitmapColumnsArgs: `rows` and `columns` of the weight are those of W^T.
struct BitmapColumnsCudaArgs {
  BitmapWeight weight;
  const void* x;  // [samples, rows]
  FloatDtype stored_as;
  const float* bias;  // [columns] or null
  bool relu;
  void* y;  // [samples, columns], stored as x is
  std::int64_t samples;
};

// All of args but scratch count, of x_scales whether it is null.
std::int64_t BitmapScratchBytes(const BitmapMatmulCudaArgs& args) noexcept;

// Each enqueues on `stream`, a cudaStream_t, and returns the cudaError_t of that.
int BitmapMatmulCuda(const BitmapMatmulCudaArgs& args, void* stream) noexcept;
int BitmapQuantizeCuda(const BitmapQuantizeCudaArgs& args, void* stream) noexcept;
int BitmapColumnsCuda(const BitmapColumnsCudaArgs& args, void* stream) noexcept;

}  // namespace tersetorch
