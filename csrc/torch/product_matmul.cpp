// tersetorch::product_matmul and the decoding of its weight: checks, allocates, splits the work, calls the kernels.
#include "kernels/product_matmul/product_matmul.h"

#include <torch/csrc/stable/library.h>

#include <atomic>
#include <limits>
#include <optional>
#include <string>

#include "kernels/panels/panels.h"
#include "kernels/product_matmul/product_matmul_cuda.h"
#include "torch/common.h"
#include "torch/cuda.h"
#include "torch/samples.h"

namespace tersetorch {
namespace {

// ---- checks

// A weight whose tensors live as long as this.
struct Weight {
  Weight(const char* op, Place place, const Tensor& packed, const Tensor& books, std::int64_t out_features,
         std::int64_t columns) {
    CheckOn(place, op, packed, "codes");
    CheckOn(place, op, books, "codebooks");
    STD_TORCH_CHECK(packed.scalar_type() == ScalarType::Byte, op, ": codes must be uint8, got ",
                    torch::headeronly::toString(packed.scalar_type()), "; pack the weight again");
    STD_TORCH_CHECK(books.scalar_type() == ScalarType::Float && books.dim() == 4, op,
                    ": codebooks must be float32 [stages, segments, width, entries], got ",
                    torch::headeronly::toString(books.scalar_type()), " and ", books.dim(), "-D; convert it");
    STD_TORCH_CHECK(books.size(0) >= 1 && books.size(1) >= 1 && books.size(2) >= 1 && books.size(3) >= 1 &&
                        books.size(3) <= kProductMany,
                    op, ": codebooks must have at least 1 of each and at most ", kProductMany, " entries, got [",
                    books.size(0), ", ", books.size(1), ", ", books.size(2), ", ", books.size(3),
                    "]; pass those of a ProductWeight");
    STD_TORCH_CHECK(out_features >= 0 && columns >= 0, op, ": out_features and in_features must be at least 0, got ",
                    out_features, " and ", columns, "; pass the sizes of W");
    args.stages = books.size(0);
    args.books = books.size(1);
    args.width = books.size(2);
    args.entries = books.size(3);
    args.segments = (columns + args.width - 1) / args.width;
    args.rows = out_features;
    args.columns = columns;
    STD_TORCH_CHECK(args.books == 1 || args.books == args.segments, op, ": codebooks must be of 1 segment or of the ",
                    args.segments, " that ", columns, " features have at width ", args.width, ", got ", args.books,
                    "; pass x with as many features as W has columns");
    const std::int64_t bytes = ProductTiles(args) * ProductTileBytes(args);
    STD_TORCH_CHECK(packed.numel() == bytes, op, ": codes must be ", bytes, " bytes for ", out_features, " rows of ",
                    args.stages * args.segments, " codes, got ", packed.numel(), "; pack the weight again");
    codes = Usable(place, packed, 16);
    codebooks = Usable(place, books);
    args.codes = codes.const_data_ptr<std::uint8_t>();
    args.codebooks = codebooks.const_data_ptr<float>();
  }

  // Vector operations of one tile with so many lanes, about.
  std::int64_t Work(std::int64_t lanes) const {
    return ProductTables(args) * (lanes == 1 ? 8 : kProductRows * lanes / 8);
  }

  Tensor codes, codebooks;
  ProductWeight args{};
};

struct MatmulInputs {
  MatmulInputs(const char* op, Place place, const Tensor& x, const Tensor& codes, const Tensor& codebooks,
               const std::optional<Tensor>& bias, std::int64_t out_features, const std::string& mode)
      : samples(op, x, "x", place),
        weight(op, place, codes, codebooks, out_features, samples.features),
        bias(op, bias, out_features, place),
        quantized(mode == "int8") {
    STD_TORCH_CHECK(quantized || mode == "exact", op, ": mode must be \"exact\" or \"int8\", got \"", mode,
                    "\"; pass one of these");
  }

  Samples samples;
  Weight weight;
  Bias bias;
  bool quantized;
};

// Raises where a code names no entry.
void CheckCodes(const char* op, const ProductWeight& w) {
  if (w.entries == ProductTableEntries(w)) return;
  std::atomic<bool> fit{true};
  ParallelRanges(1, ProductTiles(w), GrainItems(ProductTileBytes(w) / 32),
                 [&](std::int64_t, std::int64_t begin, std::int64_t end) {
                   if (!ProductCodesFit(w, begin, end)) fit.store(false, std::memory_order_relaxed);
                 });
  STD_TORCH_CHECK(fit.load(), op, ": codes must lie in [0, ", w.entries,
                  "), got one outside; pass the codebooks that the codes were made with");
}

// ---- products

// Samples of one panel.
std::int64_t LanesFor(const ProductWeight& w, std::int64_t samples) {
  // Measured: in 4 bits one sample's tables stay in registers, which 16 samples' loads hardly beat.
  constexpr std::int64_t kFewOfNarrow = 11;
  if (ProductIsNarrow(w)) return samples <= kFewOfNarrow ? 1 : kProductMaxLanes;
  return samples <= 2 ? 1 : 8;
}

// Whether a batch is multiplied by the decoded weight: a dense product costs more with each column that a code stands
// for, a lookup does not. By cycles for each weight, as measured on AVX-512; tables cost little beside them.
bool Decodes(const ProductWeight& w, std::int64_t samples) {
  const double lookup = ProductIsNarrow(w) ? 1.2 / 16 : 2.5 / 8, decoding = 3.0, product = 1.0 / 28;
  return samples > 16 && samples * lookup > (decoding + samples * product) * static_cast<double>(w.width);
}

// Tables of samples [first, first + count) in so many lanes.
void MakeTables(const Samples& samples, const ProductWeight& w, std::int64_t first, std::int64_t count,
                std::int64_t lanes, float* panel, float* tables) {
  const float* source = panel;
  if (lanes == 1 && samples.stored_as == FloatDtype::kFloat32) {
    source = static_cast<const float*>(samples.At(first));
  } else {
    ParallelRanges(1, w.columns, GrainItems(lanes / 4), [&](std::int64_t, std::int64_t begin, std::int64_t end) {
      PackPanel({samples.At(first), samples.stored_as, count, w.columns, panel, lanes}, begin, end);
    });
  }
  ParallelRanges(1, ProductTables(w), GrainItems(w.width * w.entries * lanes / 16),
                 [&](std::int64_t, std::int64_t begin, std::int64_t end) {
                   ProductMakeTables({w, source, lanes, tables}, begin, end);
                 });
}

void MultiplyByTables(const MatmulInputs& inputs, bool relu, char* y) {
  const Samples& samples = inputs.samples;
  const ProductWeight& w = inputs.weight.args;
  const std::int64_t lanes = LanesFor(w, samples.count);
  Scratch panel(4 * w.columns * lanes), tables(4 * ProductTables(w) * ProductTableEntries(w) * lanes),
      sums(4 * ProductTiles(w) * kProductRows * lanes);
  for (std::int64_t first = 0; first < samples.count; first += lanes) {
    const std::int64_t count = std::min(lanes, samples.count - first);
    MakeTables(samples, w, first, count, lanes, panel.Data<float>(), tables.Data<float>());
    const ProductMatmulArgs args{w,
                                 tables.Data<float>(),
                                 lanes,
                                 sums.Data<float>(),
                                 inputs.bias.data,
                                 relu,
                                 y + first * w.rows * samples.item_bytes,
                                 samples.stored_as,
                                 count};
    ParallelRanges(1, ProductTiles(w), GrainItems(inputs.weight.Work(lanes)),
                   [&](std::int64_t, std::int64_t begin, std::int64_t end) { ProductMatmul(args, begin, end); });
  }
}

void MultiplyInt8(const MatmulInputs& inputs, bool relu, char* y) {
  const Samples& samples = inputs.samples;
  const ProductWeight& w = inputs.weight.args;
  const std::int64_t tables = ProductTables(w), numbers = tables * ProductTableEntries(w);
  Scratch panel(4 * w.columns), floats(4 * numbers), bytes(numbers), measures(8 * tables),
      sums(4 * ProductTiles(w) * kProductRows);
  float* lows = measures.Data<float>();
  ProductQuantizeArgs quantize{w, floats.Data<float>(), lows, lows + tables, {}, bytes.Data<std::uint8_t>()};
  for (std::int64_t n = 0; n < samples.count; ++n) {
    MakeTables(samples, w, n, 1, 1, panel.Data<float>(), floats.Data<float>());
    // Whole groups, whose tables lie among each other.
    const std::int64_t unit = ProductIsNarrow(w) ? kProductGroup : 1;
    const std::int64_t grain = GrainItems(unit * ProductTableEntries(w) / 4);
    ParallelRanges(1, tables / unit, grain, [&](std::int64_t, std::int64_t begin, std::int64_t end) {
      ProductMeasureTables(quantize, begin * unit, end * unit);
    });
    quantize.scale = ProductScaleOf(quantize);
    ParallelRanges(1, tables / unit, grain, [&](std::int64_t, std::int64_t begin, std::int64_t end) {
      ProductQuantizeTables(quantize, begin * unit, end * unit);
    });
    const ProductInt8Args args{w,
                               quantize.quantized,
                               quantize.scale,
                               sums.Data<std::uint32_t>(),
                               inputs.bias.data,
                               relu,
                               y + n * w.rows * samples.item_bytes,
                               samples.stored_as};
    ParallelRanges(1, ProductTiles(w), GrainItems(tables),
                   [&](std::int64_t, std::int64_t begin, std::int64_t end) { ProductMatmulInt8(args, begin, end); });
  }
}

// Decodes some rows at a time, few enough to come back from the caches, and leaves the product to torch.
void MultiplyDecoded(const MatmulInputs& inputs, const Tensor& x, bool relu, char* y) {
  constexpr std::int64_t kBytes = 8 * 1024 * 1024;
  const Samples& samples = inputs.samples;
  const ProductWeight& w = inputs.weight.args;
  const std::int64_t tile_bytes = std::max<std::int64_t>(1, 4 * kProductRows * w.columns);
  const std::int64_t step = std::max<std::int64_t>(1, kBytes / tile_bytes);
  const Tensor flat = torch::stable::reshape(samples.tensor, {samples.count, w.columns});
  const Tensor wide = samples.stored_as == FloatDtype::kFloat32 ? flat : torch::stable::to(flat, ScalarType::Float);
  for (std::int64_t tile = 0; tile < ProductTiles(w); tile += step) {
    const std::int64_t end_tile = std::min(tile + step, ProductTiles(w));
    const std::int64_t first_row = tile * kProductRows, count = std::min(end_tile * kProductRows, w.rows) - first_row;
    const Tensor dense = torch::stable::new_empty(x, {count, w.columns}, ScalarType::Float);
    float* data = dense.mutable_data_ptr<float>();
    ParallelRanges(1, end_tile - tile, 1, [&](std::int64_t, std::int64_t begin, std::int64_t end) {
      ProductDecode({w, data + begin * kProductRows * w.columns}, tile + begin, tile + end);
    });
    const Tensor products = torch::stable::matmul(wide, torch::stable::transpose(dense, 0, 1));
    const ProductFinishArgs args{
        products.const_data_ptr<float>(), count, inputs.bias.data, relu, y, samples.stored_as, w.rows, first_row};
    ParallelRanges(1, samples.count, GrainItems(count / 4),
                   [&](std::int64_t, std::int64_t begin, std::int64_t end) { ProductFinish(args, begin, end); });
  }
}

Tensor ProductMatmulOnCpu(const Tensor& x, const Tensor& codes, const Tensor& codebooks,
                          const std::optional<Tensor>& bias, std::int64_t out_features, std::string mode, bool relu) {
  constexpr const char* kOp = "product_matmul";
  const MatmulInputs inputs(kOp, kCpu, x, codes, codebooks, bias, out_features, mode);
  const ProductWeight& w = inputs.weight.args;
  CheckCodes(kOp, w);
  const Tensor y = EmptyWithLastDim(x, out_features);
  char* data = static_cast<char*>(y.mutable_data_ptr());
  if (inputs.samples.count == 0 || out_features == 0) return y;
  if (inputs.quantized) {
    MultiplyInt8(inputs, relu, data);
  } else if (Decodes(w, inputs.samples.count)) {
    MultiplyDecoded(inputs, x, relu, data);
  } else {
    MultiplyByTables(inputs, relu, data);
  }
  return y;
}

Tensor ProductDecodeOnCpu(const Tensor& codes, const Tensor& codebooks, std::int64_t out_features,
                          std::int64_t in_features) {
  constexpr const char* kOp = "product_decode";
  const Weight weight(kOp, kCpu, codes, codebooks, out_features, in_features);
  CheckCodes(kOp, weight.args);
  const Tensor dense = torch::stable::new_empty(codebooks, {out_features, in_features}, ScalarType::Float);
  float* data = dense.mutable_data_ptr<float>();
  ParallelRanges(1, ProductTiles(weight.args), GrainItems(kProductRows * in_features),
                 [&](std::int64_t, std::int64_t begin, std::int64_t end) {
                   ProductDecode({weight.args, data + begin * kProductRows * in_features}, begin, end);
                 });
  return dense;
}

#ifdef TERSETORCH_CUDA

Tensor ProductMatmulOnCuda(const Tensor& x, const Tensor& codes, const Tensor& codebooks,
                           const std::optional<Tensor>& bias, std::int64_t out_features, std::string mode, bool relu) {
  constexpr const char* kOp = "product_matmul";
  constexpr std::int64_t kWave = 64;  // samples whose parts are in memory
  const CudaCall call(kOp, x, "x");
  const MatmulInputs inputs(kOp, call.place(), x, codes, codebooks, bias, out_features, mode);
  const Samples& samples = inputs.samples;
  const ProductWeight& w = inputs.weight.args;
  const std::int64_t tables = w.stages * w.segments;
  STD_TORCH_CHECK(tables <= std::numeric_limits<std::int32_t>::max(), kOp,
                  ": a row must have fewer than 2^31 codes, got ", tables, "; split the weight");
  constexpr std::int64_t kMostNumbers = std::numeric_limits<std::int32_t>::max() / kProductMany;
  STD_TORCH_CHECK(w.width <= kMostNumbers, kOp, ": a code must stand for at most ", kMostNumbers,
                  " columns on a GPU, got ", w.width, "; share shorter parts");
  const Tensor y = EmptyWithLastDim(x, out_features);
  const bool half = samples.stored_as == FloatDtype::kFloat16;
  const Tensor numbers = half ? torch::stable::to(samples.tensor, ScalarType::Float) : samples.tensor;
  const std::int64_t x_bytes = w.columns * (half ? 4 : samples.item_bytes);
  const auto scratch = [&](std::int64_t bytes) {
    return torch::stable::new_empty(x, {(bytes + 3) / 4}, ScalarType::Float);
  };
  for (std::int64_t first = 0; first < samples.count; first += kWave) {
    const std::int64_t count = std::min(kWave, samples.count - first);
    const ProductCudaPlan plan = ProductPlanCuda(w, count, inputs.quantized);
    const Tensor parts = scratch(ProductPartsBytes(w, plan, count, inputs.quantized));
    ProductMatmulCudaArgs args{};
    args.weight = w;
    args.x = static_cast<const char*>(numbers.const_data_ptr()) + first * x_bytes;
    args.stored_as = samples.stored_as;
    args.plan = plan;
    args.parts = parts.mutable_data_ptr();
    args.bias = inputs.bias.data;
    args.relu = relu;
    args.y = static_cast<char*>(y.mutable_data_ptr()) + first * out_features * samples.item_bytes;
    args.samples = count;
    Tensor measures, scales;
    if (inputs.quantized) {
      measures = scratch(8 * count * tables);
      scales = scratch(count * static_cast<std::int64_t>(sizeof(ProductScale)));
      args.lows = measures.mutable_data_ptr<float>();
      args.ranges = args.lows + count * tables;
      args.scales = static_cast<ProductScale*>(scales.mutable_data_ptr());
    }
    call.Check(ProductMatmulCuda(args, call.Stream()));
  }
  return y;
}

Tensor ProductDecodeOnCuda(const Tensor& codes, const Tensor& codebooks, std::int64_t out_features,
                           std::int64_t in_features) {
  constexpr const char* kOp = "product_decode";
  const CudaCall call(kOp, codes, "codes");
  const Weight weight(kOp, call.place(), codes, codebooks, out_features, in_features);
  const Tensor dense = torch::stable::new_empty(codebooks, {out_features, in_features}, ScalarType::Float);
  call.Check(ProductDecodeCuda({weight.args, dense.mutable_data_ptr<float>()}, call.Stream()));
  return dense;
}

#endif

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tersetorch, CPU, m) {
  m.impl("product_matmul", TORCH_BOX(&ProductMatmulOnCpu));
  m.impl("product_matmul_inference", TORCH_BOX(&ProductMatmulOnCpu));
  m.impl("product_decode", TORCH_BOX(&ProductDecodeOnCpu));
}

STABLE_TORCH_LIBRARY_IMPL(tersetorch, CUDA, m) {
#ifdef TERSETORCH_CUDA
  m.impl("product_matmul", TORCH_BOX(&ProductMatmulOnCuda));
  m.impl("product_matmul_inference", TORCH_BOX(&ProductMatmulOnCuda));
  m.impl("product_decode", TORCH_BOX(&ProductDecodeOnCuda));
#else
  for (const char* op : {"product_matmul", "product_matmul_inference", "product_decode"}) m.impl(op, &NotBuiltForCuda);
#endif
}

}  // namespace tersetorch
