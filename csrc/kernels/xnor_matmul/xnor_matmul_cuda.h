// XnorMatmul on a CUDA device.
//
// Limits: a product of bits on tensor cores, m16n8k256 with and.popc, is native from sm_80 to sm_90: 19,480
//         multiply-adds a clock and multiprocessor measured on an H100, where xor.popc, emulated there, gives 2,857. 8
//         products of a fragment bring 4 more with ones, which count the ones of either side. Few samples read the
//         weight once, an eighth of a byte for each product; many read their part of it and of x from shared memory, 12
//         words of 8 bytes and lane for 16 products. Devices without such tensor cores add up 4 words and the rest of
//         earlier ones in full adders, 8 logical operations, and count the one word that is left.
// Cost:   bytes = (rows + samples) * columns / 8 + y; operations = rows * columns * samples multiply-adds of bits. On
//         an H100 [4096, 4096] with x packed took 3.7 us for one sample, of 0.9 for 2.1 MB at 2.41 TB/s (24 %), 6.1
//         for 64, of 1.3 (22 %), and 39.2 for 1,024, of 8.0 for 19.4 MB, mostly y (21 %); their signs alone 30.9 us,
//         whose products take tensor cores 5.7 (18 %). One sample is little more than a launch and its loads; what
//         bounds many was not measured.
#pragma once

#include <cstdint>

#include "kernels/xnor_matmul/xnor_matmul.h"

namespace tersetorch {

// The ways to compute it: lanes that count; few samples, or many, on tensor cores of sm_80 to sm_90.
enum class XnorPath : int { kCount, kFew, kMany };

// Enqueues on `stream`, a cudaStream_t, and returns the cudaError_t of that. Pointers are aligned to their element.
// The weight is aligned to 16 bytes.
int XnorMatmulCuda(const XnorMatmulArgs& args, void* stream) noexcept;
int XnorMatmulCudaBy(XnorPath path, const XnorMatmulArgs& args, void* stream) noexcept;

}  // namespace tersetorch
