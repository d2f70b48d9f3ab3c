#include "kernels/product_matmul/product_matmul.h"

#include "kernels/common/cpu_isa.h"
#include "kernels/common/scalars.h"

namespace tersetorch {
namespace {

const ProductKernels& Active() {
  switch (ProcessCpuIsa().active) {
    case CpuIsa::kAvx512Bf16:
    case CpuIsa::kAvx512:
      return kProductAvx512;
    case CpuIsa::kAvx2:
      return kProductAvx2;
    case CpuIsa::kScalar:
      break;
  }
  return kProductScalar;
}

// The codes of `count` rows of a tile for a table, one after the other.
void UnpackCodes(const ProductWeight& w, std::int64_t tile, std::int64_t table, std::uint8_t (&codes)[kProductRows]) {
  const std::uint8_t* packed = w.codes + tile * ProductTileBytes(w);
  if (!ProductIsNarrow(w)) {
    __builtin_memcpy(codes, packed + table * kProductRows, kProductRows);
    return;
  }
  for (std::int64_t r = 0; r < kProductRows; ++r) {
    const auto word = At<std::uint32_t>(packed, table / kProductGroup * kProductRows + r);
    codes[r] = static_cast<std::uint8_t>(word >> 4 * (table % kProductGroup) & 15);
  }
}

}  // namespace

void ProductMakeTables(const ProductTablesArgs& args, std::int64_t table_begin, std::int64_t table_end) noexcept {
  Active().make_tables(args, table_begin, table_end);
}

void ProductMatmul(const ProductMatmulArgs& args, std::int64_t tile_begin, std::int64_t tile_end) noexcept {
  Active().matmul(args, tile_begin, tile_end);
}

void ProductMeasureTables(const ProductQuantizeArgs& args, std::int64_t table_begin, std::int64_t table_end) noexcept {
  Active().measure_tables(args, table_begin, table_end);
}

ProductScale ProductScaleOf(const ProductQuantizeArgs& args) noexcept {
  float low = 0, range = 0;
  bool finite = true;
  for (std::int64_t i = 0; i < ProductTables(args.weight); ++i) {
    const float of_table = At<float>(args.ranges, i);
    low += At<float>(args.lows, i);
    range = of_table > range ? of_table : range;
    finite = finite && of_table <= 3.4028234e38f;
  }
  if (!finite) return {__builtin_nanf(""), __builtin_nanf(""), 0};
  // Steps that small would overflow their inverse.
  return range < 0x1p-100f ? ProductScale{low, 0, 0} : ProductScale{low, range / 255, 255 / range};
}

void ProductQuantizeTables(const ProductQuantizeArgs& args, std::int64_t table_begin, std::int64_t table_end) noexcept {
  Active().quantize_tables(args, table_begin, table_end);
}

void ProductMatmulInt8(const ProductInt8Args& args, std::int64_t tile_begin, std::int64_t tile_end) noexcept {
  Active().matmul_int8(args, tile_begin, tile_end);
}

void ProductDecode(const ProductDecodeArgs& args, std::int64_t tile_begin, std::int64_t tile_end) noexcept {
  const ProductWeight& w = args.weight;
  for (std::int64_t tile = tile_begin; tile < tile_end; ++tile) {
    const std::int64_t first_row = tile * kProductRows;
    const std::int64_t count = w.rows - first_row < kProductRows ? w.rows - first_row : kProductRows;
    float* rows = args.dense + (first_row - tile_begin * kProductRows) * w.columns;
    for (std::int64_t i = 0; i < w.stages * w.segments; ++i) {
      std::uint8_t codes[kProductRows];
      UnpackCodes(w, tile, i, codes);
      const std::int64_t stage = i / w.segments, segment = i % w.segments, first = segment * w.width;
      const std::int64_t width = w.columns - first < w.width ? w.columns - first : w.width;
      const std::int64_t book = (stage * w.books + (w.books == 1 ? 0 : segment)) * w.width * w.entries;
      for (std::int64_t r = 0; r < count; ++r) {
        const std::int64_t code = codes[r] < w.entries ? codes[r] : 0;  // CodesFit tells of others
        float* out = rows + r * w.columns + first;
        for (std::int64_t j = 0; j < width; ++j) {
          const float entry = At<float>(w.codebooks, book + j * w.entries + code);
          Put(out, j, stage == 0 ? entry : At<float>(out, j) + entry);
        }
      }
    }
  }
}

bool ProductCodesFit(const ProductWeight& weight, std::int64_t tile_begin, std::int64_t tile_end) noexcept {
  if (weight.entries == ProductTableEntries(weight)) return true;
  return Active().codes_fit(weight, tile_begin, tile_end);
}

void ProductFinish(const ProductFinishArgs& a, std::int64_t sample_begin, std::int64_t sample_end) noexcept {
  for (std::int64_t n = sample_begin; n < sample_end; ++n) {
    for (std::int64_t i = 0; i < a.count; ++i) {
      float sum = At<float>(a.products, n * a.count + i);
      if (a.bias != nullptr) sum += At<float>(a.bias, a.first_row + i);
      Store(a.y, a.y_stored_as, n * a.rows + a.first_row + i, a.relu && sum < 0 ? 0.0f : sum);
    }
  }
}

}  // namespace tersetorch
