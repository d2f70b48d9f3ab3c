// XnorConv2d on a CUDA device, of all images at once, in one of two ways.
//
// Method: tensor cores of sm_80 to sm_90 count the ones that two fragments have in common, for 64 output pixels and 2
// tiles
//         of filters a block. The words of a pixel's taps are one row, gathered while the block works on those before;
//         words that no tap has are 0, and so neither kernel nor channels need be whole fragments. Elsewhere lanes are
//         the filters of a tile, and read the words of a pixel as one; a warp has 4 pixels for each word of the weight.
//         A full adder of three lop3 takes both halves of a word, as on the CPU: 3 of these, a count and an addition
//         for 64 products of a lane.
// Cost:   two numbers. Bytes: x and weight an eighth for each sign, y 4 or an eighth for each number; 32 images of 128
//         channels at 28 x 28, 3 x 3, write 12.8 MB of int32, 5.3 us at the 2.4 TB/s of a copy on an H100, or 0.4 MB of
//         bits. Operations: their 3.7 thousand million products, each done twice and 18 words done as 20, take 1.8 us
//         of and.popc at 19,480 a clock and multiprocessor. A warp's 4 words of 32 pixels and 32 filters are 16
//         products of fragments, 108 clocks of its tensor core, beside 12 reads of shared memory and some 60 other
//         instructions; blocks read 14.5 MB from the second cache level. So y's bytes bound it, or for bits the start
//         and the first words' way. An H200 (2.76 TB/s) took 19.9 us for int32, 24 %, and 21.5 for bits; 14.0 and 17.5
//         for 256 channels at 14 x 14 and 512 at 7 x 7, where the lanes that count took 132 and 112, and 177 here, on
//         an H100. What holds the blocks back was not profiled: gathering words between two barriers, it seems, since
//         512 channels, whose products are as many and whose y is a sixteenth, take nearly as long.
#pragma once

#include <cstdint>

#include "kernels/xnor_conv2d/xnor_conv2d.h"

namespace tersetorch {

// The ways to compute it: lanes that count, or tensor cores of sm_80 to sm_90.
enum class XnorConvPath : int { kCount, kFragments };

// Enqueue on `stream`, a cudaStream_t, and return the cudaError_t of that. Pointers are aligned to their element, the
// weight to 16 bytes. Spans are not needed, and bits need not be 0.
int XnorConv2dCuda(const XnorConv2dArgs& args, void* stream) noexcept;
int XnorConv2dCudaBy(XnorConvPath path, const XnorConv2dArgs& args, void* stream) noexcept;
int XnorSplitGroupsCuda(const std::uint64_t* x, std::int64_t pixels, std::int64_t groups, std::int64_t channels,
                        std::uint64_t* split, void* stream) noexcept;

}  // namespace tersetorch
