// The column of each value of a weight with one bit for each weight, on a CUDA device, where gradients ask for them.
//
// Safety: a row whose offsets do not rise, or whose bits do not count its values or name no column, is listed as
//         columns -1, which the products that read the list refuse.
// Cost:   bytes = 2 * 8 * rows * ceil(columns / 64) + 2 * 4 * nnz: the bits are counted before any column is written,
//         and the list is cleared first. The second reading comes from the second cache level: 19 MB for AlexNet's fc6
//         [4096, 9216] at 10 % are 8 us at the H100's 2.41 TB/s. Operations: a column costs its lane some 8, as many as
//         bits differ between the lanes of a warp. Not measured.
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
