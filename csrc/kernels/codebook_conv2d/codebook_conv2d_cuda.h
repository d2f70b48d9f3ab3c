// The convolution of codebook_conv2d.h on a CUDA device, in one of two ways.
//
// Layout: x and y lie as their steps say, with the channels first or last; every pointer is to the device's memory and
//         aligned to its element. For int8 images, and without windows tables, come rounded, as BlockedQuadsCuda does
//         it: int8, table_stride bytes from one to the next.
// Method: where a group has filters enough and tables fit the tiles of codebook_matmul, windows are its packed samples:
// as
//         many outputs at a time as take 64 MiB, so that their windows are made, multiplied on tensor cores (in mode
//         Exact by tiles of multiply-adds) and, where outputs are few, cut into parts there. That looks a code up once
//         for 128 outputs. Else a block computes neighbouring outputs of 8 filters, a thread one place of them, over
//         images as they lie; it decodes the filters' codes once, so many columns at a time, into weights and offsets
//         from an output's first input.
// Cost:   two numbers, for 32 images of 256 channels at 14 x 14 and 256 filters of 3 x 3, codes of 4 bits. Bytes: x and
//         y 6.4 MB each in float32, codes 0.3 MB, and windows 57.8 MB, 28.9 in bfloat16 and 14.5 in int8, written once
//         and read once for each 128 filters, by 98 blocks that are all there at once: 24, 12 and 6 us to write at the
//         2.4 TB/s of an H100, less where they stay in its 50 MB of second cache level. Operations: 7.4 thousand
//         million, 180, 29 and 19 us at the 41, 256 and 380 thousand a nanosecond that codebook_matmul reached there,
//         and 98 blocks occupy 98 of 132 multiprocessors: 240, 37 and 26. So products bound it, and 270, 50 and 35 us
//         were expected with their windows. An H200 took 325, 106 and 97 us: 74, 47 and 36 % of that; the rest is not
//         profiled. The other way took 691, 717 and 706 us on an H100: a column costs a thread one load and two
//         comparisons beside its 8 multiply-adds. Rows have less than 2^32 columns.
// Safety: a code is compared with the entries before it is used. A kernel cannot return a status without making the
//         caller wait, so a filter with a code outside its table is NaN, in every image.
// Order:  every sum has one order of summation; int8 gives the bits that it gives on the CPU.
#pragma once

#include <cstdint>

#include "kernels/codebook_matmul/codebook_matmul.h"
#include "kernels/sparse_conv2d/sparse_conv2d_cuda.h"

namespace tersetorch {

// How many outputs have windows made for them at a time, 0 for none, their bytes, and the parts of their sums.
struct CodebookConvPlan {
  std::int64_t outputs = 0, window_stride = 0;
  int part_count = 1;
};

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
  // Scratch as the plan wants it, aligned to 16 bytes.
  CodebookConvPlan plan{};
  void* windows = nullptr;         // [outputs, window_stride]
  float* window_scales = nullptr;  // [outputs], for int8 only
  void* parts = nullptr;           // 4 bytes [part_count, outputs, filters of a group] where there are several
};

// The plan for such a call on the current device. Without windows, int8 wants tables and their scales.
CodebookConvPlan CodebookConvPlanCuda(const CodebookConvCudaArgs& args) noexcept;

// Enqueues on `stream`, a cudaStream_t, and returns the cudaError_t of that.
int CodebookConvCuda(const CodebookConvCudaArgs& args, void* stream) noexcept;

}  // namespace tersetorch
