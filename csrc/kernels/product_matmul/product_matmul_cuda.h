// The products of product_matmul.h on a CUDA device, over samples as they lie.
//
// Layout: codes and codebooks as there; x and y row-major [samples, features]; every pointer is to the device's memory
//         and aligned to its element, codes to 16 bytes. Fewer than 2^31 tables.
// Method: a block takes some tables, some tiles of rows and some samples. It makes the tables in shared memory, so that
//         no table ever lies in the device's memory, walks the rows' codes and leaves its sums in `parts`; a last
//         kernel adds those of a row. Words: a block for few samples keeps tables as words of one float or, rounded,
//         of a byte of four samples; a warp looks two tables (4 bits: two groups) up for 64 rows. Panels: tables for 4
//         or 8 samples, so many copies of them that an entry fills the 32 banks of shared memory: the lanes that read
//         at once read from different copies, and no banks conflict.
//         int8: one kernel measures the tables, one finds each sample's scale, and words are rounded as they are made.
// Limits: shared memory gives 32 words a cycle. Panels take that for rows * tables * samples words, of which one cycle
//         in four or so goes to making tables. Random words conflict: 3.4 cycles for 32 of 256 entries, one for 16.
// Cost:   bytes = codes + codebooks + x + y + parts twice; look-ups = rows * tables * samples. On an H100 [4096, 4096]
//         as 4 columns of 256 entries, 8.4 MB and 3.5 us at 2.41 TB/s, took 11.2 us for one sample (31 %), 31.8 for 8
//         and 104 for 64, whose look-ups keep shared memory busy for 36; as 4 columns of 16 entries, 2.4 MB and 1.0 us,
//         6.8, 14.0 and 63.6. One sample waits for launches and tables more than for bytes. int8 took 16.6, 24.2 and
//         124 us. Decoding, 67 MB and 28 us, was not measured.
// Safety: an entry past the codebook's is NaN, or is found by comparing codes where tables are bytes. A kernel cannot
//         return a status without making the caller wait, so a row with a code outside is NaN in every sample, in
//         ProductDecodeCuda too.
// Order:  every sum has one order of summation; int8 products give the bits that they give on the CPU.
#pragma once

#include <cstdint>

#include "kernels/common/float_dtype.h"
#include "kernels/product_matmul/product_matmul.h"

namespace tersetorch {

// How a product is shared out over blocks.
struct ProductCudaPlan {
  std::int64_t lanes;       // samples of a block: 1, 4 or 8, of int8 4
  std::int64_t threads;     // of a block
  std::int64_t steps;       // pairs or tables or, in 4 bits, groups of tables that a block walks
  std::int64_t splits;      // blocks that share a row's tables
  std::int64_t tiles;       // of rows of a block
  std::int64_t row_blocks;  // blocks that share the rows
};

ProductCudaPlan ProductPlanCuda(const ProductWeight& weight, std::int64_t samples, bool quantized) noexcept;
// Bytes of the blocks' sums.
std::int64_t ProductPartsBytes(const ProductWeight& weight, const ProductCudaPlan& plan, std::int64_t samples,
                               bool quantized) noexcept;

struct ProductMatmulCudaArgs {
  ProductWeight weight;
  const void* x;  // [samples, columns]; float32 where y is float16
  FloatDtype stored_as;
  ProductCudaPlan plan;
  void* parts;           // [splits, samples, tiles * 64] float32, or uint16 of mode int8: scratch, aligned to 16 bytes
  float *lows, *ranges;  // [samples, stages * segments], scratch of mode int8, else null
  ProductScale* scales;  // [samples], the same
  const float* bias;     // [rows] or null
  bool relu;
  void* y;  // [samples, rows], stored as stored_as says
  std::int64_t samples;
};

// Each enqueues on `stream`, a cudaStream_t, and returns the cudaError_t of that. `dense` is [rows, columns].
int ProductMatmulCuda(const ProductMatmulCudaArgs& args, void* stream) noexcept;
int ProductDecodeCuda(const ProductDecodeArgs& args, void* stream) noexcept;

}  // namespace tersetorch
