// Images in batches by a sparse weight, on tensor cores: the part of sparse_conv2d_cuda.h that multiplies the zeros
// too.
//
// Math:   products of two bfloat16 are exact in float32, and so are those of two int8 in int32: mode bfloat16, mode
// int8,
//         and mode exact where x and the values are bfloat16. Other exact products stay where they are added up in
//         float32, from the non-zeros alone: three bfloat16 stand for a float32, and 6 products of them for one, but
//         6 * 2,304 additions that tensor cores cut off would leave the bound that a filter of 460 non-zeros has; and
//         float32 multiply-adds of dense tiles, 128 a clock and multiprocessor, need 142 us at best for the layer below
//         at 52 TFLOP/s, which leaves no margin worth a kernel to the 114 us that reading x for its non-zeros needs.
// Method: one kernel writes the weight out with its zeros, rows of 16 filters as lanes take them into fragments: the
//         channels in words of 2 bfloat16 or 4 int8, 16 words after the other, tap after tap. Another packs x in the
//         same words, rounded as the mode says: pixel after pixel, 16 words of each. Then a block takes 64 filters of a
//         group and up to 128 or 256 outputs. 16 words of channels after the other are copied asynchronously into one
//         of two stages, the inputs of all the tile's outputs once, zeros around the image. For a tap, a warp reads 16
//         bytes of x for each lane at the outputs' places, moved by the tap: no windows are made, and with steps of 1
//         no banks conflict. The weight's fragments come from global memory, a tap ahead. With steps of 2 the places of
//         two outputs share banks: reads of x take twice as long.
//         Absent weights are zeros here, which an infinite x would turn into NaN: an output that is NaN is computed
//         again from its non-zeros.
// Rule:   ConvTakesFragments: whichever takes fewer clocks on an H100 (132 multiprocessors, 1,755 MHz, 2,411 GB/s).
// Here
//         tiles at 730 multiply-adds a clock and multiprocessor (twice that for int8), 60 % of what codebook_matmul's
//         reached, and at least 1,000 clocks for 16 words of channels, whose copies must come; bytes of x, packed x
//         and the weight once each; 3,500 clocks for two more kernels. There the non-zeros' products, at the 11 a clock
//         and multiprocessor that were measured with 32 images.
// Cost:   256 x 256 channels, 3 x 3, at 14 x 14, 32 images, 20 %: 3.7 G multiply-adds in 128 blocks, 31,000 clocks or
//         18 us at 1,223 a clock and multiprocessor; beside them a tap's reads take 48 of 53 clocks of shared memory
//         and the first cache level. x 6.4 MB, packed 3.2 MB and read 4 times from the second level, y 6.4 MB, the
//         weight 1.2 MB: 7 us, of which 4 before the products. In int8 half of the products' time, and the scales'
//         kernel. 30 to 40 us are expected where multiplying non-zeros took 288. Not measured.
#pragma once

#include "kernels/sparse_conv2d/sparse_conv2d_cuda.h"

namespace tersetorch {

// A plan with fragments where the current device, the mode, the numbers and the shape allow them.
ConvCudaPlan ConvFragmentPlan(const ConvCudaArgs& args) noexcept;
// Whether that plan is expected to take less time than multiplying the non-zeros.
bool ConvTakesFragments(const ConvCudaArgs& args, const ConvCudaPlan& plan) noexcept;
// Of scratch.
std::int64_t ConvFragmentBytes(const ConvCudaArgs& args) noexcept;
// After the scales in mode int8.
int ConvFragmentsCuda(const ConvCudaArgs& args, void* stream) noexcept;

}  // namespace tersetorch
