// SignMaxPool2d on a CUDA device. Memory is the limit: a thread joins the words of a window.
//
// Cost: bytes = 8 * words of x and y, those of overlapping windows again from the caches; kernel_h * kernel_w logical
// operations a word. 256 channels of 32 images of 56 x 56, halved, are 4.0 MB, 1.7 us at the H100's 2.41 TB/s, less
// than a launch. Not measured.
#pragma once

#include <cstdint>

#include "kernels/sign_max_pool2d/sign_max_pool2d.h"

namespace tersetorch {

// Enqueues on `stream`, a cudaStream_t, and returns the cudaError_t of that. Pointers are aligned to their element.
int SignMaxPool2dCuda(const SignMaxPool2dArgs& args, void* stream) noexcept;

}  // namespace tersetorch
