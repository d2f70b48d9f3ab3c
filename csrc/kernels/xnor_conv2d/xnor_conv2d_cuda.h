// XnorConv2d on a CUDA device, of all images at once. Lanes are the filters of a tile, and read the words of a pixel as
// one; a warp has 4 pixels for each word of the weight. A full adder of three lop3 takes both halves of a word, as on
// the CPU: 3 of these, a count and an addition for 64 products of a lane.
#pragma once

#include <cstdint>

#include "kernels/xnor_conv2d/xnor_conv2d.h"

namespace tersetorch {

// Enqueue on `stream`, a cudaStream_t, and return the cudaError_t of that. Pointers are aligned to their element. Spans
// are not needed, and bits need not be 0.
int XnorConv2dCuda(const XnorConv2dArgs& args, void* stream) noexcept;
int XnorSplitGroupsCuda(const std::uint64_t* x, std::int64_t pixels, std::int64_t groups, std::int64_t channels,
                        std::uint64_t* split, void* stream) noexcept;

}  // namespace tersetorch
