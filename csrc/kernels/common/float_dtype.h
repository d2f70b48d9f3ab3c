// How an array of floating point numbers is stored.
#pragma once

namespace tersetorch {

// Kernels of CUDA devices take them all, those of the CPU no float16.
enum class FloatDtype : int { kFloat32, kBFloat16, kFloat16 };

}  // namespace tersetorch
