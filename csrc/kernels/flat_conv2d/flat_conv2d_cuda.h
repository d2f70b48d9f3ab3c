// A stage of flat_conv2d.h on a CUDA device.
//
// Layout: x and y lie as their steps say; every pointer is to the device's memory and aligned to its element.
// Method: one kernel multiplies pixels with the lateral filters, through shared memory, into l [images][rank * panels *
//         16][height * width]; the next takes one output a thread, and adds up what its vertical and horizontal filters
//         see of l.
// Limits: l goes through memory, and a vertical sum is made again for each tap of the horizontal filters. A lateral
//         thread reads two vectors of shared memory for 16 multiply-adds. With the channels last the writes of a warp
//         lie out_channels apart.
// Cost:   bytes = x + 2 * 4 * images * height * width * maps for l + y; operations = 2 * maps * (channels * inputs +
//         kernel_h * kernel_w * outputs). Two stages of 96 maps, 5 x 5 at 56 x 56, have 4.1 Gflop for 32 images without
//         what is made again, 79 us of an H100's 25 T multiply-adds a second, and move 154 MB of l, 64 us: they took
//         972 us (8 %), for one image 53.3 us of 2.5. 3 x 3 of 256 maps at 14 x 14 took 187 us of 33 (17 %). Where the
//         time goes was not measured.
// Order:  every sum has one order of summation.
#pragma once

#include <cstdint>

#include "kernels/flat_conv2d/flat_conv2d.h"
#include "kernels/sparse_conv2d/sparse_conv2d_cuda.h"

namespace tersetorch {

struct FlatConvCudaArgs {
  FlatStage stage;
  std::int64_t images;
  const void* x;  // [images, in_channels, height, width]
  ConvSteps x_steps;
  FloatDtype x_stored_as;
  float* l;  // uninitialised, of FlatLateralFloats
  bool relu;
  void* y;  // [images, out_channels, out_height, out_width]
  ConvSteps y_steps;
  FloatDtype y_stored_as;
};

inline std::int64_t FlatLateralFloats(const FlatStage& s, std::int64_t images) {
  return images * s.rank * s.Panels() * kFlatLanes * s.height * s.width;
}

// Enqueues on `stream`, a cudaStream_t, and returns the cudaError_t of that.
int FlatConvCuda(const FlatConvCudaArgs& args, void* stream) noexcept;

}  // namespace tersetorch
