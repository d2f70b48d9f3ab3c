// The lookup of codebook_embedding.h on a CUDA device.
//
// Layout: every pointer is to the device's memory and aligned to its element.
// Cost:   bytes = look-ups * (bits / 8 * columns + columns * the result's); no arithmetic. 65,536 look-ups of 768
//         columns in 4 bits are 227 MB in float32, 94 us at the H100's 2.41 TB/s: they took 104 us (91 %), in 8 bits
//         159 of 105 (66 %), in bfloat16 as long as in float32 (51 % and 39 %): decoding bounds it then. The sums'
//         warps read all codes of their table once for each entry, entries * look-ups * columns of them; not measured.
// Safety: indices are compared with the rows and codes with the entries before they are used. A kernel cannot return a
//         status without making the caller wait, so an index outside the rows, and one of a row with a code outside its
//         table, give a row of NaN. To the sums they add nothing.
// Order:  every sum has one order of summation.
#pragma once

#include <cstdint>

#include "kernels/codebook_embedding/codebook_embedding.h"

namespace tersetorch {

struct CodebookEmbeddingCudaArgs {
  CodebookWeight weight;
  CodebookIndices indices;
  std::int64_t count;  // of indices
  void* y;             // [count, columns]
  FloatDtype y_stored_as;
};

// As CodebookEmbeddingReduce; table t and entry k are added up by one warp.
struct CodebookEmbeddingReduceCudaArgs {
  CodebookWeight weight;  // its codebook is not read
  CodebookIndices indices;
  std::int64_t count, padding;
  const float* grad;  // [count, columns]
  float* sums;        // [tables, entries]
  std::int64_t tables;
};

// Each enqueues on `stream`, a cudaStream_t, and returns the cudaError_t of that.
int CodebookEmbeddingCuda(const CodebookEmbeddingCudaArgs& args, void* stream) noexcept;
int CodebookEmbeddingReduceCuda(const CodebookEmbeddingReduceCudaArgs& args, void* stream) noexcept;

}  // namespace tersetorch
