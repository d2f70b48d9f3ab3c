// Rows of a dense weight W kept as codes into tables of up to 256 values, by their indices: an embedding.
//
// Math:   y[i][c] = W[indices[i]][c], W[r][c] = codebook[t][code[r][c]] with t the row, the block of columns, or 0.
//         Stored as bfloat16 an entry is rounded to nearest, ties to even.
//         Its adjoint in the codebook: sums[t][k] += the sum of grad[i][c] over the i and c for which code
//         [indices[i]][c] is k and t their table; an i whose index is the padding's adds nothing.
// Layout: codes as kernels/common/codes.h says; indices are int32 or int64.
// Limits: memory: columns * bits / 8 bytes of codes are read at random places and columns * 4 written (2 for bfloat16)
//         where a dense weight has as many read as written. AVX-512 decodes 16 columns of 4 bits in 2 cycles, the time
//         in which a core stores 64 bytes twice; 64 columns of 8 bits in about 17.
// Safety: an index outside the rows and a code outside its table end the call with the status, and what was written by
//         then is of no use; nothing outside the tensors is read.
// Source: torch.nn.Embedding for the lookup; Han et al., Deep Compression (2016), section 3, for shared weights.
//
// Single-threaded, and a number does not depend on how the caller splits the indices. No pointer needs to be aligned.
#pragma once

#include <cstdint>

#include "kernels/common/codes.h"
#include "kernels/common/export.h"
#include "kernels/common/float_dtype.h"

namespace tersetorch {

enum class CodebookEmbeddingStatus : int { kOk, kBadIndex, kBadCode };

struct CodebookIndices {
  const void* data;
  bool wide;  // int64, not int32

  std::int64_t At(std::int64_t i) const {
    std::int64_t index = 0;
    std::int32_t narrow;
    if (wide) {
      __builtin_memcpy(&index, static_cast<const char*>(data) + 8 * i, sizeof index);
      return index;
    }
    __builtin_memcpy(&narrow, static_cast<const char*>(data) + 4 * i, sizeof narrow);
    return narrow;
  }
};

struct CodebookEmbeddingArgs {
  CodebookWeight weight;
  CodebookIndices indices;
  void* y;  // [indices, columns]
  FloatDtype y_stored_as;
};

struct CodebookEmbeddingReduceArgs {
  CodebookWeight weight;  // its codebook is not read
  CodebookIndices indices;
  std::int64_t padding;  // an index, or one that is none
  const float* grad;     // [indices, columns]
  double* sums;          // [tables, entries]
};

// Indices [begin, end).
TERSETORCH_API CodebookEmbeddingStatus CodebookEmbedding(const CodebookEmbeddingArgs& args, std::int64_t begin,
                                                         std::int64_t end) noexcept;

// Of indices [begin, end) those in [row_begin, row_end).
TERSETORCH_API CodebookEmbeddingStatus CodebookEmbeddingReduce(const CodebookEmbeddingReduceArgs& args,
                                                               std::int64_t begin, std::int64_t end,
                                                               std::int64_t row_begin, std::int64_t row_end) noexcept;

// The variants, hidden in the library; the kernel tests link them directly.
using CodebookLookup = CodebookEmbeddingStatus (*)(const CodebookEmbeddingArgs&, std::int64_t, std::int64_t) noexcept;
extern const CodebookLookup kCodebookEmbeddingScalar;
extern const CodebookLookup kCodebookEmbeddingAvx2;
extern const CodebookLookup kCodebookEmbeddingAvx512;

}  // namespace tersetorch
