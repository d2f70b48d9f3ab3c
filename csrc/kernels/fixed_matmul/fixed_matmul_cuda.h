// FixedMatmul and FixedConvert on a CUDA device, of the same packed weights and of samples as they are. Threads side by
// side read the 16 rows of a panel, which lie side by side. Few samples: a block multiplies a panel with them, and the
// weight's bytes are the limit. Many: tiles of 32 rows and 64 samples, of int8 on tensor cores, whose fragments come
// from the panel as they are; of int16 each product is an instruction with a sum of 64 bits. Windows of images: one
// number of an image is loaded for each product with a row, and loads are the limit.
//
// Cost: bytes = weight + x + 2 * 8 * samples * rows for the sums, which go through memory, + y; operations = 2 * rows *
// columns * samples. On an H100 [4096, 4096] took, for 1, 64 and 256 samples,
//   int8   9.8, 24.6 and 61.9 us, of 6.9, 7.5 (16.8 MB at 2.41 TB/s) and 10.1 (2,444 multiply-adds a clock and
//          multiprocessor): 71, 30 and 16 %; the conversion of the sums is 11 of the 61.9, and
//   int16  16.1, 228 and 847 us, of 13.8, 14.5 and 16.4: 86, 6 and 2 %, 22 products a clock and multiprocessor.
// An H200, which copies 2.76 TB/s, took 8.3, 24.3 and 61.7 us, and 13.3 (92 %), 231 and 834: the bank conflicts that
// int16 has lost since were not what many samples wait for. Windows of images were not measured.
#pragma once

#include <cstdint>

#include "kernels/fixed_matmul/fixed_images.h"
#include "kernels/fixed_matmul/fixed_matmul.h"

namespace tersetorch {

struct FixedCudaArgs {
  const void* x;  // [samples, columns], or images
  bool x_wide;
  const void* packed;  // [panels, words + 1, 16] words
  bool wide;
  std::int64_t samples, columns, rows;
  std::int64_t* sums;  // [samples, rows]
  FixedImages images;  // of which samples are the windows; as it comes where there are none
};

// Enqueue on `stream`, a cudaStream_t, and return the cudaError_t of that. Pointers are aligned to their element, those
// of packed weights to 16 bytes.
int FixedMatmulCuda(const FixedCudaArgs& args, void* stream) noexcept;
int FixedConv2dCuda(const FixedCudaArgs& args, void* stream) noexcept;
// Samples [0, samples), not split; `added` may be any numbers. Of each `pixels` samples, y has the values of a row
// together: with 1, those of a sample.
int FixedConvertCuda(const FixedConvertArgs& args, std::int64_t samples, std::int64_t pixels, void* stream) noexcept;

}  // namespace tersetorch
