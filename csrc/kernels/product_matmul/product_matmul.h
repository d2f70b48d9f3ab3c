// y = relu?(x * W^T + bias) for a weight W made of shared sub-vectors: the products of each segment of x with each
// entry are computed once, and a row adds up those that its codes name.
//
// Math:   W[r][s * width + j] = sum over stages t of codebooks[t][s][j][code(r, t * segments + s)]. With tables
//         P[i][k] = sum_j x[s * width + j] * codebooks[t][s][j][k] for i = t * segments + s,
//         y[n][r] = sum_i P_n[i][code(r, i)] + bias[r], at least 0 with relu. Sums are float32.
//         int8: of a sample's tables, low_i = min_k P[i][k] and scale = (the largest max_k P[i][k] - low_i) / 255;
//         y = sum_i low_i + scale * sum_i q[i][code], q = round((P[i][k] - low_i) / scale), ties to even, in [0, 255].
//         A y lies at most tables * scale / 2 off, plus rounding; a sample with a P that is not finite gives NaN.
// Layout: codes packed in tiles of 64 rows, what is past the rows and the tables 0. Up to 16 entries, 4 bits each:
//         little-endian words [tiles][groups][64], nibble j of a row's word (lowest first) is table 8 * group + j.
//         More entries, a byte each: [tiles][tables][64]. codebooks float32 [stages][books][width][entries], books 1
//         (shared) or segments; columns <= segments * width, what is past them is not read. x and y row-major
//         [samples, features]. Tables float32 [tables][table entries][lanes], lanes 1, 8 or 16 samples, table entries
//         16 or 256, those past the weight's not written; in 4 bits there are as many tables as the groups hold, those
//         past the weight's all 0.
// Limits: a sample costs entries * columns multiply-adds for its tables and rows * tables additions; 16 samples cost
//         one load and one addition of a vector for each row and table, at best one a cycle. One sample's lookups of
//         8-bit codes are gathers of 16 rows: 4096x9216 at width 8, 4.7 million of them and the tables, 2.4 MFMA, take
//         1.10 ms at 3.07 GHz, 0.72 cycles each, where Intel's two loads a cycle would allow 0.5.
// Safety: a table has room for every code that its bits can say; CheckProductCodes finds codes past the entries.
// Source: Gong et al., Compressing deep convolutional networks using vector quantization (2014), section 3.3; Andre,
//         Kermarrec, Le Scouarnec, Cache locality is not enough (2015), for tables in registers.
//
// All functions are single-threaded, and a number does not depend on how the caller splits the work. Integer sums, and
// what they are made from, have the same bits at every level. No pointer needs to be aligned.
#pragma once

#include <cstdint>

#include "kernels/common/export.h"
#include "kernels/common/float_dtype.h"

namespace tersetorch {

inline constexpr std::int64_t kProductRows = 64;   // of a tile
inline constexpr std::int64_t kProductGroup = 8;   // tables of a 4-bit word
inline constexpr std::int64_t kProductFew = 16;    // entries that 4 bits can name
inline constexpr std::int64_t kProductMany = 256;  // and 8
inline constexpr std::int64_t kProductMaxLanes = 16;

struct ProductWeight {
  const std::uint8_t* codes;  // packed, see Layout
  const float* codebooks;     // [stages, books, width, entries]
  std::int64_t stages, books, segments, width, entries;
  std::int64_t rows, columns;
};

static inline bool ProductIsNarrow(const ProductWeight& w) { return w.entries <= kProductFew; }
static inline std::int64_t ProductTiles(const ProductWeight& w) { return (w.rows + kProductRows - 1) / kProductRows; }
static inline std::int64_t ProductTableEntries(const ProductWeight& w) {
  return ProductIsNarrow(w) ? kProductFew : kProductMany;
}
// The tables in memory: whole groups in 4 bits.
static inline std::int64_t ProductTables(const ProductWeight& w) {
  const std::int64_t tables = w.stages * w.segments;
  return ProductIsNarrow(w) ? (tables + kProductGroup - 1) / kProductGroup * kProductGroup : tables;
}
static inline std::int64_t ProductTileBytes(const ProductWeight& w) {
  return ProductTables(w) * kProductRows / (ProductIsNarrow(w) ? 2 : 1);
}

struct ProductTablesArgs {
  ProductWeight weight;  // its codes are not read
  const float* panel;    // of x, [columns, lanes], as panels.h has it
  std::int64_t lanes;    // 1, 8 or 16
  float* tables;         // [tables, table entries, lanes]
};

// Tables [table_begin, table_end) of those in memory.
TERSETORCH_API void ProductMakeTables(const ProductTablesArgs& args, std::int64_t table_begin,
                                      std::int64_t table_end) noexcept;

struct ProductMatmulArgs {
  ProductWeight weight;  // its codebooks are not read
  const float* tables;   // [tables, table entries, lanes]
  std::int64_t lanes;
  float* sums;        // [tiles, 64, lanes], scratch; each call uses its own tiles' part
  const float* bias;  // [rows] or null
  bool relu;
  void* y;  // [samples, rows]
  FloatDtype y_stored_as;
  std::int64_t samples;  // <= lanes
};

// The rows of tiles [tile_begin, tile_end).
TERSETORCH_API void ProductMatmul(const ProductMatmulArgs& args, std::int64_t tile_begin,
                                  std::int64_t tile_end) noexcept;

// How a sample's tables are rounded.
struct ProductScale {
  float low;      // the sum of the tables' least numbers
  float scale;    // of a step
  float inverse;  // steps to 1; 0 where scale is 0 or NaN
};

struct ProductQuantizeArgs {
  ProductWeight weight;  // only sizes are read
  const float* tables;   // of one sample
  float *lows, *ranges;  // [tables]: the least number of a table, and how far the largest lies above it
  ProductScale scale;
  // 4 bits: [groups][2][4][16], tables 0 2 4 6 and 1 3 5 7 of a group; 8 bits: [tables][256].
  std::uint8_t* quantized;
};

// lows and ranges of tables [table_begin, table_end); both NaN for a table with a number that is not finite.
TERSETORCH_API void ProductMeasureTables(const ProductQuantizeArgs& args, std::int64_t table_begin,
                                         std::int64_t table_end) noexcept;
// From all lows and ranges.
TERSETORCH_API ProductScale ProductScaleOf(const ProductQuantizeArgs& args) noexcept;
// quantized of tables [table_begin, table_end), whole groups.
TERSETORCH_API void ProductQuantizeTables(const ProductQuantizeArgs& args, std::int64_t table_begin,
                                          std::int64_t table_end) noexcept;

struct ProductInt8Args {
  ProductWeight weight;  // its codebooks are not read
  const std::uint8_t* quantized;
  ProductScale scale;
  std::uint32_t* sums;  // [tiles, 64], scratch; each call uses its own tiles' part
  const float* bias;    // [rows] or null
  bool relu;
  void* y;  // [rows], of one sample
  FloatDtype y_stored_as;
};

// The rows of tiles [tile_begin, tile_end).
TERSETORCH_API void ProductMatmulInt8(const ProductInt8Args& args, std::int64_t tile_begin,
                                      std::int64_t tile_end) noexcept;

struct ProductDecodeArgs {
  ProductWeight weight;
  float* dense;  // [rows of the tiles, columns]
};

// The dense rows of tiles [tile_begin, tile_end), the first of them at dense.
TERSETORCH_API void ProductDecode(const ProductDecodeArgs& args, std::int64_t tile_begin,
                                  std::int64_t tile_end) noexcept;

// Whether all codes of tiles [tile_begin, tile_end) name entries.
TERSETORCH_API bool ProductCodesFit(const ProductWeight& weight, std::int64_t tile_begin,
                                    std::int64_t tile_end) noexcept;

struct ProductFinishArgs {
  const float* products;  // [samples, count]
  std::int64_t count;
  const float* bias;  // [rows] or null
  bool relu;
  void* y;  // [samples, rows]
  FloatDtype y_stored_as;
  std::int64_t rows, first_row;
};

// y of the rows first_row and the count - 1 after it, for samples [sample_begin, sample_end): products made elsewhere.
TERSETORCH_API void ProductFinish(const ProductFinishArgs& args, std::int64_t sample_begin,
                                  std::int64_t sample_end) noexcept;

// The variants, hidden in the library; the kernel tests link them directly.
struct ProductKernels {
  void (*make_tables)(const ProductTablesArgs&, std::int64_t, std::int64_t) noexcept;
  void (*matmul)(const ProductMatmulArgs&, std::int64_t, std::int64_t) noexcept;
  void (*measure_tables)(const ProductQuantizeArgs&, std::int64_t, std::int64_t) noexcept;
  void (*quantize_tables)(const ProductQuantizeArgs&, std::int64_t, std::int64_t) noexcept;
  void (*matmul_int8)(const ProductInt8Args&, std::int64_t, std::int64_t) noexcept;
  bool (*codes_fit)(const ProductWeight&, std::int64_t, std::int64_t) noexcept;
};
extern const ProductKernels kProductScalar;
extern const ProductKernels kProductAvx2;
extern const ProductKernels kProductAvx512;

}  // namespace tersetorch
