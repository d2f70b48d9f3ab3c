// y = relu?(x * W^T + bias) for a weight W kept in compressed sparse rows, and the two gradients of that product.
//
// Math:   y[n][r] = sum_k w[k] * x[n][col_indices[k]] + bias[r], k in [row_offsets[r], row_offsets[r + 1]),
//         at least 0 with relu; w[k] is values[k] or codebook[values[k]]. Everything is accumulated in float32.
// Layout: x, y and their gradients row-major [samples, features], float32 or bfloat16. The kernels read samples from
//         panels: `width` samples transposed, float32 [features][width], zero where a panel has fewer samples, so that
//         one non-zero weight multiplies consecutive numbers. width is 1, 8, 16 or 32.
// Limits: with one sample a non-zero costs one element of a gather, 0.7 cycles where gathers are fast, and its bytes:
//         a weight beyond the caches waits for them, which is why columns can be 16-bit (a third less to read).
// Safety: every row offset, column and code is compared with its bounds before it is used; the first row that fails
//         ends the call with the status, and what was written by then is of no use.
// Source: the panels follow Elsen et al., Fast Sparse ConvNets (2019), section 3, with samples in place of pixels.
//
// All functions are single-threaded, and a number does not depend on how the caller splits the work. No pointer needs
// to be aligned.
#pragma once

#include <cstdint>

#include "kernels/common/export.h"
#include "kernels/common/float_dtype.h"

namespace tersetorch {

inline constexpr std::int64_t kCsrMaxWidth = 32;
inline constexpr std::int64_t kCsrMaxEntries = 256;

enum class CsrValues : int { kFloat32, kBFloat16, kCodes };
enum class CsrIndices : int { kInt32, kUInt16 };
enum class CsrStatus : int { kOk, kBadRowOffsets, kBadColumn, kBadCode };

struct CsrWeight {
  const std::int32_t* row_offsets;  // [rows + 1]
  const void* col_indices;          // [nnz], as indexed_by says, in any order within a row
  CsrIndices indexed_by;
  const void* values;  // [nnz], as stored_as says; codes are uint8
  CsrValues stored_as;
  const float* codebook;  // [entries], for codes only
  std::int64_t entries;
  std::int64_t rows, columns, nnz;
};

struct CsrMatmulArgs {
  CsrWeight weight;
  const float* panel;  // of x, [columns, width]
  std::int64_t width;
  const float* bias;  // [rows] or null
  bool relu;
  void* y;  // [samples, rows]
  FloatDtype y_stored_as;
  std::int64_t samples;  // <= width
};

struct CsrGradXArgs {
  CsrWeight weight;
  const float* grad_panel;  // of grad_y, [rows, width]
  std::int64_t width;
  float* sums;   // [columns, width], scratch
  void* grad_x;  // [samples, columns]
  FloatDtype grad_x_stored_as;
  std::int64_t samples;  // <= width
};

struct CsrGradValuesArgs {
  CsrWeight weight;         // its values are not read
  const float* grad_panel;  // of grad_y, [rows, width]
  const float* x_panel;     // [columns, width]
  std::int64_t width;
  bool add;            // to what grad_values holds, instead of replacing it
  float* grad_values;  // [nnz]
};

// Rows [row_begin, row_end) of one panel's y.
TERSETORCH_API CsrStatus CsrMatmul(const CsrMatmulArgs& args, std::int64_t row_begin, std::int64_t row_end) noexcept;

// grad_x[n][c] = sum over the non-zeros in column c of w * grad_y[n][r], for one panel; rows are added in order.
TERSETORCH_API CsrStatus CsrMatmulGradX(const CsrGradXArgs& args) noexcept;

// grad_values[k] = sum_n grad_y[n][r] * x[n][col_indices[k]] over one panel's samples, for the non-zeros of rows
// [row_begin, row_end).
TERSETORCH_API CsrStatus CsrMatmulGradValues(const CsrGradValuesArgs& args, std::int64_t row_begin,
                                             std::int64_t row_end) noexcept;

struct CsrPackArgs {
  const void* dense;  // [rows, columns]
  FloatDtype stored_as;
  std::int64_t columns;
  const std::int32_t* row_offsets;  // [rows + 1]
  std::int32_t* col_indices;        // [nnz]
  void* values;                     // [nnz], stored as dense is
};

// Non-zeros of a row; NaN is one, -0.0 is none.
TERSETORCH_API std::int64_t CsrCount(const CsrPackArgs& args, std::int64_t row) noexcept;

// The non-zeros of a row, at the offset that row_offsets gives it.
TERSETORCH_API void CsrPack(const CsrPackArgs& args, std::int64_t row) noexcept;

// The variants, hidden in the library; the kernel tests link them directly.
struct CsrKernels {
  CsrStatus (*matmul)(const CsrMatmulArgs&, std::int64_t, std::int64_t) noexcept;
  CsrStatus (*grad_x)(const CsrGradXArgs&) noexcept;
  CsrStatus (*grad_values)(const CsrGradValuesArgs&, std::int64_t, std::int64_t) noexcept;
};
extern const CsrKernels kCsrScalar;
extern const CsrKernels kCsrAvx2;
extern const CsrKernels kCsrAvx512;

}  // namespace tersetorch
