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

// Tables decoded at a time: their columns of a row are a few cache lines, which are written whole.
constexpr std::int64_t kDecodeTables = 16;

// The codes of a tile's rows for some tables, row after row.
void UnpackCodes(const ProductWeight& w, std::int64_t tile, std::int64_t table, std::int64_t count,
                 std::uint8_t (&codes)[kProductRows][kDecodeTables]) {
  const std::uint8_t* packed = w.codes + tile * ProductTileBytes(w);
  for (std::int64_t i = 0; i < count; ++i) {
    for (std::int64_t r = 0; r < kProductRows; ++r) {
      std::uint32_t code;
      if (ProductIsNarrow(w)) {
        code = At<std::uint32_t>(packed, (table + i) / kProductGroup * kProductRows + r);
        code = code >> 4 * ((table + i) % kProductGroup) & 15;
      } else {
        code = packed[(table + i) * kProductRows + r];
      }
      codes[r][i] = static_cast<std::uint8_t>(code < w.entries ? code : 0);  // CodesFit tells of others
    }
  }
}

// The numbers of an entry, one for each column; kWidth of them, or `width` for 0.
template <int kWidth, bool kAdd>
void PutEntry(const float* codebooks, std::int64_t entry, std::int64_t entries, std::int64_t width, float* out) {
  const std::int64_t count = kWidth == 0 ? width : kWidth;
  for (std::int64_t j = 0; j < count; ++j) {
    const float number = At<float>(codebooks, entry + j * entries);
    Put(out, j, kAdd ? At<float>(out, j) + number : number);
  }
}

// Some tables' part of a tile's rows: of one stage, the segments from `segment` on.
template <int kWidth, bool kAdd>
void DecodeBlock(const ProductWeight& w, std::int64_t tile, std::int64_t stage, std::int64_t segment,
                 std::int64_t count, float* rows) {
  std::uint8_t codes[kProductRows][kDecodeTables];
  UnpackCodes(w, tile, stage * w.segments + segment, count, codes);
  const std::int64_t left = w.rows - tile * kProductRows, book_size = w.width * w.entries;
  const std::int64_t first = w.books == 1 ? stage : stage * w.segments + segment, step = w.books == 1 ? 0 : book_size;
  // Only the last segment may be cut short.
  const std::int64_t whole = (segment + count) * w.width <= w.columns ? count : count - 1;
  for (std::int64_t r = 0; r < kProductRows && r < left; ++r) {
    float* out = rows + r * w.columns + segment * w.width;
    std::int64_t entry = first * book_size;
    for (std::int64_t i = 0; i < whole; ++i, entry += step, out += w.width) {
      PutEntry<kWidth, kAdd>(w.codebooks, entry + codes[r][i], w.entries, w.width, out);
    }
    if (whole == count) continue;
    PutEntry<0, kAdd>(w.codebooks, entry + codes[r][whole], w.entries, w.columns - (segment + whole) * w.width, out);
  }
}

using DecodeFunction = void (*)(const ProductWeight&, std::int64_t, std::int64_t, std::int64_t, std::int64_t, float*);

// Loops of usual widths are unrolled.
template <bool kAdd>
DecodeFunction DecodeOf(std::int64_t width) {
  return width == 2   ? DecodeBlock<2, kAdd>
         : width == 4 ? DecodeBlock<4, kAdd>
         : width == 8 ? DecodeBlock<8, kAdd>
                      : DecodeBlock<0, kAdd>;
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
    float* rows = args.dense + (tile - tile_begin) * kProductRows * w.columns;
    for (std::int64_t stage = 0; stage < w.stages; ++stage) {
      const DecodeFunction decode = stage == 0 ? DecodeOf<false>(w.width) : DecodeOf<true>(w.width);
      for (std::int64_t segment = 0; segment < w.segments; segment += kDecodeTables) {
        const std::int64_t left = w.segments - segment;
        decode(w, tile, stage, segment, left < kDecodeTables ? left : kDecodeTables, rows);
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
