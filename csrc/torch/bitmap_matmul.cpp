// tersetorch::bitmap_matmul and the packing of its weight: checks, allocates, splits the work, calls the kernels.
#include "kernels/bitmap_matmul/bitmap_matmul.h"

#include <torch/csrc/stable/library.h>

#include <atomic>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <tuple>

#include "kernels/bitmap_matmul/bitmap_matmul_cuda.h"
#include "kernels/bitmap_matmul/bitmap_rows_cuda.h"
#include "torch/common.h"
#include "torch/cuda.h"
#include "torch/samples.h"

namespace tersetorch {
namespace {

void CheckTensor(const char* op, const Tensor& t, const char* name, ScalarType dtype, std::int64_t dim,
                 Place place = kCpu) {
  CheckOn(place, op, t, name);
  STD_TORCH_CHECK(t.scalar_type() == dtype && t.dim() == dim, op, ": ", name, " must be ",
                  torch::headeronly::toString(dtype), " and ", dim, "-D, got ",
                  torch::headeronly::toString(t.scalar_type()), " and ", t.dim(), "-D; convert it");
}

// A weight whose tensors live as long as this.
struct Weight {
  Weight(const char* op, Place place, const Tensor& bits, const Tensor& offsets, const Tensor& stored,
         const std::optional<Tensor>& codes_of, const std::optional<Tensor>& scales_of, std::int64_t columns,
         const char* offsets_name = "row_offsets", const char* of_columns = " features") {
    CheckTensor(op, bits, "bitmap", ScalarType::Long, 2, place);
    CheckTensor(op, offsets, offsets_name, ScalarType::Int, 1, place);
    CheckOn(place, op, stored, "values");
    const std::int64_t rows = bits.size(0);
    STD_TORCH_CHECK(bits.size(1) == BitmapWords(columns), op, ": bitmap must be [", rows, ", ", BitmapWords(columns),
                    "] for ", columns, of_columns, ", got ", bits.size(1),
                    " words in a row; pass the weight that fits");
    STD_TORCH_CHECK(offsets.numel() == rows + 1, op, ": ", offsets_name, " must be [", rows + 1, "], got ",
                    offsets.numel(), "; pack the weight again");
    STD_TORCH_CHECK(stored.dim() == 1, op, ": values must be [nnz], got ", stored.dim(), "-D; flatten it");
    bitmap = Usable(place, bits);
    row_offsets = Usable(place, offsets);
    values = Usable(place, stored);
    args.bitmap = static_cast<const std::uint64_t*>(bitmap.const_data_ptr());
    args.row_offsets = row_offsets.const_data_ptr<std::int32_t>();
    args.values = values.const_data_ptr();
    args.rows = rows;
    args.columns = columns;
    args.nnz = stored.numel();
    const ScalarType dtype = stored.scalar_type();
    if (codes_of.has_value()) {
      STD_TORCH_CHECK(dtype == ScalarType::Byte, op, ": values must be uint8 codes beside a codebook, got ",
                      torch::headeronly::toString(dtype), "; pass codes, or no codebook");
      CheckCodebook(op, *codes_of, kBitmapMaxEntries, place);
      codebook = Usable(place, *codes_of);
      args.stored_as = BitmapValues::kCodes;
      args.codebook = codebook->const_data_ptr<float>();
      args.entries = codebook->numel();
      float zero = 0;
      if (place == kCpu && args.entries != 0) std::memcpy(&zero, args.codebook, sizeof zero);
      STD_TORCH_CHECK(zero == 0, op, ": codebook must begin with 0, the value of absent weights, got ", zero,
                      "; number the codes from 1");
    } else if (dtype == ScalarType::Char) {
      STD_TORCH_CHECK(scales_of.has_value(), op, ": scales must be given beside int8 values, got none; pass [", rows,
                      "]");
      CheckTensor(op, *scales_of, "scales", ScalarType::Float, 1, place);
      STD_TORCH_CHECK(scales_of->numel() == rows, op, ": scales must be [", rows, "], got ", scales_of->numel(),
                      "; pass one for each row");
      scales = Usable(place, *scales_of);
      args.stored_as = BitmapValues::kInt8;
      args.scales = scales->const_data_ptr<float>();
    } else {
      STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, op,
                      ": values must be float32, bfloat16, int8 beside scales, or uint8 codes beside a codebook, got ",
                      torch::headeronly::toString(dtype), "; convert it");
      args.stored_as = dtype == ScalarType::Float ? BitmapValues::kFloat32 : BitmapValues::kBFloat16;
    }
  }

  Tensor bitmap, row_offsets, values;
  std::optional<Tensor> codebook, scales;
  BitmapWeight args{};
};

// The arguments of each product, checked.
struct MatmulInputs {
  MatmulInputs(const char* op, Place place, const Tensor& x, const Tensor& bitmap, const Tensor& row_offsets,
               const Tensor& values, const std::optional<Tensor>& bias, const std::optional<Tensor>& codebook,
               const std::optional<Tensor>& scales, const std::string& mode)
      : samples(op, x, "x", place),
        weight(op, place, bitmap, row_offsets, values, codebook, scales, samples.features),
        quantized(mode == "int8"),
        bias(op, bias, weight.args.rows, place) {
    STD_TORCH_CHECK(quantized || mode == "exact", op, ": mode must be \"exact\" or \"int8\", got \"", mode,
                    "\"; choose one of them");
    STD_TORCH_CHECK(!quantized || weight.args.stored_as == BitmapValues::kInt8, op,
                    ": mode \"int8\" must come with int8 values and scales, got others; round the weight first");
    STD_TORCH_CHECK(!quantized || samples.features <= kBitmapMaxQuantizedColumns, op, ": x must have at most ",
                    kBitmapMaxQuantizedColumns, " features in mode \"int8\", got ", samples.features,
                    "; split the layer or use mode \"exact\"");
  }

  Samples samples;
  Weight weight;
  bool quantized;
  Bias bias;
};

struct ColumnsInputs {
  ColumnsInputs(const char* op, Place place, const Tensor& x, const Tensor& bitmap, const Tensor& column_offsets,
                const Tensor& values, const std::optional<Tensor>& bias, const std::optional<Tensor>& codebook,
                std::int64_t out_features)
      : samples(op, x, "x", place),
        weight(op, place, bitmap, column_offsets, values, codebook, std::nullopt,
               Checked(op, out_features, values, codebook), "column_offsets", " outputs"),
        bias(op, bias, out_features, place) {
    STD_TORCH_CHECK(weight.args.rows == samples.features, op, ": bitmap must be [", samples.features, ", ",
                    BitmapWords(out_features), "] for x's features, got ", weight.args.rows,
                    " columns; pass the weight that x's features fit");
  }

  // What must hold before the weight is looked at; returns out_features.
  static std::int64_t Checked(const char* op, std::int64_t out_features, const Tensor& values,
                              const std::optional<Tensor>& codebook) {
    STD_TORCH_CHECK(out_features >= 0, op, ": out_features must be at least 0, got ", out_features,
                    "; pass the rows of W");
    STD_TORCH_CHECK(codebook.has_value() || values.scalar_type() != ScalarType::Char, op,
                    ": values must be float32, bfloat16 or uint8 codes beside a codebook, got Char; use bitmap_matmul");
    return out_features;
  }

  Samples samples;
  Weight weight;
  Bias bias;
};

class SharedStatus {
 public:
  void Report(BitmapStatus status) {
    if (status != BitmapStatus::kOk) status_.store(status, std::memory_order_relaxed);
  }

  void Raise(const char* op, std::int64_t nnz, std::int64_t entries, const char* offsets_name = "row_offsets") const {
    switch (status_.load(std::memory_order_relaxed)) {
      case BitmapStatus::kOk:
        return;
      case BitmapStatus::kBadRowOffsets:
        STD_TORCH_CHECK(false, op, ": ", offsets_name, " must never fall and stay in [0, ", nnz,
                        "], got a row that breaks this; pack the weight again");
      case BitmapStatus::kBadBitmap:
        STD_TORCH_CHECK(false, op,
                        ": bitmap must have a bit for each value of its row and none past the last column, got a row "
                        "that breaks this; pack the weight again");
      case BitmapStatus::kBadCode:
        STD_TORCH_CHECK(false, op, ": codes must lie in [0, ", entries,
                        "), got one outside; pass the codebook that the codes were made with");
    }
  }

 private:
  std::atomic<BitmapStatus> status_{BitmapStatus::kOk};
};

Tensor BitmapMatmulOnCpu(const Tensor& x, const Tensor& bitmap, const Tensor& row_offsets, const Tensor& values,
                         const std::optional<Tensor>& bias, const std::optional<Tensor>& codebook,
                         const std::optional<Tensor>& scales, std::string mode, bool relu) {
  constexpr const char* kOp = "bitmap_matmul";
  const MatmulInputs inputs(kOp, kCpu, x, bitmap, row_offsets, values, bias, codebook, scales, mode);
  const Samples& samples = inputs.samples;
  const Weight& weight = inputs.weight;
  const bool quantized = inputs.quantized;
  const std::int64_t rows = weight.args.rows;
  const Tensor y = EmptyWithLastDim(x, rows);
  char* y_data = static_cast<char*>(y.mutable_data_ptr());

  const std::int64_t at_once = std::min(samples.count, kBitmapMaxSamples);
  Scratch panel(BitmapPanelBytes(samples.features, at_once));
  const std::int64_t grain = GrainItems(BitmapWords(samples.features) * 8 * at_once);
  SharedStatus status;
  for (std::int64_t first = 0; first < samples.count; first += kBitmapMaxSamples) {
    const std::int64_t count = std::min(kBitmapMaxSamples, samples.count - first);
    float x_scales[kBitmapMaxSamples];
    const bool plain =
        BitmapPackSamples({samples.At(first), samples.stored_as, count, samples.features, weight.args.stored_as,
                           weight.args.entries, quantized, panel.Data<char>(), x_scales});
    const BitmapMatmulArgs args{weight.args,
                                panel.Data<char>(),
                                count,
                                quantized,
                                plain,
                                x_scales,
                                inputs.bias.data,
                                relu,
                                y_data + first * rows * samples.item_bytes,
                                samples.stored_as};
    ParallelFor(rows, grain,
                [&](std::int64_t begin, std::int64_t end) { status.Report(BitmapMatmul(args, begin, end)); });
  }
  status.Raise(kOp, weight.args.nnz, weight.args.entries);
  return y;
}

Tensor BitmapColumnsMatmulOnCpu(const Tensor& x, const Tensor& bitmap, const Tensor& column_offsets,
                                const Tensor& values, const std::optional<Tensor>& bias,
                                const std::optional<Tensor>& codebook, std::int64_t out_features, bool relu) {
  constexpr const char* kOp = "bitmap_columns_matmul";
  const ColumnsInputs inputs(kOp, kCpu, x, bitmap, column_offsets, values, bias, codebook, out_features);
  const Samples& samples = inputs.samples;
  const Weight& weight = inputs.weight;
  const std::int64_t features = samples.features, words = BitmapWords(out_features);
  const Tensor y = EmptyWithLastDim(x, out_features);
  char* y_data = static_cast<char*>(y.mutable_data_ptr());

  const std::int64_t lists = (features * 8 + 63) / 64 * 64;
  Scratch memory(lists + words * 64 * 4);
  char* data = memory.Data<char>();
  auto* active = reinterpret_cast<std::int32_t*>(data);
  auto* active_values = reinterpret_cast<float*>(data + features * 4);
  auto* sums = reinterpret_cast<float*>(data + lists);
  SharedStatus status;
  for (std::int64_t n = 0; n < samples.count; ++n) {
    bool finite = true;
    const std::int64_t count =
        BitmapFindActive(samples.At(n), samples.stored_as, features, active, active_values, &finite);
    const BitmapColumnsArgs args{weight.args,
                                 active,
                                 active_values,
                                 count,
                                 !finite,
                                 sums,
                                 inputs.bias.data,
                                 relu,
                                 y_data + n * out_features * samples.item_bytes,
                                 samples.stored_as};
    // Each range of words counts the bits before it in every column, so ranges are long.
    ParallelFor(words, std::max<std::int64_t>(8, GrainItems(count * 8)),
                [&](std::int64_t begin, std::int64_t end) { status.Report(BitmapColumns(args, begin, end)); });
  }
  status.Raise(kOp, weight.args.nnz, weight.args.entries, "column_offsets");
  return y;
}

std::tuple<Tensor, Tensor, Tensor> BitmapPackOnCpu(const Tensor& weight) {
  constexpr const char* kOp = "bitmap_pack";
  const FloatDtype stored_as = DtypeOf(kOp, weight, "weight", true);
  CheckOnCpu(kOp, weight, "weight");
  STD_TORCH_CHECK(weight.dim() == 2, kOp, ": weight must be [out, in], got ", weight.dim(), "-D; reshape it");
  const Tensor dense = Contiguous(weight);
  const std::int64_t rows = dense.size(0), columns = dense.size(1);
  Tensor bitmap = torch::stable::new_empty(dense, {rows, BitmapWords(columns)}, ScalarType::Long);
  Tensor row_offsets = torch::stable::new_empty(dense, {rows + 1}, ScalarType::Int);
  auto* offsets = row_offsets.mutable_data_ptr<std::int32_t>();
  BitmapPackArgs args{dense.const_data_ptr(),
                      stored_as,
                      rows,
                      columns,
                      static_cast<std::uint64_t*>(bitmap.mutable_data_ptr()),
                      offsets,
                      nullptr};
  const std::int64_t grain = GrainItems(columns);
  ParallelFor(rows, grain, [&](std::int64_t begin, std::int64_t end) { BitmapPackBits(args, begin, end); });
  std::int64_t nnz = 0;
  offsets[0] = 0;
  for (std::int64_t r = 1; r <= rows; ++r) {
    nnz += offsets[r];
    offsets[r] = static_cast<std::int32_t>(nnz);
  }
  STD_TORCH_CHECK(nnz <= std::numeric_limits<std::int32_t>::max(), kOp,
                  ": weight must have fewer than 2**31 non-zeros, got ", nnz, "; split it by rows");
  Tensor values = torch::stable::new_empty(dense, {nnz});
  args.values = values.mutable_data_ptr();
  ParallelFor(rows, grain, [&](std::int64_t begin, std::int64_t end) { BitmapPackValues(args, begin, end); });
  return {bitmap, row_offsets, values};
}

Tensor BitmapFromRowsOnCpu(const Tensor& row_offsets, const Tensor& col_indices, std::int64_t columns) {
  constexpr const char* kOp = "bitmap_from_rows";
  CheckTensor(kOp, row_offsets, "row_offsets", ScalarType::Int, 1);
  CheckTensor(kOp, col_indices, "col_indices", ScalarType::Int, 1);
  STD_TORCH_CHECK(row_offsets.numel() >= 1 && columns >= 0, kOp,
                  ": row_offsets must have one entry more than rows, got ", row_offsets.numel(), "; pass [0]");
  // In memory of their own, which the kernel may read as int32.
  const Tensor offsets = torch::stable::clone(row_offsets), from = torch::stable::clone(col_indices);
  const std::int32_t* offset = offsets.const_data_ptr<std::int32_t>();
  const std::int32_t* column = from.const_data_ptr<std::int32_t>();
  const std::int64_t rows = offsets.numel() - 1, nnz = from.numel();
  bool rising = offset[0] == 0 && offset[rows] == nnz, sorted = true;
  for (std::int64_t r = 0; r < rows; ++r) rising &= offset[r] <= offset[r + 1];
  STD_TORCH_CHECK(rising, kOp, ": row_offsets must rise from 0 to ", nnz, "; rebuild the weight");
  for (std::int64_t r = 0; r < rows; ++r) {
    std::int64_t before = -1;
    for (std::int64_t k = offset[r]; k < offset[r + 1]; ++k) {
      sorted &= before < column[k] && column[k] < columns;
      before = column[k];
    }
  }
  STD_TORCH_CHECK(sorted, kOp, ": col_indices must rise within a row and lie in [0, ", columns,
                  "), got a row that breaks this; rebuild the weight");
  Tensor bitmap = torch::stable::new_empty(offsets, {rows, BitmapWords(columns)}, ScalarType::Long);
  auto* bits = static_cast<std::uint64_t*>(bitmap.mutable_data_ptr());
  ParallelFor(
      rows, GrainItems(BitmapWords(columns) + nnz / std::max<std::int64_t>(1, rows)),
      [&](std::int64_t begin, std::int64_t end) { BitmapFromColumns(offset, column, columns, bits, begin, end); });
  return bitmap;
}

void CheckBits(const char* op, Place place, const Tensor& bitmap, const Tensor& row_offsets, std::int64_t columns,
               std::int64_t nnz) {
  CheckTensor(op, bitmap, "bitmap", ScalarType::Long, 2, place);
  CheckTensor(op, row_offsets, "row_offsets", ScalarType::Int, 1, place);
  const std::int64_t rows = bitmap.size(0);
  STD_TORCH_CHECK(columns >= 0 && bitmap.size(1) == BitmapWords(columns), op, ": bitmap must be [out, ",
                  BitmapWords(columns), "] for ", columns, " columns, got ", bitmap.size(1),
                  " words a row; pass the weight's columns");
  STD_TORCH_CHECK(row_offsets.numel() == rows + 1 && nnz >= 0, op, ": row_offsets must be [", rows + 1, "], got ",
                  row_offsets.numel(), "; pack the weight again");
}

Tensor BitmapToRowsOnCpu(const Tensor& bitmap, const Tensor& row_offsets, std::int64_t columns, std::int64_t nnz) {
  constexpr const char* kOp = "bitmap_to_rows";
  CheckBits(kOp, kCpu, bitmap, row_offsets, columns, nnz);
  const std::int64_t rows = bitmap.size(0);
  const Tensor bits = Contiguous(bitmap), offsets = Contiguous(row_offsets);
  Tensor col_indices = torch::stable::new_empty(row_offsets, {nnz});
  auto* columns_of = col_indices.mutable_data_ptr<std::int32_t>();
  const auto* words = static_cast<const std::uint64_t*>(bits.const_data_ptr());
  const auto* offset = offsets.const_data_ptr<std::int32_t>();
  std::int32_t first = 0, last = 0;
  std::memcpy(&first, offset, sizeof first);
  std::memcpy(&last, offset + rows, sizeof last);
  SharedStatus status;
  if (first != 0 || last != nnz) status.Report(BitmapStatus::kBadRowOffsets);
  ParallelFor(rows, GrainItems(bitmap.size(1) + nnz / std::max<std::int64_t>(1, rows)),
              [&](std::int64_t begin, std::int64_t end) {
                status.Report(BitmapToColumns(words, offset, columns, nnz, columns_of, begin, end));
              });
  status.Raise(kOp, nnz, 0);
  return col_indices;
}

#ifdef TERSETORCH_CUDA

Tensor BitmapMatmulOnCuda(const Tensor& x, const Tensor& bitmap, const Tensor& row_offsets, const Tensor& values,
                          const std::optional<Tensor>& bias, const std::optional<Tensor>& codebook,
                          const std::optional<Tensor>& scales, std::string mode, bool relu) {
  constexpr const char* kOp = "bitmap_matmul";
  const CudaCall call(kOp, x, "x");
  const MatmulInputs inputs(kOp, call.place(), x, bitmap, row_offsets, values, bias, codebook, scales, mode);
  const Samples& samples = inputs.samples;
  const Tensor y = EmptyWithLastDim(x, inputs.weight.args.rows);
  BitmapMatmulCudaArgs args{
      inputs.weight.args, samples.At(0), samples.stored_as, nullptr, inputs.bias.data, relu, y.mutable_data_ptr(),
      samples.count,      nullptr};
  Tensor quantized, x_scales;
  if (inputs.quantized) {
    quantized = torch::stable::new_empty(x, {samples.count, samples.features}, ScalarType::Char);
    x_scales = torch::stable::new_empty(x, {samples.count}, ScalarType::Float);
    const BitmapQuantizeCudaArgs quantize{args.x,
                                          args.stored_as,
                                          samples.count,
                                          samples.features,
                                          quantized.mutable_data_ptr<std::int8_t>(),
                                          x_scales.mutable_data_ptr<float>()};
    call.Check(BitmapQuantizeCuda(quantize, call.Stream()));
    args.x = quantize.quantized;
    args.x_scales = quantize.x_scales;
  }
  const Tensor scratch = torch::stable::new_empty(x, {BitmapScratchBytes(args)}, ScalarType::Byte);
  args.scratch = scratch.mutable_data_ptr();
  call.Check(BitmapMatmulCuda(args, call.Stream()));
  return y;
}

Tensor BitmapColumnsMatmulOnCuda(const Tensor& x, const Tensor& bitmap, const Tensor& column_offsets,
                                 const Tensor& values, const std::optional<Tensor>& bias,
                                 const std::optional<Tensor>& codebook, std::int64_t out_features, bool relu) {
  constexpr const char* kOp = "bitmap_columns_matmul";
  const CudaCall call(kOp, x, "x");
  const ColumnsInputs inputs(kOp, call.place(), x, bitmap, column_offsets, values, bias, codebook, out_features);
  const Samples& samples = inputs.samples;
  const Tensor y = EmptyWithLastDim(x, out_features);
  call.Check(BitmapColumnsCuda({inputs.weight.args, samples.At(0), samples.stored_as, inputs.bias.data, relu,
                                y.mutable_data_ptr(), samples.count},
                               call.Stream()));
  return y;
}

Tensor BitmapToRowsOnCuda(const Tensor& bitmap, const Tensor& row_offsets, std::int64_t columns, std::int64_t nnz) {
  constexpr const char* kOp = "bitmap_to_rows";
  const CudaCall call(kOp, bitmap, "bitmap");
  CheckBits(kOp, call.place(), bitmap, row_offsets, columns, nnz);
  const Tensor bits = Usable(call.place(), bitmap), offsets = Usable(call.place(), row_offsets);
  const Tensor col_indices = torch::stable::new_empty(row_offsets, {nnz});
  call.Check(
      BitmapRowsCuda({static_cast<const std::uint64_t*>(bits.const_data_ptr()), offsets.const_data_ptr<std::int32_t>(),
                      bitmap.size(0), columns, nnz, col_indices.mutable_data_ptr<std::int32_t>()},
                     call.Stream()));
  return col_indices;
}

#endif

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tersetorch, CPU, m) {
  m.impl("bitmap_matmul", TORCH_BOX(&BitmapMatmulOnCpu));
  m.impl("bitmap_matmul_inference", TORCH_BOX(&BitmapMatmulOnCpu));
  m.impl("bitmap_columns_matmul", TORCH_BOX(&BitmapColumnsMatmulOnCpu));
  m.impl("bitmap_columns_matmul_inference", TORCH_BOX(&BitmapColumnsMatmulOnCpu));
  m.impl("bitmap_pack", TORCH_BOX(&BitmapPackOnCpu));
  m.impl("bitmap_from_rows", TORCH_BOX(&BitmapFromRowsOnCpu));
  m.impl("bitmap_to_rows", TORCH_BOX(&BitmapToRowsOnCpu));
}

STABLE_TORCH_LIBRARY_IMPL(tersetorch, CUDA, m) {
#ifdef TERSETORCH_CUDA
  m.impl("bitmap_matmul", TORCH_BOX(&BitmapMatmulOnCuda));
  m.impl("bitmap_matmul_inference", TORCH_BOX(&BitmapMatmulOnCuda));
  m.impl("bitmap_columns_matmul", TORCH_BOX(&BitmapColumnsMatmulOnCuda));
  m.impl("bitmap_columns_matmul_inference", TORCH_BOX(&BitmapColumnsMatmulOnCuda));
  m.impl("bitmap_to_rows", TORCH_BOX(&BitmapToRowsOnCuda));
#else
  for (const char* op : {"bitmap_matmul", "bitmap_matmul_inference", "bitmap_columns_matmul",
                         "bitmap_columns_matmul_inference", "bitmap_to_rows"}) {
    m.impl(op, &NotBuiltForCuda);
  }
#endif
}

}  // namespace tersetorch
