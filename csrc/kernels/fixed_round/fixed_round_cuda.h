// FixedRound on a CUDA device. A thread computes a counter and rounds the 8 values that its bits belong to: two
// neighbours in each of four vectors. NaN becomes the whole number 0 and nothing is said of it. Products of 32 bits are
// the limit where a GPU has few of them; memory elsewhere.
#pragma once

#include <cstdint>

#include "kernels/fixed_round/fixed_round.h"

namespace tersetorch {

// Values [0, size). Enqueues on `stream`, a cudaStream_t, and returns the cudaError_t of that. Pointers are aligned to
// their element.
int FixedRoundCuda(const FixedRoundArgs& args, std::int64_t size, void* stream) noexcept;

}  // namespace tersetorch
