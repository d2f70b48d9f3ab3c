// More than kPanelSamples samples by a bitmap, on tensor cores: the part of bitmap_matmul_cuda.h that reads whole
// tiles.
//
// Math:   products of two bfloat16 are exact in float32, and so are those of two int8 in int32: bfloat16 values with
//         bfloat16 x, and int8 values with quantized x. Others stay where they are multiplied in float32.
// Method: a block has 64 rows and 64 or 128 samples. A row's bits are counted first: that finds damage before anything
//         relies on the bits, and the row's first value in the block's part of the columns. Then, 64 columns at a time,
//         a lane takes two bits of a row's word: the ones before them say which values are theirs, and the two numbers
//         or zeros go to shared memory as one word. x is packed with a pitch of whole words and copied asynchronously,
//         two steps ahead; values are loaded one step ahead. A fragment takes its columns in the order in which a lane
//         reads 16 of them that lie together, of weight and x alike. Parts of the columns fill the device; their sums
//         meet in scratch and are added in order.
//         Absent weights are zeros here, which an infinite x would turn into NaN: packing replaces what is not finite
//         by zero and marks the sample, and whoever stores a marked sample multiplies it by the set bits alone.
// Limits: bytes = rows * columns / 8 + values' bytes, and x once for each 64 rows from the second cache level. For 64
//         places of a row 14 instructions and a population count, which takes 4 times as long, whatever the density;
//         for 64 columns of a tile of 64 x 64 some 380 cycles of shared memory, and 210 of tensor cores (1,223
//         multiply-adds a clock).
//         AlexNet's fc7 [4096, 4096], 35 % in bfloat16, 64 samples on an H100: 14 MB or 5.8 us at 2.41 TB/s; decoding
//         262,144 words of a row in 528 schedulers 10,900 clocks or 6.2 us; shared memory 11,900 clocks or 6.8 us;
//         products 6,650 clocks or 3.8 us; x 33 MB from the second level; 6 parts of 1 MB, written and read. Shared
//         memory and decoding bound it: some 15 to 20 us with packing and adding. An H200 took 46.6 us, and 46.1 with
//         10 %, where the kernel for few samples took 150 and 75 on an H100: values are not what it waits for. Not
//         profiled; a warp counts its 16 rows one after the other before it begins, each three loads that wait for each
//         other, in every part again: some 20,000 clocks, which is the difference.
#pragma once

#include "kernels/bitmap_matmul/bitmap_matmul_cuda.h"

namespace tersetorch {

// Whether the current device should take these samples and numbers so.
bool BitmapTakesTiles(const BitmapMatmulCudaArgs& args) noexcept;
std::int64_t BitmapTileScratchBytes(const BitmapMatmulCudaArgs& args) noexcept;
int BitmapTilesCuda(const BitmapMatmulCudaArgs& args, void* stream) noexcept;

}  // namespace tersetorch
