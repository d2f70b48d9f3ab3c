// The convolution of sparse_conv2d.h on a CUDA device, directly from a weight in compressed sparse rows: no layout of
// its own.
//
// Layout: row o of the weight is filter o, flattened: column (c * kernel_h + kh) * kernel_w + kw, with c counted from
//         the first channel of the filter's group. x and y lie as their steps say; every pointer is to the device's
//         memory and aligned to its element.
// Method: a block computes neighbouring outputs of one filter, a thread one of them. The block decodes the filter's
//         non-zeros once, so many at a time, into offsets from an output's first input. Modes: weights and inputs are
//         rounded as they are read, for int8 with scales that a kernel before it finds, one block for each image and
//         each filter.
// Limits: a non-zero costs an output one load and two comparisons beside its multiply-add. With the channels last the
//         loads of a warp lie in_channels apart, so contiguous images are read faster.
// Safety: offsets, columns and codes are compared with their bounds before they are used, and nothing outside the
//         arrays is touched. A kernel cannot return a status without making the caller wait, so damage becomes NaN: all
//         outputs, in every image, of a filter whose offsets, columns or codes are damaged. Columns need not rise:
//         those that come twice count twice. In mode int8 an image with infinity or NaN is NaN, and a filter with them.
// Order:  every sum has one order of summation, that of the row.
#pragma once

#include <cstdint>

#include "kernels/common/float_dtype.h"
#include "kernels/csr_matmul/csr_matmul.h"
#include "kernels/sparse_conv2d/sparse_conv2d.h"

namespace tersetorch {

// Elements from one image, channel, row and column to the next.
struct ConvSteps {
  std::int64_t image, channel, row, column;
};

// Of an image or a filter: number q stands for q * scale, and number x becomes round(x * inverse).
struct ConvScale {
  float scale, inverse;
};

struct ConvCudaArgs {
  CsrWeight weight;  // [out_channels, in_channels / groups * kernel_h * kernel_w]
  ConvShape shape;
  std::int64_t images, height, width, out_height, out_width, pad_h, pad_w;
  const void* x;  // [images, in_channels, height, width]
  ConvSteps x_steps;
  FloatDtype stored_as;
  const float* bias;  // [out_channels] or null
  bool relu;
  void* y;  // [images, out_channels, out_height, out_width], stored as x is
  ConvSteps y_steps;
  ConvMode mode;
  ConvScale* scales;  // [images + out_channels], uninitialised, for int8 only
};

// Enqueues on `stream`, a cudaStream_t, and returns the cudaError_t of that.
int ConvCuda(const ConvCudaArgs& args, void* stream) noexcept;

}  // namespace tersetorch
