// The column of each value of a weight with one bit for each weight, on a CUDA device, where gradients ask for them.
//
// Safety: a row whose offsets do not rise, or whose bits do not count its values or name no column, is listed as
//         columns -1, which the products that read the list refuse.
// Cost:   bytes = 8 * rows * ceil(columns / 64) + 8 * nnz: the list is cleared before it is written, and the bits are
//         read again from the second cache level after they were counted. [4096, 9216] with 10 % are 34.9 MB, 14.5 us
//         at the H100's 2.41 TB/s. Operations: some 8 a column, for which the lane of a warp with the most bits makes
//         the others wait. Not measured.
#pragma once

#include <cstdint>

namespace tersetorch {

struct BitmapRowsCudaArgs {
  const std::uint64_t* bitmap;      // [rows, ceil(columns / 64)]
  const std::int32_t* row_offsets;  // [rows + 1]
  std::int64_t rows, columns, nnz;
  std::int32_t* col_indices;  // [nnz]
};

// Enqueues on `stream`, a cudaStream_t, and returns the cudaError_t of that.
int BitmapRowsCuda(const BitmapRowsCudaArgs& args, void* stream) noexcept;

}  // namespace tersetorch
