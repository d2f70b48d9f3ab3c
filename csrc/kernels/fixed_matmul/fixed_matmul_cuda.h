// FixedMatmul and FixedConvert on a CUDA device. A warp multiplies a row with some samples: a lane adds the products of
// its columns in 64 bits, and the lanes are added at the end. Loads are the limit.
#pragma once

#include <cstdint>

#include "kernels/fixed_matmul/fixed_matmul.h"

namespace tersetorch {

// Enqueue on `stream`, a cudaStream_t, and return the cudaError_t of that. Pointers are aligned to their element.
int FixedMatmulCuda(const FixedMatmulArgs& args, void* stream) noexcept;
// Values [0, size).
int FixedConvertCuda(const FixedConvertArgs& args, std::int64_t size, void* stream) noexcept;

}  // namespace tersetorch
