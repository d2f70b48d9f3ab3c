// The convolution of codebook_conv2d.h on a CUDA device, over images as they lie: no windows are made.
//
// Layout: x and y lie as their steps say; every pointer is to the device's memory and aligned to its element. For int8
//         images and tables come rounded, as BlockedQuadsCuda does it: int8, table_stride bytes from one to the next.
// Method: a block computes neighbouring outputs of 8 filters of a group, a thread one place of them. The block decodes
//         the filters' codes once, so many columns at a time, into weights and offsets from an output's first input.
// Limits: a column costs a thread one load and two comparisons of 64 bits beside its 8 multiply-adds, about half of
//         what it does. Rows have less than 2^32 columns. With the channels last the loads of a warp lie in_channels
//         apart, so contiguous images are read faster.
// Safety: a code is compared with the entries before it is used. A kernel cannot return a status without making the
//         caller wait, so a filter with a code outside its table is NaN, in every image.
// Order:  every sum has one order of summation; int8 gives the bits that it gives on the CPU.
#pragma once

#include <cstdint>

#include "kernels/codebook_matmul/codebook_matmul.h"
#include "kernels/sparse_conv2d/sparse_conv2d_cuda.h"

namespace tersetorch {

struct CodebookConvCudaArgs {
  CodebookWeight weight;  // [out_channels, in_channels / groups * kernel_h * kernel_w]
  ConvShape shape;
  std::int64_t images, height, width, out_height, out_width, pad_h, pad_w;
  const void* x;  // [images, in_channels, height, width], int8 for int8
  ConvSteps x_steps;
  FloatDtype stored_as;
  const float* bias;  // [out_channels] or null
  bool relu;
  void* y;  // [images, out_channels, out_height, out_width], stored as stored_as says
  ConvSteps y_steps;
  CodebookMode mode;
  // For int8 only.
  const std::int8_t* tables = nullptr;
  std::int64_t table_stride = 0;
  const float* image_scales = nullptr;  // [images]
  const float* table_scales = nullptr;  // [out_channels] with per_row, else [1]
};

// Enqueues on `stream`, a cudaStream_t, and returns the cudaError_t of that.
int CodebookConvCuda(const CodebookConvCudaArgs& args, void* stream) noexcept;

}  // namespace tersetorch
