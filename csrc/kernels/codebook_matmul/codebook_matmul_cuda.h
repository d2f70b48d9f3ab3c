// The product of codebook_matmul.h on a CUDA device, over samples as they lie: no panels, and any number of them.
//
// Layout: x and y row-major [samples, features]; every pointer is to the device's memory and aligned to its element.
//         Tables that fit a block's shared memory (one for the weight, or one for each row at up to 4 bits) have
//         kernels of their own, which pack x into `packed` where CodebookPlanCuda says so. For the others in int8 x and
//         the codebook come rounded, as BlockedQuadsCuda does it: rows of x_stride bytes, and tables table_stride bytes
//         apart.
// Cost:   two numbers, bits / 8 bytes of codes for each weight and two operations for each weight and sample. 4,096 x
//         9,216 weights of 4 bits are 18.9 MB, 7.9 us at the 2.4 TB/s that a copy reaches on an H100. The kernels
//         alone, with x packed, took there (80 GB, CUDA 13.0, 2026-11-26) for 1, 16, 64, 256 and 1,024 samples
//           bfloat16   14.8 us, 17.7, 33.3, 97 and 301, which are 5, 68, 145, 200 and 256 Tflop/s,
//           int8       14.7 us, 17.4, 29.3, 73 and 204, which are 5, 69, 165, 264 and 380 Top/s, and
//           exact      16.5 us, - , 148, 493 and 1,906, which are 5, -, 33, 39 and 41 Tflop/s;
//         codes of 8 bits, 37.7 MB, 21.7, 20.4 and 23.1 us for one sample. bench/cuda/codebook_variants.cu repeats it.
//         One sample takes twice what its bytes would, though its look-ups in shared memory need but 2.6 us in
//         bfloat16: it waits, for tables and first loads, more than it works. A tile of 128 x 128 in bfloat16 takes 32
//         columns in some 900 clocks, of which shared memory works 384, for look-ups and x, and tensor cores 512.
//         Decoding and reducing move a float32 for each code, 151 MB and 63 us there; they were not measured.
// Safety: a code is compared with the entries before it is used. A kernel cannot return a status without making the
//         caller wait, so the row of a code outside its table is NaN: in y, in every sample, and in the dense weight.
// Order:  every sum has one order of summation; int8 gives the bits that it gives on the CPU.
#pragma once

#include <cstdint>

#include "kernels/codebook_matmul/codebook_matmul.h"

namespace tersetorch {

struct CodebookMatmulCudaArgs {
  CodebookWeight weight;
  CodebookMode mode;
  const void* x;  // [samples, columns], as stored_as says; [samples, x_stride] int8 for int8
  FloatDtype stored_as;
  const float* bias;  // [rows] or null
  bool relu;
  void* y;  // [samples, rows], stored as stored_as says
  std::int64_t samples;
  // Scratch as CodebookPlanCuda wants it, aligned to 16 bytes, or null.
  void* packed = nullptr;  // [samples, packed_stride]
  std::int64_t packed_stride = 0;
  void* parts = nullptr;  // 4 bytes [part_count, samples, rows] where there are several
  int part_count = 1;
  // Where y is not [samples, rows]: it is [samples, y_rows], or with `plane` [images, y_rows, plane], sample n being
  // place first_place + n of all images'. For CodebookTilesCuda only.
  std::int64_t y_rows = 0, plane = 0, first_place = 0;
  // For int8 only.
  float* sample_scales = nullptr;  // [samples]; written where x is packed
  // For int8 without packed.
  const std::int8_t* tables = nullptr;
  std::int64_t x_stride = 0, table_stride = 0;
  const float* table_scales = nullptr;  // [rows] with per_row, else [1]
};

// As CodebookDecode: dense [rows, columns].
struct CodebookDecodeCudaArgs {
  CodebookWeight weight;
  float* dense;
};

// As CodebookReduce, without codes outside their table; a block adds up a part of the rows of a table.
struct CodebookReduceCudaArgs {
  CodebookWeight weight;  // its codebook is not read
  const float* grad;      // [rows, columns]
  float* sums;            // [tables, entries]
  std::int64_t tables;
  std::int64_t parts = 1;     // CodebookReducePartsCuda
  double* partial = nullptr;  // scratch [parts, tables, entries] where there are several
};
std::int64_t CodebookReducePartsCuda(const CodebookWeight& weight, std::int64_t tables) noexcept;

// packed_stride, 0 for none, and part_count of the scratch for such a call on the current device.
struct CodebookPlan {
  std::int64_t packed_stride;
  int part_count;
};
CodebookPlan CodebookPlanCuda(const CodebookMatmulCudaArgs& args) noexcept;

// Each enqueues on `stream`, a cudaStream_t, and returns the cudaError_t of that.
int CodebookMatmulCuda(const CodebookMatmulCudaArgs& args, void* stream) noexcept;
int CodebookDecodeCuda(const CodebookDecodeCudaArgs& args, void* stream) noexcept;
int CodebookReduceCuda(const CodebookReduceCudaArgs& args, void* stream) noexcept;

}  // namespace tersetorch
