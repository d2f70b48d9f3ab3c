// SignMaxPool2d on a CUDA device. Memory is the limit: a thread joins the words of a window.
#pragma once

#include <cstdint>

#include "kernels/sign_max_pool2d/sign_max_pool2d.h"

namespace tersetorch {

// Enqueues on `stream`, a cudaStream_t, and returns the cudaError_t of that. Pointers are aligned to their element.
int SignMaxPool2dCuda(const SignMaxPool2dArgs& args, void* stream) noexcept;

}  // namespace tersetorch
