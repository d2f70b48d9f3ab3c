// BitplaneMatmul on a CUDA device.
//
// Cost:   as kernels/sign_matmul has it, in 32-bit integers and x of a byte: [4096, 4096] took 12.5 us for one sample
//         and 668 us for 1,024, 87 % of what shared memory gives. Windows of images, each byte of which is looked for
//         anew, were not measured.
#pragma once

#include <cstdint>

#include "kernels/bitplane_matmul/bitplane_matmul.h"

namespace tersetorch {

// Enqueues on `stream`, a cudaStream_t, and returns the cudaError_t of that; any number of samples, no tables are
// given. Pointers are aligned to their element.
int BitplaneMatmulCuda(const BitplaneTablesArgs& x, const BitplaneMatmulArgs& args, void* stream) noexcept;

}  // namespace tersetorch
