// FixedMatmul and FixedConvert on a CUDA device, of the same packed weights and of samples as they are. A block
// multiplies a panel of 16 rows with some samples: 16 threads side by side read a word of each row, other threads other
// words, and their sums, of 64 bits, are added at the end. Loads are the limit.
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
// of packed weights to words.
int FixedMatmulCuda(const FixedCudaArgs& args, void* stream) noexcept;
int FixedConv2dCuda(const FixedCudaArgs& args, void* stream) noexcept;
// Samples [0, samples), not split; `added` may be any numbers. Of each `pixels` samples, y has the values of a row
// together: with 1, those of a sample.
int FixedConvertCuda(const FixedConvertArgs& args, std::int64_t samples, std::int64_t pixels, void* stream) noexcept;

}  // namespace tersetorch
