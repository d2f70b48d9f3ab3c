#include "kernels/common/scalars.h"
#include "kernels/product_matmul/product_matmul.h"

namespace tersetorch {
namespace {

std::uint8_t CodeAt(const ProductWeight& w, std::int64_t row, std::int64_t table) {
  const std::uint8_t* tile = w.codes + row / kProductRows * ProductTileBytes(w);
  const std::int64_t r = row % kProductRows;
  if (!ProductIsNarrow(w)) return tile[table * kProductRows + r];
  const auto word = At<std::uint32_t>(tile, table / kProductGroup * kProductRows + r);
  return static_cast<std::uint8_t>(word >> 4 * (table % kProductGroup) & 15);
}

void MakeTables(const ProductTablesArgs& a, std::int64_t table_begin, std::int64_t table_end) noexcept {
  const ProductWeight& w = a.weight;
  const std::int64_t entries = ProductTableEntries(w), tables = w.stages * w.segments;
  for (std::int64_t i = table_begin; i < table_end; ++i) {
    const std::int64_t segment = i % w.segments, book = w.books == 1 ? 0 : segment;
    const std::int64_t first = segment * w.width;
    for (std::int64_t k = 0; k < w.entries; ++k) {
      for (std::int64_t n = 0; n < a.lanes; ++n) {
        float product = 0;
        for (std::int64_t j = 0; i < tables && j < w.width && first + j < w.columns; ++j) {
          const std::int64_t at = ((i / w.segments * w.books + book) * w.width + j) * w.entries + k;
          // Rounded once, as the other levels round it.
          product = __builtin_fmaf(At<float>(a.panel, (first + j) * a.lanes + n), At<float>(w.codebooks, at), product);
        }
        Put(a.tables, (i * entries + k) * a.lanes + n, product);
      }
    }
  }
}

void Matmul(const ProductMatmulArgs& a, std::int64_t tile_begin, std::int64_t tile_end) noexcept {
  const ProductWeight& w = a.weight;
  const std::int64_t entries = ProductTableEntries(w), tables = ProductTables(w);
  for (std::int64_t r = tile_begin * kProductRows; r < tile_end * kProductRows && r < w.rows; ++r) {
    for (std::int64_t n = 0; n < a.samples; ++n) {
      float sum = 0;
      for (std::int64_t i = 0; i < tables; ++i) {
        sum += At<float>(a.tables, (i * entries + CodeAt(w, r, i)) * a.lanes + n);
      }
      if (a.bias != nullptr) sum += At<float>(a.bias, r);
      Store(a.y, a.y_stored_as, n * w.rows + r, a.relu && sum < 0 ? 0.0f : sum);
    }
  }
}

void MeasureTables(const ProductQuantizeArgs& a, std::int64_t table_begin, std::int64_t table_end) noexcept {
  const ProductWeight& w = a.weight;
  for (std::int64_t i = table_begin; i < table_end; ++i) {
    float low = At<float>(a.tables, i * ProductTableEntries(w)), high = low, nothing = 0;
    for (std::int64_t k = 0; k < w.entries; ++k) {
      const float product = At<float>(a.tables, i * ProductTableEntries(w) + k);
      low = product < low ? product : low;
      high = product > high ? product : high;
      nothing += product - product;  // NaN for what is not finite
    }
    Put(a.lows, i, low + nothing);
    Put(a.ranges, i, high - low + nothing);
  }
}

// Where quantized has entry k of table i.
std::int64_t QuantizedAt(const ProductWeight& w, std::int64_t i, std::int64_t k) {
  if (!ProductIsNarrow(w)) return i * kProductMany + k;
  const std::int64_t j = i % kProductGroup;
  return ((i / kProductGroup * 2 + j % 2) * 4 + j / 2) * kProductFew + k;
}

void QuantizeTables(const ProductQuantizeArgs& a, std::int64_t table_begin, std::int64_t table_end) noexcept {
  const ProductWeight& w = a.weight;
  for (std::int64_t i = table_begin; i < table_end; ++i) {
    for (std::int64_t k = 0; k < ProductTableEntries(w); ++k) {
      float q = 0;
      if (k < w.entries && a.scale.inverse != 0) {
        const float above = At<float>(a.tables, i * ProductTableEntries(w) + k) - At<float>(a.lows, i);
        q = __builtin_rintf(above * a.scale.inverse);
      }
      a.quantized[QuantizedAt(w, i, k)] = static_cast<std::uint8_t>(q);
    }
  }
}

void MatmulInt8(const ProductInt8Args& a, std::int64_t tile_begin, std::int64_t tile_end) noexcept {
  const ProductWeight& w = a.weight;
  for (std::int64_t r = tile_begin * kProductRows; r < tile_end * kProductRows && r < w.rows; ++r) {
    std::uint32_t sum = 0;
    for (std::int64_t i = 0; i < ProductTables(w); ++i) sum += a.quantized[QuantizedAt(w, i, CodeAt(w, r, i))];
    float y = __builtin_fmaf(a.scale.scale, static_cast<float>(sum), a.scale.low);
    if (a.bias != nullptr) y += At<float>(a.bias, r);
    Store(a.y, a.y_stored_as, r, a.relu && y < 0 ? 0.0f : y);
  }
}

bool CodesFit(const ProductWeight& w, std::int64_t tile_begin, std::int64_t tile_end) noexcept {
  for (std::int64_t r = tile_begin * kProductRows; r < tile_end * kProductRows; ++r) {
    for (std::int64_t i = 0; i < ProductTables(w); ++i) {
      if (CodeAt(w, r, i) >= w.entries) return false;
    }
  }
  return true;
}

}  // namespace

const ProductKernels kProductScalar{MakeTables, Matmul, MeasureTables, QuantizeTables, MatmulInt8, CodesFit};

}  // namespace tersetorch
