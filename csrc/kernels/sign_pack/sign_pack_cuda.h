// SignPack on a CUDA device. Memory is the limit: a warp reads 64 numbers and writes a word.
#pragma once

#include <cstdint>

#include "kernels/sign_pack/sign_pack.h"

namespace tersetorch {

// Enqueues on `stream`, a cudaStream_t, and returns the cudaError_t of that. Pointers are aligned to their element.
int SignPackCuda(const SignPackArgs& args, std::int64_t samples, void* stream) noexcept;
// Of some images, one after the other.
int SignPackPlanesCuda(const SignPackPlanesArgs& args, std::int64_t images, void* stream) noexcept;

}  // namespace tersetorch
