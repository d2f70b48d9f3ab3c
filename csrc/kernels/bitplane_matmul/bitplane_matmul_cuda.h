// BitplaneMatmul on a CUDA device.
//
// Limits: as kernels/sign_matmul has them, in 32-bit integers.
#pragma once

#include <cstdint>

#include "kernels/bitplane_matmul/bitplane_matmul.h"

namespace tersetorch {

// Enqueues on `stream`, a cudaStream_t, and returns the cudaError_t of that; any number of samples, no tables are
// given. Pointers are aligned to their element.
int BitplaneMatmulCuda(const BitplaneTablesArgs& x, const BitplaneMatmulArgs& args, void* stream) noexcept;

}  // namespace tersetorch
