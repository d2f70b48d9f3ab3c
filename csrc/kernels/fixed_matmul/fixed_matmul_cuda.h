// FixedMatmul and FixedConvert on a CUDA device.
//
// Method: up to 8 samples, and rows that are no whole 32-bit words, are multiplied by a warp for each row: a lane adds
//         the products of its columns, and the lanes are added at the end. Else a block multiplies 32 rows with 64
//         samples that it copies to shared memory: int8 on tensor cores, in 32 bits for 4,096 columns at a time, int16
//         one by one in 64 bits.
// Limits: a row for one sample is read at the rate of memory. Tiles wait for each step's words from the L2 cache; the
//         64-bit sums of int16 take an instruction each.
#pragma once

#include <cstdint>

#include "kernels/fixed_matmul/fixed_matmul.h"

namespace tersetorch {

// Enqueue on `stream`, a cudaStream_t, and return the cudaError_t of that. Pointers are aligned to their element.
int FixedMatmulCuda(const FixedMatmulArgs& args, void* stream) noexcept;
// Values [0, size).
int FixedConvertCuda(const FixedConvertArgs& args, std::int64_t size, void* stream) noexcept;

}  // namespace tersetorch
