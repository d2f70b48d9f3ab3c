// y = relu?(x * W^T + bias) for many samples and a sparse weight W cut into blocks, so that the part of x that a block
// reads stays in the first cache level while the block's rows pass over it.
//
// Math:   y[n][r] = sum_k w[k] * x[n][c(k)] + bias[r] over the non-zeros of row r, at least 0 with relu; w[k] is
//         values[k] or codebook[values[k]]. Everything is accumulated in float32.
//         Pairs: a value is two bfloat16 of consecutive columns, and x is rounded to bfloat16; their products are exact
//         in float32, so that the levels differ by the rounding of sums alone.
//         Quads: a value is four int8 of consecutive columns, x is q[n][c] * sample_scales[n] with int8 q, and
//         y[n][r] = fma(sum_k w[k] * q[n][c(k)] * lo, hi, bias[r]) with an exact integer sum, lo the smaller and hi the
//         larger of row_scales[r] and sample_scales[n], so that nothing overflows on the way to a number that float32
//         holds: the same bits at every level.
// Layout: W is cut into blocks of kBlockedRows rows and column_block columns, ordered by row block, then column block.
//         The non-zeros of block i are [block_offsets[i], block_offsets[i + 1]), row after row, rows with more
//         non-zeros first: equal trip counts follow each other and the processor foresees the end of the loop over a
//         row. One segment for each row of a block, also an empty one, in the same order: row in the block << 16 |
//         number of non-zeros. indices are columns counted from the block's first. x comes in panels (kernels/panels)
//         of 8, 16, 32 or 64 samples. For pairs and quads, everywhere above, a column is the 2 or 4 columns of a value,
//         and a value with any of them is a non-zero, filled with zeros. The layout depends on neither the level nor
//         the batch.
// Limits: with all 64 samples a value costs 64 multiply-adds (of one, two or four products) and reads 256 bytes of the
//         panel from the first cache level, 4 of its value and 2 of its index. AVX-512 on two load ports: 4 of them in
//         (4 + 1 + 1/4) / 2 cycles, 76 % of the FMA limit. A segment reads and writes its 256-byte row of sums, which
//         costs as much as 3 to 4 values; the stream of weights, 6 bytes a value, is asked for in advance, and the part
//         of it that the last cache level cannot hide is the rest.
// Safety: offsets, segments, indices and codes are compared with their bounds before they are used; the first block
//         that fails ends the call with the status, and what was written by then is of no use.
// Source: the panels follow Elsen et al., Fast Sparse ConvNets (2019), section 3; sorting rows by length is the row
//         swizzle of Gale et al., Sparse GPU Kernels for Deep Learning (2020), section 5.1.2, applied to each block.
//
// Single-threaded, and a number depends on neither the caller's split of the work nor the width of the panel. No
// pointer needs to be aligned.
#pragma once

#include <cstdint>

#include "kernels/common/export.h"
#include "kernels/common/float_dtype.h"

namespace tersetorch {

inline constexpr std::int64_t kBlockedRows = 256;
inline constexpr std::int64_t kBlockedMaxColumnBlock = 32768;
inline constexpr std::int64_t kBlockedMaxWidth = 64;
inline constexpr std::int64_t kBlockedMaxEntries = 256;

enum class BlockedValues : int { kFloat32, kBFloat16, kCodes, kBFloat16Pairs, kInt8Quads };
enum class BlockedStatus : int { kOk, kBadOffsets, kBadSegment, kBadIndex, kBadCode };

struct BlockedWeight {
  const std::int32_t* block_offsets;  // [row blocks * column blocks + 1]
  const std::int32_t* segments;       // [rows * column blocks]
  const std::uint16_t* indices;       // [nnz]
  const void* values;                 // [nnz], as stored_as says; codes are uint8, pairs and quads 4 bytes
  BlockedValues stored_as;
  const float* codebook;  // [entries], for codes only
  std::int64_t entries;
  std::int64_t rows, columns, nnz;
  std::int64_t column_block;  // 1 to kBlockedMaxColumnBlock
};

struct BlockedMatmulArgs {
  BlockedWeight weight;
  const void* panel;   // of x, [columns, width]: float32, a pair of bfloat16 or a quad of bytes
  std::int64_t width;  // 8, 16, 32 or 64
  const float* bias;   // [rows] or null
  bool relu;
  void* y;  // [samples, rows]
  FloatDtype y_stored_as;
  std::int64_t samples;                    // <= width
  float* sums;                             // [kBlockedRows, width], scratch
  const float* sample_scales = nullptr;    // [width], for quads only
  const float* row_scales = nullptr;       // [rows], for quads only
  const std::int32_t* row_sums = nullptr;  // [rows], of a row's int8 values, for quads only
};

// What the running level expects to be added to q in a panel of quads: its dot product may want unsigned bytes.
TERSETORCH_API std::int32_t BlockedQuadOffset() noexcept;

// y of one row block for one panel's samples.
TERSETORCH_API BlockedStatus BlockedMatmul(const BlockedMatmulArgs& args, std::int64_t row_block) noexcept;

struct BlockedPackArgs {
  const std::int32_t* row_offsets;  // of the weight in compressed sparse rows, [rows + 1], valid
  const std::int32_t* col_indices;  // [nnz], in [0, columns), in any order within a row
  std::int64_t rows, columns, column_block;
  std::int32_t* block_offsets;  // [row blocks * column blocks + 1]; written but for the last
  std::int32_t* segments;       // [rows * column blocks]
  std::uint16_t* indices;       // [nnz]
  std::int32_t* sources;        // [nnz]: the position in col_indices that each non-zero comes from
  std::int32_t* scratch;        // [(kBlockedRows + 1) * column blocks + column_block + 1]
};

// Lays out one row block of a weight in compressed sparse rows.
TERSETORCH_API void BlockedPack(const BlockedPackArgs& args, std::int64_t row_block) noexcept;

// The variants, hidden in the library; the kernel tests link them directly.
using BlockedMatmulFunction = BlockedStatus (*)(const BlockedMatmulArgs&, std::int64_t) noexcept;
extern const BlockedMatmulFunction kBlockedScalar;
extern const BlockedMatmulFunction kBlockedAvx2;
extern const BlockedMatmulFunction kBlockedAvx512;
extern const BlockedMatmulFunction kBlockedAvx512Bf16;
inline constexpr std::int32_t kBlockedUnsignedOffset = 128;  // of quads at the last two levels; 0 before

}  // namespace tersetorch
