// SignPack on a CUDA device. Memory is the limit: a warp reads 64 numbers and writes a word.
//
// Cost: bytes = x + x's numbers / 8; one comparison a number. 1,024 samples of 4,096 float32 are 17.3 MB, 7.2 us at the
// H100's 2.41 TB/s: a product that packs them first took 9.0 us longer (80 %).
#pragma once

#include <cstdint>

#include "kernels/sign_pack/sign_pack.h"

namespace tersetorch {

// Enqueues on `stream`, a cudaStream_t, and returns the cudaError_t of that. Pointers are aligned to their element.
int SignPackCuda(const SignPackArgs& args, std::int64_t samples, void* stream) noexcept;
// Of some images, one after the other.
int SignPackPlanesCuda(const SignPackPlanesArgs& args, std::int64_t images, void* stream) noexcept;

}  // namespace tersetorch
